"""The program from outside: one run, sweeps, skipping, failing, and kill -9 at any moment."""

import json
import multiprocessing
import os
import signal
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from conftest import HANGS, ROOT, compose_config
from omegaconf import OmegaConf
from safetensors.torch import save_file

import nnprune.experiment.job
import nnprune.model.checkpoint
import nnprune.records
from nnprune.evaluation import Perplexity
from nnprune.experiment.command_line import rewrite_sparsity
from nnprune.experiment.measurement import Measurement
from nnprune.run import CONF, run

TINY_DEMO = ["calibration.num_samples=4", "calibration.seq_len=64", "evaluation.seq_len=64", "evaluation.max_windows=4"]


def records_in(folder):
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("result.json")}


def test_sweep_skip_and_failure_from_the_command_line(run_cli, tmp_path):
    """Also from another folder, as an installed program would be used."""
    outputs = tmp_path / "records"
    sweep = ["-m", "pruner=magnitude,wanda", "sparsity=0.7,2:4,dense", f"outputs={outputs}", *TINY_DEMO]
    first = run_cli(*sweep, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    found = records_in(outputs)
    cells = {(record["pruner"], record["sparsity"]) for record in found.values()}
    assert cells == {(pruner, spec) for pruner in ("magnitude", "wanda") for spec in ("0.7", "2:4")} | {("dense", "dense")}
    dense = next(record for record in found.values() if record["pruner"] == "dense")
    for record in found.values():
        assert record["status"] == "completed"
        assert record["dense_metrics"] == dense["metrics"]
    assert "demo_perplexity" in first.stdout
    stamps = {path: path.stat().st_mtime_ns for path in outputs.rglob("result.json")}
    second = run_cli(*sweep, "sparsity=0.7,2:4,0.65,7:8,3:7", cwd=tmp_path)
    assert second.returncode == 1  # 7 divides no width of the demo
    assert second.stdout.count("finished already, nothing to do") == 4
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    found = records_in(outputs)
    assert {record["sparsity"] for record in found.values()} == {"0.7", "2:4", "dense", "0.65", "7:8", "3:7"}
    failed = [record for record in found.values() if record["status"] == "failed"]
    assert {record["sparsity"] for record in failed} == {"3:7"}
    assert all("does not divide" in record["error"] for record in failed)
    assert "Traceback" not in second.stderr
    assert "sparsity=3:7: " in second.stderr


def test_a_sweep_whose_outputs_cannot_be_written_says_so_in_one_line(run_cli, tmp_path):
    (tmp_path / "file").touch()
    result = run_cli("-m", "sparsity=0.5,2:4", f"outputs={tmp_path / 'file' / 'records'}")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "cannot be written (Not a directory); set outputs=DIR" in result.stderr


def test_readme_experiment_is_the_nine_cells_and_dense():
    params = OmegaConf.load(CONF / "experiment" / "readme_table.yaml").hydra.sweeper.params
    patterns = [OmegaConf.load(CONF / "sparsity" / f"{name}.yaml").pattern for name in params.sparsity.split(",")]
    assert patterns == ["dense", "0.5", "2:4", "4:8"]
    assert params.pruner.split(",") == ["magnitude", "wanda", "sparsegpt"]


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers_know_the_registered_sparsities(launcher, run_cli, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher", reason="needs the launcher's extra")
    outputs = tmp_path / "records"
    workers = "hydra.launcher.n_jobs=2" if launcher == "joblib" else f"hydra.launcher.timeout_min={HANGS // 60}"
    result = run_cli(
        "-m", f"hydra/launcher={launcher}", workers, "pruner=magnitude", "sparsity=0.65,3:4", f"outputs={outputs}", *TINY_DEMO
    )
    assert result.returncode == 0, result.stderr
    assert {record["sparsity"] for record in records_in(outputs).values()} == {"0.65", "3:4", "dense"}


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("sparsity=0.5", "sparsity=unstructured"),
        ("sparsity=2:4,4:8", "sparsity=2of4,4of8"),
        ("sparsity=0.7, 3:4", "sparsity=unstructured_0.7,3of4"),
        ("sparsity='2:4'", "sparsity=2of4"),
        ("sparsity=0", "sparsity=dense"),
        ("sparsity=2of4,dense", "sparsity=2of4,dense"),
        ("sparsity=choice(2of4,dense)", "sparsity=choice(2of4,dense)"),
        ("sparsity.pattern=0.7", "sparsity.pattern=0.7"),
        ("+sparsity=0.5", "+sparsity=0.5"),
        ("~sparsity", "~sparsity"),
        ("pruner=wanda", "pruner=wanda"),
    ],
)
def test_rewriting_of_sparsity(typed, expected):
    assert rewrite_sparsity([typed]) == [expected]


@pytest.mark.parametrize(("typed", "pattern"), [("0.7", "0.7"), ("3:4", "3:4"), ("5e-1", "5e-1"), (".25", ".25"), ("50", "50")])
def test_rewritten_options_compose(typed, pattern):
    assert compose_config(f"sparsity={typed}").sparsity.pattern == pattern


@pytest.mark.parametrize("group", [path.name for path in CONF.iterdir() if path.is_dir()])
def test_every_option_composes(group):
    for path in (CONF / group).glob("*.yaml"):
        cfg = compose_config(f"{group}={path.stem}")
        OmegaConf.to_container(cfg, resolve=True)
        if group == "model" and path.stem != "demo":
            assert cfg.calibration.dataset == "allenai/c4"
            assert list(cfg.evaluation.datasets) == ["wikitext2"]


def test_several_evaluations_at_once():
    cfg = compose_config("evaluation=[wikitext2,c4,ptb,demo]")
    assert list(cfg.evaluation.datasets) == ["wikitext2", "c4", "ptb", "demo"]
    cfg = compose_config("model=opt-125m", "evaluation=[wikitext2,c4]")
    assert list(cfg.evaluation.datasets) == ["wikitext2", "c4"]


def test_the_record_tells_everything(tiny_config):
    record = run(tiny_config("pruner=sparsegpt", "sparsity=2:4", "label=mine"))
    [path] = ROOT.__class__(tiny_config().outputs).glob("tiny-opt/2of4/mine-*/result.json")
    assert path.parent.name == f"mine-{record.fingerprint}"
    content = json.loads(path.read_text())
    assert content["schema_version"] == 1
    assert (content["model"], content["pruner"], content["sparsity"]) == ("tiny-opt", "mine", "2:4")
    assert content["metrics"].keys() == content["dense_metrics"].keys() == {"text_perplexity"}
    assert content["linear_sparsity"] == 0.5
    assert 0 < content["model_sparsity"] < 0.5
    assert len(content["per_linear"]) == 12
    assert {"data", "load", "prune", "evaluation", "total"} <= content["seconds"].keys()
    assert content["peak_host_bytes"] > 1e7
    assert content["versions"]["torch"] == torch.__version__
    assert len(content["calibration_hash"]) == len(content["evaluation_hashes"]["text"]) == 16
    assert content["config"]["calibration"]["num_samples"] == 6
    assert not (path.parent / "unfinished").exists(), "files of layers are left behind"
    assert "layer 2/2" in (path.parent / "run.log").read_text()


def test_pruning_hurts_and_sequential_differs(tiny_config):
    by_mode = {mode: run(tiny_config(f"propagate={mode}", "sparsity=0.7")) for mode in ("pruned", "dense", "sequential")}
    assert len({record.metrics["text_perplexity"] for record in by_mode.values()}) == 3
    assert len({record.fingerprint for record in by_mode.values()}) == 3


def watch_measurements(monkeypatch):
    """A list that grows with each measurement: "dense text", "pruned text"."""
    titles, finish = [], Measurement.finish

    def watched(self):
        titles.extend(f"{self.kind} {name}" for name in self._states)
        return finish(self)

    monkeypatch.setattr(Measurement, "finish", watched)
    return titles


def test_dense_perplexity_is_measured_once(tiny_config, monkeypatch):
    titles = watch_measurements(monkeypatch)
    for pruner in ("magnitude", "wanda"):
        run(tiny_config(f"pruner={pruner}"))
    run(tiny_config("sparsity=dense"))
    assert sum(title.startswith("dense") for title in titles) == 1
    assert sum(title.startswith("pruned") for title in titles) == 2


def test_overwrite_and_later_save(tiny_config, monkeypatch):
    first = run(tiny_config("pruner=wanda"))
    again = run(tiny_config("pruner=wanda", "save=true"))  # finished, but its model was not kept
    assert again.metrics == first.metrics
    stored = run(tiny_config("pruner=wanda", "save=true"))
    assert stored.finished == again.finished
    monkeypatch.setattr(Perplexity, "measure", lambda self, *_: {"text_perplexity": 7.0})
    assert run(tiny_config("pruner=wanda")).metrics == first.metrics
    assert run(tiny_config("pruner=wanda", "overwrite=true")).metrics == {"text_perplexity": 7.0}


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(cfg):
    process = multiprocessing.get_context("fork").Process(target=run, args=(cfg,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


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
def test_kill_9_loses_nothing_that_was_finished(moment, tiny_config, tmp_path, monkeypatch):
    whole = run(tiny_config("pruner=sparsegpt", f"outputs={tmp_path / 'whole'}"))
    cfg = tiny_config("pruner=sparsegpt")
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
    cfg = tiny_config("pruner=wanda", "sparsity=2:4")
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


@pytest.mark.parametrize("runtime", ["cpu", "low_memory"])
def test_a_dense_model_that_another_process_failed_to_measure(runtime, tiny_config, tmp_path, monkeypatch):
    expected = run(tiny_config("pruner=wanda", f"outputs={tmp_path / 'alone'}"))
    locked = nnprune.experiment.job.locked

    @contextmanager
    def busy(folder, wait=True):
        if wait:
            with locked(folder):
                yield True
        else:
            yield False

    monkeypatch.setattr(nnprune.experiment.job, "locked", busy)
    record = run(tiny_config("pruner=wanda", f"runtime={runtime}"))
    assert record.metrics == expected.metrics
    assert record.dense_metrics == expected.dense_metrics
    [dense] = tmp_path.glob("outputs/*/dense/*/result.json")
    assert json.loads(dense.read_text())["metrics"] == record.dense_metrics


def test_a_failed_run_of_a_sweep_does_not_keep_its_model(tiny_config, monkeypatch):
    import gc
    import weakref

    from nnprune.model.loading import ModelSource
    from nnprune.run import RunFailed, _main

    models = []
    load = ModelSource.load

    def watched(self, config):
        model = load(self, config)
        models.append(weakref.ref(model))
        return model

    def fail(*_):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(ModelSource, "load", watched)
    monkeypatch.setattr(Perplexity, "measure", fail)
    cfg = tiny_config("pruner=wanda", "label=mine")
    with pytest.raises(RunFailed) as kept:
        _main(cfg)
    gc.collect()
    assert "out of memory" in str(kept.value)
    assert models[0]() is None
