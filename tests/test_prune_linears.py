"""The linears of a layer, when a factorisation fails or the device runs out of memory."""

import logging

import pytest
import torch
from support.engine import IDS, engine_of, prune, prune_model
from support.families import FAMILIES

from nnprune.method import Method
from nnprune.patterns import NM
from nnprune.pruners.alps import ALPS
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.statistics import Hessian
from nnprune.updates import Refit


def prune_llama(folder, method):
    """The reports of the first layer's linears, by their last name, and the layers whose files were written."""
    engine = engine_of(FAMILIES["llama"](), folder, batch_tokens=80)
    plan = dict.fromkeys(engine.decoder.shapes(), NM(2, 4))
    try:
        reports = prune(engine, method, plan, IDS)
    finally:
        prune_llama.written = sorted(engine.store.layer_files.reports)
    return {linear["name"].rsplit(".")[-1]: linear for linear in reports[0]["linears"]}


def make_indefinite(monkeypatch, by, width=64):
    """Add `by` times the mean diagonal to the smallest eigenvalue of Hessians of this width: those of down_proj."""
    mean = Hessian.mean

    def changed(self):
        hessian = mean(self)
        if len(hessian) == width:
            values, vectors = torch.linalg.eigh(hessian)
            hessian += (by * hessian.diagonal().mean() - values[0]) * torch.outer(vectors[:, 0], vectors[:, 0])
        return hessian

    monkeypatch.setattr(Hessian, "mean", changed)


@pytest.mark.parametrize("update", [None, Refit(damping=1.0)])
def test_a_factorisation_that_fails_is_damped_more_and_the_others_are_not(update, tmp_path, monkeypatch):
    make_indefinite(monkeypatch, -0.05)
    method = Method(SparseGPT(), update=update) if update else Method(SparseGPT())
    linears = prune_llama(tmp_path, method)
    assert {name for name, linear in linears.items() if "damping" in linear} == {"down_proj"}
    assert linears["down_proj"]["damping"] == 0.1
    assert all(0 < linear["relative_error"] < 1 for linear in linears.values())


@pytest.mark.parametrize("pruner", [SparseGPT(), ALPS()])
def test_one_that_no_damping_mends_is_named_before_the_layer_is_written(pruner, tmp_path, monkeypatch):
    make_indefinite(monkeypatch, -60)
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.down_proj: its hessian from 80 tokens could not be factorised"):
        prune_llama(tmp_path, pruner)
    assert prune_llama.written == []


def test_a_weight_that_is_not_finite_is_named_before_the_inputs_that_it_spoils(tmp_path):
    model = FAMILIES["llama"]()
    model.model.layers[1].self_attn.k_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"^model.layers.1.self_attn.k_proj: its weight holds NaN"):
        prune_model(tmp_path, model=model)


@pytest.mark.parametrize("wrong", [lambda W: W, lambda W: W * torch.nan])
def test_a_pruner_that_breaks_its_promise_is_named_before_the_layer_is_written(wrong, tmp_path):
    class Wrong(SparseGPT):
        def prune_group(self, weights, patterns):
            found = super().prune_group(weights, patterns)
            return {name: wrong(weights[name]) if name.endswith("v_proj") else W for name, W in found.items()}

    with pytest.raises(ValueError, match=r"^model.layers.0.self_attn.v_proj: (the weight that Wrong|Wrong) returned "):
        prune_llama(tmp_path, Wrong())
    assert prune_llama.written == []


def test_notes_are_numbers(tmp_path):
    for linear in prune_llama(tmp_path, Method(SparseGPT(), update=Refit())).values():
        assert type(linear["refit_steps"]) is int and type(linear["refit_residual"]) is float


def test_out_of_memory_linears_are_pruned_one_by_one_from_then_on(tmp_path, monkeypatch, caplog):
    wanted, _ = prune_model(tmp_path / "a", method=SparseGPT())
    asked = []

    class Large(SparseGPT):
        def prune_group(self, weights, patterns):
            asked.append(len(weights))
            if len(weights) > 1:
                raise torch.OutOfMemoryError
            return super().prune_group(weights, patterns)

    with caplog.at_level(logging.WARNING):
        found, _ = prune_model(tmp_path / "b", method=Large())
    assert asked == [3] + [1] * 21
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and "one linear at a time" in warned[0]
    for name, weight in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], weight)


def test_one_linear_for_which_there_is_no_memory_ends_the_run(tmp_path):
    class Larger(SparseGPT):
        def prune_group(self, weights, patterns):
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        prune_llama(tmp_path, Larger())
