"""Plans from files: the record of another run, and mappings."""

import json

import pytest
from support.runs import BRIEF, patterns_of, refuse, stripped

from nnprune.allocations.from_file import FromFile
from nnprune.experiment.build import build
from nnprune.model.loading import ModelSource
from nnprune.patterns import NM, Unstructured, parse_pattern
from nnprune.run import run


def test_the_plan_of_a_record_is_used_again(tiny_config, tmp_path):
    first = run(tiny_config("pruner=wanda", "sparsity=0.6", "allocation=owl"))
    [path] = tmp_path.glob("outputs/tiny-opt/0.6/*/result.json")
    again = run(tiny_config("pruner=wanda", "sparsity=0.6", "allocation=file", f"allocation.path={path}"))
    assert again.metrics == first.metrics
    assert stripped(again.per_linear) == stripped(first.per_linear)
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(stripped(first.per_linear)))
    same = build(tiny_config("pruner=wanda", "sparsity=0.6", "allocation=file", f"allocation.path={copy}"))
    assert same.fingerprint == again.fingerprint != first.fingerprint


def from_file(tiny_config, tmp_path, text, *more, name="plan.yaml"):
    (tmp_path / name).write_text(text)
    return tiny_config("allocation=file", f"allocation.path={tmp_path / name}", *more)


def test_the_last_key_that_fits_counts(tiny_config, tmp_path):
    text = '"*": 0.5\n0: 0.6\n"*.1.*": 0.4\n"*.0.fc1": dense\n"*.0.fc2": "1:4"\nmodel.decoder.layers.1.fc2: 0.45\n'
    found = patterns_of(run(from_file(tiny_config, tmp_path, text.replace('"*": 0.5\n', ""), *BRIEF, "sparsity=0.45")))
    layer = "model.decoder.layers."
    assert found[f"{layer}0.self_attn.q_proj"] == Unstructured(0.6)
    assert found[f"{layer}1.fc1"] == found[f"{layer}1.self_attn.q_proj"] == Unstructured(0.4)
    assert found[f"{layer}0.fc1"] == Unstructured(0.0)
    assert found[f"{layer}0.fc2"] == NM(1, 4)
    assert found[f"{layer}1.fc2"] == Unstructured(0.45)
    with pytest.raises(ValueError, match=r"\* decides nothing"):
        run(from_file(tiny_config, tmp_path, text, "sparsity=0.45"))


BAD_FILES = [
    ("plan.yaml", '"*.fc1": 0.5', "0.5", "no key fits model.decoder.layers.0.self_attn.k_proj", '"*": 0.5'),
    ("plan.yaml", '"*": 0.5\n2: 0.4', "0.5", "2 decides nothing", "take it out"),
    ("plan.yaml", '"*": 0.5\n"*.fc3": 0.4', "0.5", "*.fc3 decides nothing", "take it out"),
    ("plan.yaml", '"*": 50', "0.5", "*: sparsity=50", "for 50 % write 0.5"),
    ("plan.yaml", '"*": 2:4', "0.5", "*: sparsity=124", "quote it"),
    ("plan.yaml", '"*": [0.5]', "0.5", "*: [0.5]: not a pattern", "N:M such as 2:4"),
    ("plan.yaml", '"*": true', "0.5", "*: True: not a pattern", "N:M such as 2:4"),
    (
        "plan.yaml",
        '"*": "1:5"',
        "0.8",
        "1:5 for model.decoder.layers.0.self_attn.k_proj, which has 32 inputs",
        "does not divide",
    ),
    ("plan.yaml", "0: 0.5\n1: 0.6", "0.5", "has the mean sparsity 0.55", "set sparsity=0.55"),
    ("plan.yaml", '"*": 0.5', "2:4", "0.5, which is no N:4", "set sparsity to the plan's mean as a fraction"),
    ("plan.yaml", '0: "1:4"\n1: "2:4"', "2:4", "has the mean sparsity 0.625", "set sparsity=0.625"),
    ("plan.yaml", "a: [", "0.5", "is no JSON or YAML", "see conf/allocation/file.yaml"),
    ("plan.json", "{", "0.5", "is no JSON or YAML", "see conf/allocation/file.yaml"),
    ("plan.json", '{"per_linear": []}', "0.5", "tells of no linear", "completed run"),
    ("plan.json", "[1]", "0.5", "tells of no linear", "completed run"),
    ("plan.yaml", "", "0.5", "tells of no linear", "completed run"),
]


SIZES = {"self_attn.k_proj": (32, 32), "fc1": (64, 32), "fc2": (32, 64)}
SHAPES = [{f"model.decoder.layers.{index}.{name}": shape for name, shape in SIZES.items()} for index in range(2)]


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: f"{bad[1]} {bad[3]}")
def test_bad_files(bad, tmp_path):
    name, text, sparsity, problem, remedy = bad
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"allocation\.path=") as caught:
        FromFile(tmp_path / name).check(parse_pattern(sparsity), SHAPES)
    assert problem in str(caught.value)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_plan_is_found_before_weights_are_read(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelSource, "checkpoint", refuse)
    with pytest.raises(ValueError, match=r"sparsity=0\.5: .* has the mean sparsity 0\.55; set sparsity=0\.55"):
        run(from_file(tiny_config, tmp_path, "0: 0.5\n1: 0.6"))


def test_a_mixed_nm_file(tiny_config, tmp_path):
    record = run(from_file(tiny_config, tmp_path, '0: "3:8"\n1: "5:8"', *BRIEF, "sparsity=4:8"))
    assert set(patterns_of(record).values()) == {NM(3, 8), NM(5, 8)}
    with pytest.raises(ValueError, match=r"pruner\.mask_columns=12: must be a multiple of 8"):
        options = ("pruner.mask_columns=12", "pruner.block_size=12")
        run(from_file(tiny_config, tmp_path, '0: "3:8"\n1: "2:4"', "sparsity=0.5625", *options))


LEVELS = "\n".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9))
HOSTILE_FILES = [
    ("plan.yaml", f"a0: &a0 [x, x]\n{LEVELS}", "line 1 has the anchor or alias a0"),
    ("plan.yaml", '"*": 0.5\n"a": *b', "line 2 has the anchor or alias b"),
    ("plan.yaml", "[" * 5000, "is no JSON or YAML"),
    ("plan.json", "[" * 100_000, "is no JSON or YAML"),
    ("plan.json", '[{"name": [1], "pattern": 0.5}]', "no key fits"),
    ("plan.json", '{"*": ' + "1" * 5000 + "}", "is no JSON or YAML"),
    ("plan.yaml", f'"*": "{"x" * 100_000}"', "not a pattern"),
    ("plan.yaml", f'"*": 0.5\n"{"x" * 1000}": 0.5', "decides nothing"),
    ("plan.yaml", '"*": "1:' + "9" * 5000 + '"', "not a pattern"),
    ("plan.yaml", '"*": "1:99999999999"', "M must be at most 1048576"),
    ("plan.yaml", f'"*": {[0] * 10_000}', "not a pattern"),
    ("plan.yaml", "#" * (5 << 20), "is larger than 4 MiB"),
]


@pytest.mark.parametrize("bad", HOSTILE_FILES, ids=lambda bad: f"{bad[0]} {bad[2]}")
def test_a_hostile_file_gives_one_short_line(bad, tmp_path):
    name, text, problem = bad
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"allocation\.path=") as caught:
        FromFile(tmp_path / name).check(parse_pattern("0.5"), SHAPES)
    message = str(caught.value)
    assert problem in message
    assert "\n" not in message
    assert len(message) < 700


def test_a_device_is_not_read():
    with pytest.raises(ValueError, match=r"allocation\.path=/dev/zero: is no regular file"):
        FromFile("/dev/zero")
