"""One run: its record, what it measures, overwriting, failing."""

import json

import pytest
import torch
from conftest import ROOT
from support.runs import watch_measurements

from nnprune.evaluation import Perplexity
from nnprune.run import run


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


def test_a_failed_run_of_a_sweep_does_not_keep_its_model(tiny_config, monkeypatch):
    import gc
    import weakref

    from nnprune.experiment import command_line
    from nnprune.model.loading import ModelSource
    from nnprune.run import RunFailed, _main

    models = []
    skeleton = ModelSource.skeleton

    def watched(self, config):
        model = skeleton(self, config)
        models.append(weakref.ref(model))
        return model

    def fail(*_):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr(command_line, "failures", None)  # as in a process that did not go through `main`
    monkeypatch.setattr(ModelSource, "skeleton", watched)
    monkeypatch.setattr(Perplexity, "measure", fail)
    cfg = tiny_config("pruner=wanda", "label=mine")
    with pytest.raises(RunFailed) as kept:
        _main(cfg)
    gc.collect()
    assert "out of memory" in str(kept.value)
    assert models and all(model() is None for model in models)


def test_code_that_is_in_no_file_is_never_reused(tiny_config, caplog):
    from nnprune.pruners.magnitude import Magnitude

    namespace = {"__name__": "__main__"}
    exec("class Typed(Base):\n    pass", namespace | {"Base": Magnitude}, namespace)
    first, second = (run(tiny_config("label=typed"), namespace["Typed"]()) for _ in range(2))
    assert first.fingerprint != second.fingerprint
    assert first.metrics == second.metrics
    assert "the code of Typed is in no file" in caplog.text
