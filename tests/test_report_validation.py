"""Hostile records are skipped, each with one line on stderr, and change nothing in the rows of others."""

import json
import re
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.records import collect, demo_table, write_json, write_record, write_runs

from nnprune.records import RunRecord, read_all
from nnprune.report.frame import to_frame


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path / "outputs")


def test_unusable_files_are_reported_and_skipped(runs):
    whole = write_record(runs / "whole", value=5.0).read_text()
    for name, text in {
        "cut": whole[: len(whole) // 2],
        "foreign": '{"hello": 1}',
        "list": "[1, 2]",
        "binary": "\x00",
        "future": whole.replace('"schema_version": 1', '"schema_version": 99'),
    }.items():
        (runs / name).mkdir()
        (runs / name / "result.json").write_text(text)
    write_record(runs / "shape", metrics=[5.0])
    write_record(runs / "text", metrics={"demo_perplexity": "low"})
    write_record(runs / "failed", status="failed", metrics={}, error="ValueError: no\nluck", finished=None)
    write_record(runs / "ancient", model="other", finished="yesterday")
    status, out, err = collect(runs, "--metric", "demo_perplexity")
    assert status == 0 and "| **Wanda** | 50% | 5.00 | 38.78 | 36.52 | 21.98 |" in out
    lines = err.splitlines()
    skipped = {re.search(r"outputs/(\w+)/result.json: skipped, ", line)[1]: line for line in lines}
    assert sorted(skipped) == ["binary", "cut", "failed", "foreign", "future", "list", "shape", "text"]
    assert len(lines) == len(skipped)
    assert skipped["failed"].endswith("failed run: ValueError: no luck")


def replaced(**changes):
    """The text of a good record with some fields replaced by JSON."""

    def change(good):
        content = {**json.loads(good), **{name: f"@{name}@" for name in changes}}
        text = json.dumps(content)
        for name, value in changes.items():
            text = text.replace(f'"@{name}@"', value)
        return text

    return change


HOSTILE = {
    "empty": (lambda good: "", "is no complete JSON file"),
    "a number": (lambda good: "1", "is no nnprune record"),
    "a list of records": (lambda good: f"[{good}]", "is no nnprune record"),
    "deep file": (lambda good: "[" * 100_000, "is nested too deeply"),
    "deep config": (replaced(config='{"a":' * 400 + "1" + "}" * 400), "deep"),
    "deep within bounds of Python": (replaced(config='{"a":' * 60 + "1" + "}" * 60), "config is nested more than 50 deep"),
    "deep error": (replaced(status='"failed"', error="[" * 60 + "]" * 60), "error is nested more than 50 deep"),
    "5000 digits": (replaced(peak_host_bytes="1" * 5000), "is no complete JSON file"),
    "1e999": (replaced(metrics='{"demo_perplexity": 1e999}'), "metrics has a number that is no finite float"),
    "NaN": (replaced(metrics='{"demo_perplexity": NaN}'), "metrics has a number that is no finite float"),
    "10**400": (replaced(metrics='{"demo_perplexity": 1' + "0" * 400 + "}"), "metrics has a number that is no finite float"),
    "10**400 in a config": (replaced(config='{"seed": 1' + "0" * 400 + "}"), "config has a number that is no finite float"),
    "10**30 bytes": (replaced(peak_host_bytes="1" + "0" * 30), "peak_host_bytes=1000.* is not of type int"),
    "surrogate": (replaced(model=r'"a\ud800b"'), r'model="a\\ud800b" is no valid Unicode'),
    "surrogate in a key": (replaced(metrics=r'{"\udfff": 1}'), "metrics=.* is no valid Unicode"),
    "huge M": (replaced(sparsity='"1:1000000000000"'), 'sparsity="1:1000000000000" is neither dense, a fraction below 1'),
    "endless M": (replaced(sparsity='"1:' + "9" * 5000 + '"'), 'sparsity="1:9+... is neither'),
    "M of 0": (replaced(sparsity='"0:0"'), 'sparsity="0:0" is neither'),
    "more than all": (replaced(sparsity='"1.5"'), 'sparsity="1.5" is neither'),
    "nan of all": (replaced(sparsity='"nan"'), 'sparsity="nan" is neither'),
    "number as sparsity": (replaced(sparsity="0.5"), "sparsity=0.5 is not of type str"),
    "no status": (replaced(status="null"), "status=null is not of type str"),
    "no config": (replaced(config="null"), "config=null is not of type dict"),
    "config is a list": (replaced(config="[1]"), "config=.1. is not of type dict"),
    "no metrics": (replaced(metrics="null"), "metrics=null is not of type dict"),
    "true as a figure": (replaced(metrics='{"demo_perplexity": true}'), "metrics=.* is not of type dict"),
    "digits as text": (replaced(metrics='{"demo_perplexity": "12"}'), "metrics=.* is not of type dict"),
    "figures in a figure": (replaced(metrics='{"demo_perplexity": {"a": 1}}'), "metrics=.* is not of type dict"),
    "model is a list": (replaced(model='["a"]'), "model=.* is not of type str"),
    "seconds are text": (replaced(seconds='"12"'), 'seconds="12" is not of type dict'),
    "bytes as a float": (replaced(peak_device_bytes="1.5"), "peak_device_bytes=1.5 is not of type int"),
    "finished is a number": (replaced(finished="5"), "finished=5 is not of type str"),
    "fingerprint is a dict": (replaced(fingerprint="{}"), "fingerprint={} is not of type str"),
    "no fingerprint": (replaced(fingerprint='""'), "has an empty fingerprint"),
    "long text": (replaced(notes='"' + "x" * 100_000 + '"'), "notes=.x{50,60}... is not of type list"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_records_are_skipped_with_one_line(tmp_path, kind):
    make, reason = HOSTILE[kind]
    good = write_record(tmp_path / "o" / "good")
    before = demo_table(tmp_path / "o")[0]
    bad = write_json(tmp_path / "o" / "bad", {})
    bad.write_text(make(good.read_text()))
    table, err = demo_table(tmp_path / "o")
    assert table == before
    assert re.fullmatch(f"warning: {re.escape(str(bad))}: skipped, .*{reason}.*\n", err), err
    assert len(err) < 500
    for style in ("csv", "json", "latex"):
        assert collect(tmp_path / "o", "--format", style)[0] == 0


@pytest.mark.parametrize(("text", "cell"), [("nan", "--"), ("inf", "inf"), ("-inf", "-inf")])
def test_figures_that_diverged_are_no_fault(tmp_path, text, cell):
    write_record(tmp_path / "o" / "a", value=text)
    table, err = demo_table(tmp_path / "o")
    assert f"| **Wanda** | 50% | {cell} |" in table and err == ""


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**300, 10**320)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["nan", "inf", "2:4", "1:99999999999", "0.5", "dense", "completed", "9999-12-31T23:59:59-23:59"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = [entry.name for entry in fields(RunRecord)]


@settings(max_examples=50)
@given(
    changes=st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1, max_size=3),
    removed=st.sets(st.sampled_from(NAMES), max_size=1),
)
def test_no_mutation_of_a_record_stops_the_collector_or_moves_another_row(changes, removed):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paths = [write_record(root / name, model="kept", pruner=name, value=20.0) for name in ("ria", "alps")]
        mutated = write_record(root / "mutated", model="mutated")
        content = {name: value for name, value in (json.loads(mutated.read_text()) | changes).items() if name not in removed}
        mutated.write_text(json.dumps(content))
        found, broken = read_all(root)
        frame, problems = to_frame(found)
        kept = frame[frame["path"].isin(map(str, paths))]
        assert sorted(kept["pruner"]) == ["alps", "ria"] and set(kept["mean"]) == {20.0}
        assert (str(mutated) in set(frame["path"])) + len(broken) + len(problems) + (content.get("metrics", {}) == {}) >= 1
        status, out, err = collect(root, "--metric", "demo_perplexity")
        assert status == 0 and out.count("20.00") == 2 and all(line.startswith("warning: ") for line in err.splitlines())
        assert len(err.splitlines()) <= 2
