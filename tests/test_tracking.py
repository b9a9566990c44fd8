"""Tracking: what a tracker is told, also of resumed, repeated and finished runs; a tracker that fails; the CSV files."""

import csv

import pytest
from support.runs import failure

from nnprune.evaluation import Perplexity
from nnprune.experiment.build import build
from nnprune.model.loading import ModelSource
from nnprune.records import RESULT_FILE
from nnprune.run import run
from nnprune.tracking.base import Tracker

told = []


class Recorder(Tracker):
    def __init__(self, fails_at=None):
        self.fails_at = fails_at

    def start(self, run, run_id):
        told.append(("start", run_id))
        self.run = run
        return run_id or "seven"

    def log_layer(self, layer, metrics):
        if layer == self.fails_at:
            raise ConnectionError("the server\nis down")
        told.append(("layer", layer, dict(metrics)))

    def finish(self, metrics, record):
        told.append(("finish", dict(metrics), record))

    def stop(self):
        told.append(("stop",))


@pytest.fixture
def tracked_config(tiny_config):
    told.clear()

    def make(*overrides, fails_at=None):
        cfg = tiny_config("pruner=magnitude", *overrides)
        cfg.tracking = {"_target_": f"{__name__}.Recorder", "fails_at": fails_at}
        return cfg

    return make


def events():
    """What was told since the last call, without figures."""
    found = [event[:2] if event[0] in ("start", "layer") else event[0] for event in told]
    told.clear()
    return found


def test_a_run_is_shown_layer_by_layer_and_then_its_metrics(tracked_config):
    cfg = tracked_config()
    record = run(cfg)
    layers, finished = told[1:3], told[3]
    assert [layer[1] for layer in layers] == [1, 2]
    for _, layer, metrics in layers:
        linears = [one for one in record.per_linear if f".{layer - 1}." in one["name"]]
        assert metrics["relative_error"] == pytest.approx(sum(one["relative_error"] for one in linears) / len(linears))
        assert metrics["sparsity"] == 0.5
        assert metrics["seconds"] > 0
    assert finished[1]["text_perplexity"] == record.metrics["text_perplexity"]
    assert finished[1]["dense_text_perplexity"] == record.dense_metrics["text_perplexity"]
    assert finished[1]["linear_sparsity"] == 0.5
    assert finished[2] == build(cfg).folder / RESULT_FILE


def test_a_finished_run_is_shown_once(tracked_config, tiny_config):
    run(tiny_config("pruner=magnitude"))
    run(tracked_config())
    whole = [("start", None), ("layer", 1), ("layer", 2), "finish"]
    assert events() == whole
    run(tracked_config())
    assert events() == []
    run(tracked_config("overwrite=true"))
    assert events() == [("start", "seven"), *whole[1:]]
    run(tracked_config("sparsity=dense"))
    assert events() == [("start", None), "finish"]


def test_a_resumed_run_continues_its_own(tracked_config, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(Perplexity, "measure", fail)
        run(tracked_config())
    assert events() == [("start", None), ("layer", 1), ("layer", 2), "stop"]
    run(tracked_config())
    assert events() == [("start", "seven"), "finish"]


def test_a_tracker_that_fails_does_not_lose_the_run(tracked_config, caplog):
    record = run(tracked_config(fails_at=2))
    assert record.status == "completed"
    assert events() == [("start", None), ("layer", 1)]
    warnings = [message for message in caplog.messages if "tracking" in message]
    assert warnings == [
        "warning: tracking=test_tracking: ConnectionError: the server is down; the run goes on without it",
    ]
    run(tracked_config())  # once the server is there again
    assert events() == [("start", "seven"), ("layer", 2), "finish"]


@pytest.mark.parametrize(
    ("kind", "remedy"), [("mlflow", "'nnprune[track]'"), ("tensorboard", "tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named_before_weights_are_read(kind, remedy, tiny_config, monkeypatch):
    monkeypatch.setattr("nnprune.tracking.base.find_spec", lambda _: None)
    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("weights were read"))
    message = failure(tiny_config(f"tracking={kind}"))
    assert message == f"tracking={kind}: {kind} is not installed; pip install {remedy}, or use tracking=none"


def test_csv_has_a_line_for_each_layer_and_each_run(tiny_config):
    records = [run(tiny_config(f"pruner={name}", "tracking=csv")) for name in ("magnitude", "wanda", "magnitude")]
    folder = build(tiny_config("pruner=wanda")).folder.parents[2] / "tracking"

    def read(name):
        with (folder / name).open(newline="") as file:
            return list(csv.DictReader(file))

    layers, runs = read("layers.csv"), read("runs.csv")
    assert [one["layer"] for one in layers] == ["1", "2", "1", "2"]
    assert [one["run"] for one in layers] == [one["run"] for one in runs for _ in range(2)]
    assert [float(one["text_perplexity"]) for one in runs] == [record.metrics["text_perplexity"] for record in records[:2]]
    assert runs[1]["pruner._target_"] == "nnprune.pruners.wanda.Wanda"
    assert runs[1]["record"] == str(build(tiny_config("pruner=wanda")).folder / RESULT_FILE)
