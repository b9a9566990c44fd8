"""Allocations in whole runs: what the survey of the dense model shows, resuming, grids, plans of a run."""

import math
from pathlib import Path

import pytest
import torch
from support.engine import engine_of, random_ids
from support.families import FAMILIES
from support.presets import MEASURED
from support.runs import BRIEF, patterns_of, refuse, stripped

import nnprune.engine.importance_pass
import nnprune.experiment.plans
import nnprune.model.checkpoint
from nnprune.allocations.base import mean
from nnprune.allocations.owl import OWL
from nnprune.experiment.build import build
from nnprune.model.loading import ModelSource
from nnprune.model.weight_views import WeightView
from nnprune.patterns import NM
from nnprune.records import read_all, read_journal
from nnprune.run import run, run_grid, show_estimate


class Look(OWL):
    """Remembers what it is shown."""

    def measure(self, layer, pattern):
        self.__dict__.setdefault("seen", []).append(layer)
        return 1.0


@torch.no_grad()
def test_the_survey_shows_the_dense_model(tmp_path):
    ids, look = random_ids(rows=5, seq_len=16), Look()
    model, names, expected = FAMILIES["opt"](), [], {}
    for name, linear in model.named_modules():
        if "layers." in name and isinstance(linear, torch.nn.Linear):
            names.append(name)
            linear.register_forward_pre_hook(
                lambda _, args, name=name: expected.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
            )
    model(ids)
    for linear in model.modules():
        linear._forward_pre_hooks.clear()
    engine = engine_of(model, tmp_path, batch_tokens=32, activations="disk")
    nnprune.engine.importance_pass.run_importance_pass(engine, ids, {"look": lambda layer: look.measure(layer, None)})
    assert [name for layer in look.seen for name in layer.weights] == names
    for layer in look.seen:
        for name, W in layer.weights.items():
            assert torch.equal(W, WeightView(model.get_submodule(name)).read())
            X = expected[name]
            torch.testing.assert_close(layer.squared_norms[name], X.square().mean(0))
            torch.testing.assert_close(layer.samples[name], X)
            torch.testing.assert_close(layer.score(name), W.abs() * X.square().mean(0).sqrt())
    assert not list(tmp_path.glob("activations*"))
    look.seen.clear()
    nnprune.engine.importance_pass.run_importance_pass(engine, None, {"look": lambda layer: look.measure(layer, None)})
    assert [name for layer in look.seen for name in layer.weights] == names
    assert not any(layer.samples for layer in look.seen)


@torch.no_grad()
def test_a_survey_refuses_what_is_not_finite(tmp_path):
    engine = engine_of(FAMILIES["opt"](), tmp_path)
    with pytest.raises(ValueError, match="of decoder layer 0 is nan"):
        nnprune.engine.importance_pass.run_importance_pass(engine, None, {"look": lambda layer: math.nan})
    engine.decoder.weights(1)["model.decoder.layers.1.fc1"].read()[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.1\.fc1: its weight holds NaN"):
        nnprune.engine.importance_pass.run_importance_pass(engine, None, {"look": lambda layer: 1.0})


def mean_of(record):
    sizes = [32 * 64 if "fc" in linear["name"] else 32 * 32 for linear in record.per_linear]
    return mean([pattern.sparsity for pattern in patterns_of(record).values()], sizes)


@pytest.mark.parametrize("name", MEASURED)
def test_end_to_end(name, tiny_config, caplog):
    record = run(tiny_config("pruner=wanda", "sparsity=0.6", f"allocation={name}"))
    assert mean_of(record) == pytest.approx(0.6, abs=1e-11)
    assert len(set(patterns_of(record).values())) == 2
    assert record.seconds["allocation"] > 0
    assert record.linear_sparsity == pytest.approx(0.6, abs=0.02)  # rows of 32 round up
    mixed = run(tiny_config("sparsity=4:8", f"allocation={name}", "runtime=low_memory", *BRIEF))
    assert {pattern.n for pattern in patterns_of(mixed).values()} == {3, 5}
    assert mixed.linear_sparsity == 0.5
    assert "sparsities from" in caplog.text


def test_where_layers_rest_does_not_change_the_plan(tiny_config, tmp_path):
    more = ("allocation=by_error", *BRIEF)
    low = run(tiny_config("runtime=low_memory", *more))
    assert stripped(run(tiny_config(f"outputs={tmp_path / 'host'}", *more)).per_linear) == stripped(low.per_linear)


def test_uniform_and_dense_are_not_surveyed(tiny_config, monkeypatch):
    monkeypatch.setattr(nnprune.experiment.plans, "run_importance_pass", refuse)
    record = run(tiny_config("sparsity=2:4", *BRIEF))
    assert set(patterns_of(record).values()) == {NM(2, 4)}
    assert "allocation" not in record.seconds
    run(tiny_config("sparsity=dense", "allocation=owl"))


def test_a_resumed_run_has_the_same_plan_without_a_survey(tiny_config, tmp_path, monkeypatch):
    whole = run(tiny_config("pruner=sparsegpt", "allocation=owl", f"outputs={tmp_path / 'whole'}"))
    cfg = tiny_config("pruner=sparsegpt", "allocation=owl", "runtime.resume=true")
    with monkeypatch.context() as patch:
        original, saved = nnprune.model.checkpoint.save_file, []

        def save_file(state, path, **options):
            if saved:
                raise RuntimeError("cut")
            saved.append(path)
            original(state, path, **options)

        patch.setattr(nnprune.model.checkpoint, "save_file", save_file)
        with pytest.raises(RuntimeError, match="cut"):
            run(cfg)
    scratch = build(cfg).folder / "unfinished"
    assert (scratch / "layer-0000.json").exists()
    assert len(read_journal(scratch / "allocation.json")["OWL(threshold=5.0, strength=0.08)"]) == 2
    monkeypatch.setattr(nnprune.experiment.plans, "run_importance_pass", refuse)
    resumed = run(cfg)
    assert resumed.metrics == whole.metrics
    assert stripped(resumed.per_linear) == stripped(whole.per_linear)
    assert not scratch.exists()


def test_cells_of_a_grid_share_one_survey(tiny_config, tmp_path, monkeypatch):
    cells = [("magnitude", "0.6"), ("wanda", "0.6"), ("magnitude", "4:8")]

    def configs(*more):
        cell = ("allocation=by_error", "propagate=dense", "evaluation.max_windows=1", *more)
        return [tiny_config(f"pruner={pruner}", f"sparsity={sparsity}", *cell) for pruner, sparsity in cells]

    separate = [run(cfg) for cfg in configs(f"outputs={tmp_path / 'separate'}")]
    asked, original = [], nnprune.experiment.plans.run_importance_pass
    monkeypatch.setattr(nnprune.experiment.plans, "run_importance_pass", lambda *a: asked.append(list(a[2])) or original(*a))
    together = run_grid(configs())
    assert asked == [["ByError(strength=0.08) at 0.6", "ByError(strength=0.08) at 4:8"]]
    for one, other in zip(separate, together, strict=True):
        assert patterns_of(one) == patterns_of(other)
        assert one.linear_sparsity == other.linear_sparsity


def test_a_pattern_that_does_not_fit_leaves_the_other_cells_of_a_grid_alone(tiny_config):
    cfgs = [tiny_config("pruner=wanda", f"sparsity={spec}", "propagate=dense", "allocation=owl") for spec in ("1:5", "0.5")]
    with pytest.raises(ValueError, match=r"sparsity=1:5: .* has 32 inputs"):
        run_grid(cfgs)
    records = {record["sparsity"]: record["status"] for record in read_all(Path(cfgs[0].outputs))[0]}
    assert records == {"1:5": "failed", "0.5": "completed", "dense": "completed"}


@pytest.mark.parametrize("name", MEASURED)
def test_a_plan_of_a_run_tells_of_the_survey(name, tiny_config, caplog, monkeypatch):
    monkeypatch.setattr(ModelSource, "checkpoint", refuse)
    caplog.set_level("INFO")
    show_estimate([tiny_config(f"allocation={name}")])
    assert "\nallocation " in "\n" + "\n".join(caplog.messages)
