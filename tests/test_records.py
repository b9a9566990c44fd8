"""Records: written whole or not at all, read with suspicion, and named by the science alone."""

import errno
import importlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import compose_config
from hypothesis import given, settings
from hypothesis import strategies as st

from nnprune.experiment.build import build
from nnprune.records import RESULT_FILE, RecordError, RunRecord, fingerprint, read, read_all

RECORD = RunRecord(
    status="completed",
    fingerprint="0123456789ab",
    model="demo",
    pruner="wanda",
    sparsity="2:4",
    metrics={"demo_perplexity": 21.980000000000004},
    per_linear=[{"name": "model.layers.0.fc1", "sparsity": 0.5}],
    config={"seed": 0, "text": "ünïcode ✓"},
)
PRUNER = """
from nnprune import ScorePruner

class Mine(ScorePruner):
    def __init__(self, alpha=1.0):
        self.alpha = alpha

    def score(self, W, module_name):
        return W.abs()
"""


def test_round_trip(tmp_path):
    path = RECORD.write(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / RESULT_FILE
    assert read(path.parent) == RECORD
    assert json.loads(path.read_text())["schema_version"] == 1


def test_no_record_is_none(tmp_path):
    assert read(tmp_path) is None
    assert read(tmp_path / "nothing") is None


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_record(tmp_path, monkeypatch, broken):
    def crash(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    RECORD.write(tmp_path)
    before = (tmp_path / RESULT_FILE).read_bytes()
    owner = os if broken == "fsync" else Path
    monkeypatch.setattr(owner, broken, crash)
    with pytest.raises(OSError, match=r"outputs: .*result.json cannot be written \(No space left on device\); make room"):
        RunRecord("failed", "f", "m", "p", "0.5").write(tmp_path)
    assert (tmp_path / RESULT_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [RESULT_FILE]


def test_what_json_cannot_hold_does_not_stop_a_record(tmp_path):
    config = {"sparsity": {"pattern": float("nan")}, "x": [float("-inf"), 1.5]}
    RunRecord("failed", "f", "m", "p", "nan", config=config).write(tmp_path)
    text = (tmp_path / RESULT_FILE).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["config"] == {"sparsity": {"pattern": "nan"}, "x": ["-inf", 1.5]}


def cut_in_half(text: str) -> str:
    return text[: len(text) // 2]


def other_schema(text: str) -> str:
    return json.dumps(json.loads(text) | {"schema_version": 2})


def lacking_a_key(text: str) -> str:
    return json.dumps({key: value for key, value in json.loads(text).items() if key != "model"})


UNUSABLE = [
    (cut_in_half, "is no complete JSON file"),
    (lambda text: "", "is no complete JSON file"),
    (lambda text: '{"loss": 3}', "is no nnprune record"),
    (lambda text: "[1, 2]", "is no nnprune record"),
    (other_schema, "has schema_version 2, this is nnprune with 1"),
    (lacking_a_key, "lacks keys of a record"),
    (lambda text: json.dumps(json.loads(text) | {"loss": 3}), "has loss, which no record has"),
]


@pytest.mark.parametrize(("damage", "reason"), UNUSABLE)
def test_read_refuses_with_file_reason_and_remedy(tmp_path, damage, reason):
    path = RECORD.write(tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(RecordError) as caught:
        read(tmp_path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "overwrite=true" in str(caught.value)


def test_read_all_reports_and_skips_what_is_no_record(tmp_path):
    RECORD.write(tmp_path / "b" / "good")
    RECORD.write(tmp_path / "a")
    for number, (damage, _) in enumerate(UNUSABLE):
        path = RECORD.write(tmp_path / "bad" / str(number))
        path.write_text(damage(path.read_text()))
    (tmp_path / "bad" / "bytes").mkdir()
    (tmp_path / "bad" / "bytes" / RESULT_FILE).write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad" / "folder" / RESULT_FILE).mkdir(parents=True)
    records, problems = read_all(tmp_path)
    assert records == [asdict(RECORD) | {"path": str(tmp_path / folder / RESULT_FILE)} for folder in ("a", "b/good")]
    assert [path.parent.name for path, _ in problems] == [*"0123456", "bytes", "folder"]
    for (_, reason), (_, expected) in zip(problems, UNUSABLE, strict=False):
        assert expected in reason


def test_a_record_may_lack_what_was_added_since(tmp_path):
    path = RECORD.write(tmp_path)
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "recovered"}))
    assert read(tmp_path) == RECORD


science = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


def reversed_keys(value):
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(entry) for entry in value] if isinstance(value, list) else value


@settings(max_examples=50)
@given(first=st.dictionaries(st.text(max_size=3), science, max_size=4), second=science)
def test_fingerprint_depends_on_content_and_not_on_the_order_of_keys(first, second):
    assert fingerprint(reversed_keys(first)) == fingerprint(first)
    assert fingerprint({**first, "more": [second]}) != fingerprint({**first, "more": second})
    assert fingerprint(first) != fingerprint({**first, "new key": second})


def test_keys_of_a_setting_may_be_numbers_and_names():
    assert fingerprint({"patterns": {0: "dense", "*.fc1": 0.5}}) == fingerprint({"patterns": {"*.fc1": 0.5, "0": "dense"}})


def identity(cfg) -> str:
    return build(cfg).fingerprint


def evaluation(cfg) -> set[str]:
    return set(build(cfg).evaluations.values())


@pytest.mark.parametrize(
    "override",
    ["runtime=low_memory", "runtime.batch_tokens=1", "label=mine", "outputs=elsewhere", "save=true", "overwrite=true",
     "model.name=other", "sparsity=0.50", "sparsity='0.5'", "evaluation.seq_len=16", "tracking=csv",
     "objective=text_perplexity"],
)  # fmt: skip
def test_identity_is_not_changed_by(tiny_config, override):
    assert identity(tiny_config(override)) == identity(tiny_config())


CHANGES = [
    "seed=1", "sparsity=0.6", "sparsity=0.5000001", "sparsity=2:4", "sparsity=dense", "propagate=dense", "propagate=sequential",
    "pruner=wanda", "pruner=magnitude", "pruner=sparsegpt_nnpruning", "pruner.damping=0.02", "calibration.num_samples=5",
    "calibration.seq_len=16", "calibration.seed=9", "calibration.mode=documents", "model.dtype=bfloat16",
]  # fmt: skip


def test_identity_is_changed_by_each_part_of_the_science(tiny_config):
    found = {change: identity(tiny_config(change)) for change in CHANGES}
    assert identity(tiny_config()) not in found.values()
    assert len(set(found.values())) == len(found)


def test_an_evaluation_has_an_identity_of_its_own(tiny_config):
    assert evaluation(tiny_config("pruner=wanda", "runtime.batch_tokens=1")) == evaluation(tiny_config())
    assert evaluation(tiny_config("evaluation.seq_len=16")) != evaluation(tiny_config())
    assert evaluation(tiny_config("evaluation.max_windows=4")) != evaluation(tiny_config())


@pytest.mark.parametrize(("key", "identity"), [("calibration.path", identity), ("evaluation.path", evaluation)])
def test_a_text_counts_by_content_and_not_by_place(tiny_config, small_text, tmp_path, key, identity):
    copy = tmp_path / "moved.txt"
    shutil.copy(small_text, copy)
    assert identity(tiny_config(f"{key}={copy}")) == identity(tiny_config(f"{key}=[{copy}]")) == identity(tiny_config())
    copy.write_text(small_text.read_text().replace("nothing else", "nothing more"))
    assert identity(tiny_config(f"{key}={copy}")) != identity(tiny_config())


def test_a_local_dataset_counts_by_content_and_not_by_place(tiny_model_dir, tmp_path):
    def with_dataset(folder: str) -> set[str]:
        settings = ["model=local", f"model.path={tiny_model_dir}", "evaluation=c4", "calibration=c4"]
        keys = ("calibration.dataset", "evaluation.datasets.c4.dataset")
        cfg = compose_config(*settings, *(f"{key}={tmp_path / folder}" for key in keys))
        return {identity(cfg), *evaluation(cfg)}

    for folder in ("here", "there", "other"):
        (tmp_path / folder / "en").mkdir(parents=True)
        (tmp_path / folder / "en/c4-train.00000-of-01024.json.gz").write_bytes(b"train")
        (tmp_path / folder / "en/c4-validation.00000-of-00008.json.gz").write_bytes(b"other" if folder == "other" else b"test")
    assert with_dataset("here") == with_dataset("there")
    assert len(with_dataset("here") & with_dataset("other")) == 1, "only the evaluation's file differs"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_counts_by_content_and_not_by_place(tiny_config, tiny_model_dir, tmp_path, file):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "elsewhere" / "moved")
    assert identity(tiny_config(f"model.path={copy}")) == identity(tiny_config())
    content = bytearray((copy / file).read_bytes())
    if file == "config.json":
        content = content.replace(b'"dropout": 0.1', b'"dropout": 0.2')
    else:
        content[-2] ^= 1
    (copy / file).write_bytes(content)
    assert identity(tiny_config(f"model.path={copy}")) != identity(tiny_config())


def test_the_code_of_a_custom_pruner_is_science(tiny_config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "pruner_of_test_records.py"
    module.write_text(PRUNER)
    custom = ("pruner=custom", "pruner._target_=pruner_of_test_records.Mine")
    before = identity(tiny_config(*custom))
    assert identity(tiny_config(*custom, "+pruner.alpha=0.5")) != before
    module.write_text(PRUNER.replace("W.abs()", "W.abs().sqrt()"))
    assert identity(tiny_config(*custom)) == before, "this process runs what it has imported"
    importlib.invalidate_caches()
    importlib.reload(sys.modules["pruner_of_test_records"])
    assert identity(tiny_config(*custom)) != before


def test_a_dense_model_has_one_identity_whatever_the_method(tiny_config):
    irrelevant = ((), ("pruner=wanda",), ("calibration.num_samples=3",), ("seed=4",), ("evaluation.seq_len=16",))
    dense = {identity(tiny_config("sparsity=dense", *more)) for more in irrelevant}
    assert len(dense) == 1
    for more in ((), ("pruner=magnitude", "sparsity=2:4"), ("propagate=dense",)):
        assert {build(tiny_config(*more)).dense().fingerprint} == dense


def test_the_folder_says_what_was_run(tiny_config, tmp_path):
    experiment = build(tiny_config("sparsity=2:4", "pruner=wanda", "model.name=org/opt 1.3b"))
    assert experiment.folder == tmp_path / "outputs" / "org_opt_1.3b" / "2of4" / f"Wanda-{experiment.fingerprint}"
