"""What a finished run is reused for: evaluations are added to its record, and other code of nnprune is reported."""

import json
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.runs import failure, refuse, watch_measurements

from nnprune.engine.pruning_pass import PruneTask
from nnprune.evaluation import Perplexity
from nnprune.experiment import identity, reuse
from nnprune.experiment.build import build
from nnprune.experiment.job import Job
from nnprune.model.loading import ModelSource
from nnprune.patterns import Unstructured
from nnprune.records import read, read_all
from nnprune.run import run, run_grid


def forbid_pruning(monkeypatch):
    monkeypatch.setattr(PruneTask, "__init__", refuse)


@pytest.fixture
def more(small_text):
    return f"+evaluation.datasets.more.path={small_text}", "+evaluation.datasets.more.max_windows=3"


@pytest.mark.parametrize("runtime", ["cpu", "low_memory"])
def test_an_evaluation_is_added_to_a_saved_run_without_pruning(runtime, tiny_config, more, tmp_path, monkeypatch):
    settings = ("pruner=sparsegpt", f"runtime={runtime}")
    whole = run(tiny_config(*settings, *more, f"outputs={tmp_path / 'whole'}"))
    first = run(tiny_config(*settings, "save=true"))
    forbid_pruning(monkeypatch)
    second = run(tiny_config(*settings, *more))
    assert second.metrics == whole.metrics
    assert second.dense_metrics == whole.dense_metrics
    assert second.per_linear == first.per_linear
    folder = build(tiny_config(*settings)).folder
    assert read(folder) == second
    assert json.loads((folder / "model" / "pruning.json").read_text())["metrics"] == second.metrics
    assert "more_perplexity" in (folder / "model" / "README.md").read_text()
    assert not (folder / "unfinished").exists()


def test_what_was_measured_stays_and_is_not_measured_again(tiny_config, more, monkeypatch):
    run(tiny_config("pruner=wanda", "save=true"))
    both = run(tiny_config("pruner=wanda", *more))
    titles = watch_measurements(monkeypatch)
    assert run(tiny_config("pruner=wanda")).metrics == both.metrics
    assert titles == []


def test_the_figure_shown_is_that_of_the_settings_asked_for_last(tiny_config):
    few, many = (("pruner=wanda", "save=true", f"evaluation.max_windows={number}") for number in (2, 5))
    first = run(tiny_config(*few)).metrics
    other = run(tiny_config(*many))
    assert other.metrics != first
    assert len(other.evaluations) == 2
    again = run(tiny_config(*few))
    assert again.metrics == first == read(build(tiny_config(*few)).folder).metrics
    assert again.dense_metrics != other.dense_metrics


def test_without_a_saved_model_a_run_starts_again_and_keeps_its_figures(tiny_config, more, small_text, caplog):
    first = run(tiny_config("pruner=wanda", "evaluation.max_windows=2"))
    second = run(tiny_config("pruner=wanda", *more, "evaluation.max_windows=5"))
    assert "more, text, and its model was not saved (save=true keeps it): running again" in caplog.text
    assert first.evaluations.keys() < second.evaluations.keys()
    assert first.metrics != second.metrics


def test_a_saved_model_that_was_edited_is_not_measured(tiny_config, more, caplog):
    cfg = tiny_config("pruner=wanda", "save=true")
    first = run(cfg)
    path = build(cfg).folder / "model" / "model.safetensors"
    for path in (build(cfg).folder / "model").glob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: tensor * 2 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    second = run(tiny_config("pruner=wanda", *more))
    assert "its saved model has changed: running again" in caplog.text
    assert second.metrics["text_perplexity"] == first.metrics["text_perplexity"]


def test_a_dense_record_gains_evaluations_of_its_own(tiny_config, more, monkeypatch):
    dense = run(tiny_config("sparsity=dense"))
    titles = watch_measurements(monkeypatch)
    record = run(tiny_config("pruner=wanda", *more))
    assert sum(title.startswith("dense") for title in titles) == 1, "only the new text"
    assert record.dense_metrics["text_perplexity"] == dense.metrics["text_perplexity"]
    assert run(tiny_config("sparsity=dense", *more)).metrics == record.dense_metrics
    assert len(titles) == 3


def test_a_dense_figure_of_other_tokens_is_measured_again(tiny_config, monkeypatch):
    dense = run(tiny_config("sparsity=dense"))
    [entry] = dense.evaluations.values()
    entry["tokens"], entry["metrics"] = "0" * 16, {"text_perplexity": 1.0}
    dense.write(build(tiny_config("sparsity=dense")).folder)
    assert run(tiny_config("pruner=wanda")).dense_metrics == dense.dense_metrics != {"text_perplexity": 1.0}


def test_a_saved_model_is_compared_with_the_dense_one_on_its_own_tokens(tiny_config):
    dense = run(tiny_config("sparsity=dense"))
    right = dict(dense.metrics)
    [entry] = dense.evaluations.values()
    entry["tokens"], entry["metrics"] = "0" * 16, {"text_perplexity": 1.0}
    dense.write(build(tiny_config("sparsity=dense")).folder)
    run(tiny_config("pruner=wanda", "save=true", "evaluation.max_windows=2"))
    assert run(tiny_config("pruner=wanda", "save=true")).dense_metrics == right


def test_a_grid_adds_evaluations_without_pruning(tiny_config, more, monkeypatch):
    settings = ("propagate=dense", "save=true")
    cells = [(f"pruner={name}", f"label={name}", *settings) for name in ("magnitude", "wanda")]
    run_grid([tiny_config(*cell) for cell in cells])
    forbid_pruning(monkeypatch)
    records = run_grid([tiny_config(*cell, *more) for cell in cells])
    assert all(record.metrics.keys() == {"text_perplexity", "more_perplexity"} for record in records)


def run_until_the_record(cfg, monkeypatch):
    """A run that stops when all layers are pruned and measured, before its record is written."""

    def stop(*_):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(Job, "_finish", stop)
        run(cfg)


def edit(monkeypatch, name):
    """Change the code of a file of nnprune, as far as records can tell."""
    known = identity._hash
    monkeypatch.setattr(identity, "_hash", lambda file: "edited" if file.name == name else known(file))


def test_a_finished_record_of_other_code_is_reported_in_one_line(tiny_config, caplog, monkeypatch):
    run(tiny_config("pruner=wanda"))
    run(tiny_config("pruner=wanda"))
    edit(monkeypatch, "sparsegpt.py")
    run(tiny_config("pruner=wanda"))
    assert "other code" not in caplog.text
    edit(monkeypatch, "wanda.py")
    run(tiny_config("pruner=wanda"))
    [line] = [record.getMessage() for record in caplog.records if "other code" in record.getMessage()]
    assert line.startswith("warning: other code made the record of this finished run (nnprune/pruners/wanda.py)")
    assert "overwrite=true" in line


def test_a_dense_record_is_of_no_method(tiny_config, caplog):
    run(tiny_config("pruner=wanda"))  # measures the dense model too
    run(tiny_config("pruner=sparsegpt", "sparsity=dense"))
    assert "finished already, nothing to do" in caplog.text
    assert "other code" not in caplog.text


def test_figures_of_a_model_that_other_code_pruned_are_not_kept(tiny_config, more, monkeypatch):
    first = run(tiny_config("pruner=wanda", "evaluation.max_windows=2"))
    edit(monkeypatch, "wanda.py")
    second = run(tiny_config("pruner=wanda", "evaluation.max_windows=5"))
    assert not first.evaluations.keys() & second.evaluations.keys()


def test_figures_of_a_model_pruned_with_other_packages_are_not_kept(tiny_config, monkeypatch):
    first = run(tiny_config("pruner=wanda", "evaluation.max_windows=2"))
    old = replace(first, versions=first.versions | {"torch": "2.0"})
    old.write(build(tiny_config("pruner=wanda")).folder)
    second = run(tiny_config("pruner=wanda", "evaluation.max_windows=5"))
    assert not first.evaluations.keys() & second.evaluations.keys()


def test_layers_that_other_code_pruned_are_not_resumed_from(tiny_config, caplog, monkeypatch):
    cfg = tiny_config("pruner=wanda", "runtime.resume=true")
    run_until_the_record(cfg, monkeypatch)
    layers = list((build(cfg).folder / "unfinished").glob("layer-*.safetensors"))
    assert len(layers) == 2
    times = {layer: layer.stat().st_mtime_ns for layer in layers}
    edit(monkeypatch, "wanda.py")
    run_until_the_record(cfg, monkeypatch)
    assert "other code made the layer files of this unfinished run (nnprune/pruners/wanda.py): starting afresh" in caplog.text
    assert all(layer.stat().st_mtime_ns != times[layer] for layer in layers)


def test_layers_that_another_torch_pruned_are_not_resumed_from(tiny_config, caplog, monkeypatch):
    cfg = tiny_config("pruner=wanda", "runtime.resume=true")
    run_until_the_record(cfg, monkeypatch)
    monkeypatch.setattr(reuse, "version", lambda package: metadata.version(package) + "+cu130")
    run_until_the_record(cfg, monkeypatch)
    assert "starting afresh" not in caplog.text
    monkeypatch.setattr(reuse, "version", lambda package: "9.0" if package == "torch" else metadata.version(package))
    run_until_the_record(cfg, monkeypatch)
    found = metadata.version("torch").partition("+")[0]
    assert f"other code made the layer files of this unfinished run (torch {found}): starting afresh" in caplog.text


def test_a_saved_model_is_the_source_of_the_same_name(tiny_config):
    experiment = build(tiny_config("pruner=wanda", "save=true", "model.name=mine"))
    run(tiny_config("pruner=wanda", "save=true", "model.name=mine"))
    source = experiment.saved_source()
    assert isinstance(source, ModelSource)
    assert (source.name, source.commit, source.digest()) == ("mine", None, read(experiment.folder).saved_hash)
    assert experiment.pattern == Unstructured(0.5)
    shutil.rmtree(experiment.folder)


def test_an_interrupted_overwrite_resumes(tiny_config, monkeypatch, caplog):
    run(tiny_config("pruner=wanda"))
    cfg = tiny_config("pruner=wanda", "overwrite=true", "runtime.resume=true")
    run_until_the_record(cfg, monkeypatch)
    layers = {path: path.stat().st_mtime_ns for path in (build(cfg).folder / "unfinished").glob("layer-*")}
    caplog.set_level("INFO", "nnprune")
    run(tiny_config("pruner=wanda"))
    assert "a run of it with overwrite=true was interrupted; the same command continues it" in caplog.text
    run_until_the_record(cfg, monkeypatch)
    assert layers and all(path.stat().st_mtime_ns == time for path, time in layers.items())
    run(cfg)
    assert not (build(cfg).folder / "unfinished").exists()


@pytest.mark.parametrize("settings", [("sparsity=dense",), ("pruner=wanda",), ("pruner=wanda", "runtime=low_memory")])
def test_a_model_that_is_replaced_during_a_run_is_refused(settings, tiny_config, tiny_model_dir, tmp_path, monkeypatch):
    model = shutil.copytree(tiny_model_dir, tmp_path / "latest")
    cfg = tiny_config(*settings, f"model.path={model}")
    measure = Perplexity.measure

    def replace(*args):
        content = (model / "config.json").read_text()
        (model / "config.json").write_text(content.replace('"dropout": 0.1', '"dropout": 0.2'))
        return measure(*args)

    monkeypatch.setattr(Perplexity, "measure", replace)
    message = failure(cfg)
    assert message.startswith(f"model.path={model}: its files have changed during the run")
    assert not list(Path(cfg.outputs).rglob("layer-*"))
    assert [record["status"] for record in read_all(cfg.outputs)[0]] == ["failed"], "nor is there a dense record"
