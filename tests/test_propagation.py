"""The reference beside the calibration: what targets compare, and what layers are tuned towards."""

import pytest
import torch
from support.engine import ATOL, IDS, Failing, Interrupted, engine_of, expected_inputs, prune, prune_model, recover
from support.families import FAMILIES

from nnprune.method import Method
from nnprune.model.decoder import Decoder, run_layer
from nnprune.patterns import NM
from nnprune.pruners.alps import ALPS
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda
from nnprune.recovery import Reconstruction
from nnprune.run import run
from nnprune.statistics import CrossProduct, Hessian
from nnprune.targets import Asymmetric
from nnprune.updates import Refit

MODES = ["pruned", "sequential"]


class Witness(Asymmetric):
    """An asymmetric target that remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def weights(self, dense, statistics):
        self.seen |= {name: {kind: statistic.mean().cpu() for kind, statistic in statistics.items()} for name in dense}
        return super().weights(dense, statistics)


@pytest.mark.parametrize("propagate", MODES)
@torch.no_grad()
def test_what_a_target_compares(propagate, tmp_path, device):
    dense, witness = FAMILIES["llama"]().state_dict(), Witness()
    model, _ = prune_model(tmp_path, method=Method(Wanda(), witness), propagate=propagate, batch_tokens=32, device=device)
    X_dense = expected_inputs(dense, model.state_dict(), "dense")
    for name, X in expected_inputs(dense, model.state_dict(), propagate).items():
        seen = witness.seen[name]
        torch.testing.assert_close(seen[Hessian], X.T @ X / len(X), rtol=1e-4, atol=ATOL[device])
        torch.testing.assert_close(seen[CrossProduct], X_dense[name].T @ X / len(X), rtol=1e-4, atol=ATOL[device])


@pytest.mark.parametrize("propagate", MODES)
@pytest.mark.parametrize("layers", ["host", "disk"])
def test_behind_a_tuned_layer_inputs_are_compared_within_it(layers, propagate, tiny_config, monkeypatch, device):
    """Behind `before`, X_dense are the tuned layer's own inputs: in `pruned` propagation the same as X."""
    seen, repair = [], Asymmetric._correction
    monkeypatch.setattr(Asymmetric, "_correction", lambda self, found, name: seen.append(found) or repair(self, found, name))
    settings = [
        "pruner=wanda",
        "sparsity=2:4",
        "target=asymmetric",
        "recover=next_layer",
        "recover.epochs_before=1",
        "update.bias=false",
    ]
    record = run(tiny_config(*settings, f"propagate={propagate}", f"runtime.layers={layers}"))
    assert len(seen) == 8  # two layers of four groups
    assert record.metrics["text_perplexity"] > 0
    if propagate == "pruned":
        for found in seen:
            torch.testing.assert_close(found[CrossProduct].mean(), found[Hessian].mean(), rtol=1e-4, atol=1e-5)


def outputs(model, index, hidden):
    """What decoder layer `index` makes of hidden states."""
    decoder = Decoder(model)
    calls = decoder.record_calls(torch.zeros(hidden.shape[:2], dtype=torch.int64))
    return run_layer(decoder.layers[index], hidden, calls[index])


@torch.no_grad()
def test_a_tuned_layer_is_nearer_to_the_dense_one_and_keeps_its_zeros(tmp_path, device):
    plain, _ = prune_model(tmp_path / "a", propagate="pruned", device=device)
    tuned, reports = prune_model(
        tmp_path / "b", method=Method(SparseGPT(), recovery=recover(0, 30, lr=3e-3)), propagate="pruned", device=device
    )
    dense = FAMILIES["llama"]()
    hidden = Decoder(dense).embed(IDS)
    wanted = outputs(dense, 0, hidden)
    errors = [(outputs(model, 0, hidden) - wanted).square().sum() for model in (plain, tuned)]
    assert errors[1] < 0.9 * errors[0]
    for report in reports:
        after = report["recovered"]["after"]
        assert after["epoch"] > 0 and after["loss_after"] < after["loss_before"]
    for linear in Decoder(tuned).weights(0).values():
        NM(2, 4).check(linear.read())
    for linear, other in zip(*(Decoder(model).weights(0).values() for model in (plain, tuned)), strict=True):
        assert torch.equal(linear.read() != 0, other.read() != 0)  # the same mask: inputs of layer 0 are the same


def test_the_next_layer_takes_up_the_errors_of_those_before_it(tmp_path, device):
    _, reports = prune_model(
        tmp_path, method=Method(SparseGPT(), recovery=recover(8, 0, lr=1e-3)), propagate="pruned", device=device
    )
    assert reports[0]["recovered"]["before"] == {"loss_before": 0, "loss_after": 0, "epoch": 0, "attempts": 1}
    for report in reports[1:]:
        before = report["recovered"]["before"]
        assert before["loss_after"] < before["loss_before"]


def test_epochs_that_only_do_harm_change_nothing(tmp_path, device):
    wild = Reconstruction(0, 2, lr=1e3, batch_tokens=32)
    plain, _ = prune_model(tmp_path / "a", method=Method(Wanda()), device=device)
    tuned, reports = prune_model(tmp_path / "b", method=Method(Wanda(), recovery=wild), device=device)
    found = [report["recovered"]["after"] for report in reports]
    assert all((after["epoch"], after["attempts"]) == (0, 2) for after in found)
    for (name, one), two in zip(plain.state_dict().items(), tuned.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


METHODS = {
    "refit": lambda pruner: Method(pruner, update=Refit()),
    "asymmetric": lambda pruner: Method(pruner, target=Asymmetric()),
    "layer": lambda pruner: Method(pruner, recovery=recover(0, 1)),
    "next_layer": lambda pruner: Method(pruner, recovery=recover(1, 0)),
    "all": lambda pruner: Method(pruner, Asymmetric(), Refit(), recover(1, 1)),
}


@pytest.mark.parametrize("propagate", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_to_the_same_weights(method, propagate, tmp_path, device):
    make, options = METHODS[method], {"propagate": propagate, "batch_tokens": 32, "device": device}
    whole, _ = prune_model(tmp_path / "whole", method=make(Wanda()), **options)
    with pytest.raises(Interrupted):
        prune_model(tmp_path / "cut", method=make(Failing("model.layers.1.mlp.down_proj")), **options)
    resumed, _ = prune_model(tmp_path / "cut", method=make(Wanda()), **options)
    for (name, one), two in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        if device == "cuda" and method in (
            "layer",
            "next_layer",
            "all",
        ):  # gradients of attention are summed in any order there
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)
        else:
            assert torch.equal(one, two), name


CASES = [
    *((family, "sequential") for family in FAMILIES),
    *((family, "pruned") for family in ("opt", "gemma3", "gpt_neox", "gptj")),
]


@pytest.mark.parametrize(("family", "propagate"), CASES)
def test_every_family_takes_everything_at_once(family, propagate, tmp_path, device):
    model = FAMILIES[family]()
    engine = engine_of(model, tmp_path, device)
    plan = dict.fromkeys(engine.decoder.shapes(), NM(2, 4))
    prune(engine, Method(ALPS(), Asymmetric(), Refit(), recover(1, 1)), plan, IDS, propagate)
    for index in range(engine.num_layers):
        for linear in engine.decoder.weights(index).values():
            assert linear.read().isfinite().all()
    with torch.no_grad():
        assert model.cpu()(IDS).logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype, tiny_config, device):
    settings = ["pruner=alps", "sparsity=2:4", "target=asymmetric", "update=refit", "recover=layer", f"model.dtype={dtype}"]
    record = run(tiny_config(*settings))
    assert record.metrics["text_perplexity"] > 0
    assert [layer["after"]["epoch"] in range(5) for layer in record.recovered] == [True, True]


@pytest.mark.parametrize("setting", ["target=asymmetric", "recover=next_layer"])
def test_dense_propagation_has_nothing_to_compare(setting, tiny_config):
    with pytest.raises(ValueError, match="propagate=dense: leaves nothing for"):
        run(tiny_config(setting, "propagate=dense"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs_before": 0, "epochs_after": 0}, "recover.epochs_after=0: nothing to do"),
        ({"epochs_before": 1, "epochs_after": -1}, "recover.epochs_after=-1: must be a whole number"),
        ({"epochs_before": 1, "epochs_after": 0, "lr": 0}, "recover.lr=0: must be a number greater than 0"),
        ({"epochs_before": 1, "epochs_after": 0, "holdout": 1.0}, "recover.holdout=1.0: must be a number .* less than 1"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Reconstruction(**options)


def test_one_sequence_cannot_be_tuned_on_and_held_out(tiny_config):
    with pytest.raises(ValueError, match=r"calibration\.num_samples=1: recover needs one sequence"):
        run(tiny_config("recover=layer", "calibration.num_samples=1"))
