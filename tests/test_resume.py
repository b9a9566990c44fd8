"""kill -9 at any moment: nothing that was finished is lost, and figures are the same to the last digit."""

import itertools
import json
import os
import shutil
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import compose_config
from safetensors.torch import save_file
from support.damages import cut, flip, remove, swap
from support.runs import kill, run_until_killed, stripped, watch_measurements

import nnprune.engine.stopwatch
import nnprune.experiment.job
import nnprune.experiment.preparation
import nnprune.model.checkpoint
import nnprune.records
from nnprune.engine.layer_files import LayerFiles
from nnprune.evaluation import Perplexity
from nnprune.run import run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Where the records of runs that nothing disturbs are, so that none is made twice."""
    return f"outputs={tmp_path_factory.mktemp('undisturbed')}"


def at_second_layer(monkeypatch):
    monkeypatch.setattr(nnprune.model.checkpoint, "save_file", KillAtCall(2, save_file))


def half_a_layer_file(monkeypatch):
    def write_half(state, path, metadata):
        save_file(state, path, metadata=metadata)
        os.truncate(path, path.stat().st_size // 2)
        kill()

    monkeypatch.setattr(nnprune.model.checkpoint, "save_file", write_half)


def in_dense_evaluation(monkeypatch):
    monkeypatch.setattr(Perplexity, "measure", kill)


def in_evaluation(monkeypatch):
    monkeypatch.setattr(Perplexity, "measure", KillAtCall(2, Perplexity.measure))


def half_a_record(monkeypatch):
    monkeypatch.setattr(
        nnprune.records.os, "fsync", KillAtCall(8, os.fsync)
    )  # two layers and their reports, dense figures, figures, dense record, this one


def while_clearing_up(monkeypatch):
    monkeypatch.setattr(nnprune.experiment.job.shutil, "rmtree", kill)


class KillAtCall:
    def __init__(self, fatal, function):
        self.left, self.function = fatal, function

    def __get__(self, instance, owner):
        return partial(self, instance)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            kill()
        return self.function(*args, **kwargs)


MOMENTS = [in_dense_evaluation, half_a_layer_file, at_second_layer, in_evaluation, half_a_record, while_clearing_up]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
def test_kill_9_loses_nothing_that_was_finished(moment, tiny_config, undisturbed, tmp_path, monkeypatch):
    whole = run(tiny_config("pruner=sparsegpt", undisturbed))
    cfg = tiny_config("pruner=sparsegpt", "runtime.resume=true")
    with monkeypatch.context() as patch:
        moment(patch)
        run_until_killed(cfg)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("outputs/**/unfinished/layer-*.safetensors")}
    resumed = run(cfg)
    assert resumed.metrics == whole.metrics  # to the last digit
    assert resumed.dense_metrics == whole.dense_metrics
    strip = [[{**linear, "seconds": 0} for linear in record.per_linear] for record in (resumed, whole)]
    assert strip[0] == strip[1]
    seconds = {linear["name"]: linear["seconds"] for linear in resumed.per_linear}
    assert len(seconds) == 12
    assert finished or moment not in (at_second_layer, in_evaluation, half_a_record)


def test_the_costs_are_those_of_all_processes(tiny_config, monkeypatch):
    cfg = tiny_config("pruner=sparsegpt", "runtime.resume=true")
    with monkeypatch.context() as patch:
        at_second_layer(patch)
        hours = SimpleNamespace(perf_counter=partial(next, itertools.count(step=3600)))
        patch.setattr(nnprune.engine.stopwatch, "time", hours)
        patch.setattr(nnprune.engine.stopwatch, "peaks", lambda: {"peak_host_bytes": 2**50, "peak_device_bytes": 1})
        run_until_killed(cfg)
    record = run(cfg)
    assert (record.peak_host_bytes, record.peak_device_bytes >= 1) == (2**50, True)
    seconds = record.seconds
    assert seconds["prune"] > 3600 and seconds["total"] > seconds["prune"] + seconds["calibration"]
    assert seconds["evaluation"] + seconds["dense_evaluation"] < 3600, "what was lost does not count"


def test_texts_measured_before_a_kill_are_not_measured_again(tiny_config, small_text, monkeypatch):
    extra = f"+evaluation.datasets.more.path={small_text}"
    whole = run(tiny_config(extra, "pruner=wanda"))
    cfg = tiny_config(extra, "pruner=wanda", "seed=1")
    with monkeypatch.context() as patch:
        patch.setattr(Perplexity, "measure", KillAtCall(2, Perplexity.measure))  # the second text, pruned
        run_until_killed(cfg)
    titles = watch_measurements(monkeypatch)
    assert run(cfg).metrics.keys() == whole.metrics.keys() == {"text_perplexity", "more_perplexity"}
    assert len(titles) == 1


def test_a_dense_record_made_while_resuming_is_of_the_dense_model(tiny_config, tmp_path, monkeypatch):
    cfg = tiny_config("pruner=wanda", "sparsity=2:4", "runtime.resume=true")
    run(tiny_config("sparsity=dense"))
    [dense] = tmp_path.glob("outputs/*/dense/*/result.json")
    before = json.loads(dense.read_text())
    dense.unlink()
    with monkeypatch.context() as patch:
        in_evaluation(patch)
        run_until_killed(cfg)
    assert not dense.exists()
    run(cfg)
    after = json.loads(dense.read_text())
    for key in ("metrics", "linear_sparsity", "model_sparsity"):
        assert after[key] == before[key]
    assert after["linear_sparsity"] < 0.01
    assert after["peak_host_bytes"] is None, "that of the pruning run says nothing of it"


@pytest.mark.parametrize("runtime", ["cpu", "low_memory"])
def test_a_dense_model_that_another_process_failed_to_measure(runtime, tiny_config, undisturbed, tmp_path, monkeypatch):
    expected = run(tiny_config("pruner=wanda", undisturbed))
    locked = nnprune.experiment.job.locked

    hours = [0]
    late = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 3600 * hours[0])
    monkeypatch.setattr(nnprune.engine.stopwatch, "time", late)

    @contextmanager
    def busy(folder, wait=True):
        if wait:
            hours[0] = 1  # until the other process has failed
            with locked(folder):
                yield True
        else:
            yield False

    monkeypatch.setattr(nnprune.experiment.job, "locked", busy)
    record = run(tiny_config("pruner=wanda", f"runtime={runtime}"))
    assert record.metrics == expected.metrics
    assert record.dense_metrics == expected.dense_metrics
    assert hours == [1] and record.seconds["total"] < 3600, "waiting takes no time"
    [dense] = tmp_path.glob("outputs/*/dense/*/result.json")
    assert json.loads(dense.read_text())["metrics"] == record.dense_metrics


def later_layer_by_layer(monkeypatch, seconds):
    """Let time pass by so many seconds between the calls of the clock of the layer files: when they are opened, and at each layer."""
    clock = partial(next, itertools.count(step=seconds))
    monkeypatch.setattr(nnprune.experiment.preparation, "LayerFiles", partial(LayerFiles, clock=clock))


@pytest.mark.parametrize(
    ("resume", "seconds", "finished"), [("auto", 10, 0), ("auto", 31, 2), ("auto", 61, 2), ("false", 1e6, 0)]
)
def test_layers_are_written_once_a_minute_would_be_lost(
    resume, seconds, finished, tiny_config, undisturbed, tmp_path, monkeypatch, caplog
):
    whole = run(tiny_config("pruner=sparsegpt", undisturbed))
    cfg = tiny_config("pruner=sparsegpt", f"runtime.resume={resume}")
    with monkeypatch.context() as patch:
        later_layer_by_layer(patch, seconds)
        in_evaluation(patch)
        run_until_killed(cfg)
    assert len(list(tmp_path.glob("outputs/**/unfinished/layer-*"))) == 2 * finished
    resumed = run(cfg)
    assert ("resuming after 2 finished decoder layers" in caplog.text) == bool(finished)
    assert resumed.metrics == whole.metrics
    assert stripped(resumed.per_linear) == stripped(whole.per_linear)


@pytest.mark.parametrize("setting", ["save=true", "runtime.layers=disk"])
def test_where_files_are_the_model_each_layer_is_written(setting, tiny_config, undisturbed, tmp_path, monkeypatch, caplog):
    whole = run(tiny_config("pruner=sparsegpt", undisturbed))
    cfg = tiny_config("pruner=sparsegpt", setting, "runtime.resume=false")
    with monkeypatch.context() as patch:
        at_second_layer(patch)
        run_until_killed(cfg)
    assert len(list(tmp_path.glob("outputs/**/unfinished/layer-*.json"))) == 1
    assert run(cfg).metrics == whole.metrics
    assert "resuming after 1 finished decoder layers" in caplog.text


JOURNALS = ("allocation.json", "pruned_metrics.json", "dense_metrics.json")
DAMAGED = [
    *(("layer-0000.safetensors", damage) for damage in (cut, flip, remove, swap)),
    *(("layer-0000.json", damage) for damage in (cut, flip, swap)),
    *((name, damage) for name in JOURNALS for damage in (cut, flip)),
]


@pytest.fixture(scope="module")
def stopped(tiny_model_dir, small_text, tmp_path_factory):
    """The config of some outputs, the record of an undisturbed run, and the outputs of one that stopped at the last of its two texts."""
    folder, measured, measure = tmp_path_factory.mktemp("stopped"), [], Perplexity.measure

    def make(outputs):
        return compose_config(
            *("model=local", f"model.path={tiny_model_dir}", "calibration=text", f"calibration.path={small_text}"),
            *("calibration.num_samples=6", "calibration.seq_len=32", "evaluation=text", f"evaluation.path={small_text}"),
            *(
                "evaluation.seq_len=32",
                "evaluation.max_windows=3",
                "runtime.batch_tokens=128",
                "runtime.device=cpu",
                f"outputs={outputs}",
            ),
            *("runtime.resume=true", "pruner=sparsegpt", "allocation=owl", f"+evaluation.datasets.more.path={small_text}"),
        )

    def stop_at_fourth(self, *arguments):
        measured.append(self)
        if len(measured) == 4:  # both texts of the dense model, the second of the pruned one
            raise RuntimeError("stopped")
        return measure(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(Perplexity, "measure", stop_at_fourth)
        run(make(folder / "stopped"))
    return make, run(make(folder / "whole")), folder / "stopped"


@pytest.mark.parametrize(("name", "damage"), DAMAGED, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_damaged_is_done_again_with_one_line_to_the_same_figures(name, damage, stopped, tmp_path, caplog):
    make, whole, outputs = stopped
    shutil.copytree(outputs, tmp_path / "outputs")
    [path] = (tmp_path / "outputs").rglob(f"unfinished/{name}")
    damage(path)
    resumed = run(make(tmp_path / "outputs"))
    assert len([message for message in caplog.messages if message.startswith("warning: ")]) == 1
    assert resumed.metrics == whole.metrics
    assert resumed.dense_metrics == whole.dense_metrics
    assert stripped(resumed.per_linear) == stripped(whole.per_linear)
    assert not list((tmp_path / "outputs").rglob("unfinished"))
