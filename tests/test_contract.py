"""What every pruner promises, for every file in conf/pruner, found by glob: a new one is tested by being there."""

import pytest
import torch
from conftest import compose_config
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from support.presets import NAMES, make_pruner, supported

from nnprune.patterns import NM, Unstructured, parse_pattern
from nnprune.pruners.base import Pruner
from nnprune.statistics import CrossProduct, Hessian

PATTERNS = ["0.5", "0.7", "0.05", "2:4", "4:8", "1:4", "3:4", "2:3"]


def layer(rows: int, columns: int, tokens: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (rows, columns) and correlated inputs (3, tokens, columns), two of them dead."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    X = torch.randn(3, tokens, columns, generator=generator) @ mixing
    X[..., [1, columns // 2]] = 0
    return W, X


CASES = [(name, spec) for name in NAMES for spec in PATTERNS if supported(name, spec)]


def prune(name: str, W: torch.Tensor, X: torch.Tensor, spec: str) -> torch.Tensor:
    pruner = make_pruner(name)
    pruner.add_linear_activations("l", X)
    return pruner.prune_linear(W, "l", parse_pattern(spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "spec"), CASES)
def test_contract(name, spec, dtype, device):
    W, X = layer(24, 216)  # 216 is a multiple of 3, 4 and 8, and of no column block
    W, X = W.to(device, dtype), X.to(device, dtype)
    before = W.clone()
    pruned = prune(name, W, X, spec)
    assert torch.equal(W, before), "the weight was modified in place"
    assert (pruned.shape, pruned.dtype, pruned.device) == (W.shape, W.dtype, W.device)
    assert pruned.isfinite().all()
    parse_pattern(spec).check(pruned)
    assert torch.equal(pruned, prune(name, W, X, spec)), "not deterministic"
    zeros = 1 - pruned.count_nonzero() / pruned.numel()
    slack = 0.15 if make_pruner(name).quantization else 0.02  # small weights round to zero
    assert zeros <= parse_pattern(spec).sparsity + slack, "far more zeros than asked for"


@pytest.mark.parametrize("name", NAMES)
def test_the_two_calls_by_count_give_the_same(name, device):
    W, X = (tensor.to(device) for tensor in layer(16, 128))
    pruner = make_pruner(name)
    pruner.add_linear_activations("l", X)
    assert torch.equal(pruner.prune_linear_nm(W, "l", 2, 4), pruner.prune_linear(W, "l", NM(2, 4)))
    by_count = pruner.prune_linear_unstruct(W, "l", 1024)
    assert torch.equal(by_count, pruner.prune_linear(W, "l", Unstructured(0.5)))
    pruner.clear_linear_activations("l")
    assert not pruner.statistics


DEAD = {"all": slice(None), "half": slice(0, 108), "all but one": slice(1, None), "every other": slice(None, None, 2)}


def with_dead_inputs(dead: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    W, X = layer(24, 216)
    X[..., DEAD[dead]] = 0
    return W.to(device), X.to(device)


@pytest.mark.parametrize("spec", ["0.5", "2:4"])
@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("name", NAMES)
def test_dead_inputs(name, dead, spec, device):
    W, X = with_dead_inputs(dead, device)
    pruned = prune(name, W, X, spec)
    assert pruned.isfinite().all()
    parse_pattern(spec).check(pruned)


@pytest.mark.parametrize("spec", ["0.5", "2:4"])
@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("update", ["none", "refit"])
@pytest.mark.parametrize("target", ["dense", "asymmetric"])
@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "alps", "admm", "swaps"])
def test_dead_inputs_with_every_target_and_update(name, target, update, dead, spec, device):
    W, X = with_dead_inputs(dead, device)
    config = compose_config(f"pruner={name}", f"target={target}", f"update={update}")
    pruner, target, update = (instantiate(config[key], _convert_="all") for key in ("pruner", "target", "update"))
    pruner.add_linear_activations("l", X)
    statistics = {Hessian: Hessian(), CrossProduct: CrossProduct()}
    statistics[Hessian].add(X)
    statistics[CrossProduct].add(X, 1.1 * X + 0.1)
    targets = target.weights({"l": W}, statistics)
    is_dead = X.flatten(0, 1).abs().sum(0) == 0
    assert torch.equal(targets["l"][:, is_dead], W[:, is_dead]), "dead inputs keep their dense weights"
    assert targets["l"].isfinite().all()
    pruned = pruner.prune_group({"l": targets["l"].clone()}, {"l": parse_pattern(spec)})
    updated = update.update_group(pruned, targets, statistics[Hessian])["l"]
    assert updated.isfinite().all()
    assert not (updated.bool() & ~pruned["l"].bool()).any()
    parse_pattern(spec).check(updated)


@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 9),
    groups=st.integers(1, 20),
    n=st.integers(1, 7),
    m=st.integers(2, 8),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_any_shape_and_any_pattern(name, rows, groups, n, m, seed):
    if n >= m or not supported(name, f"{n}:{m}"):
        return
    W, X = layer(rows, groups * m, tokens=7, seed=seed)  # mostly fewer tokens than inputs
    NM(n, m).check(prune(name, W, X, f"{n}:{m}"))
    sparsity = Unstructured(n / m)
    sparsity.check(prune(name, W, X, str(n / m)))


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_activations_matter(name):
    W, X = layer(16, 128)
    loud = X.clone()
    loud[..., :64] *= 30
    kept = [(prune(name, W, inputs, "0.5")[:, :64] != 0).sum() for inputs in (X, loud)]
    assert kept[1] > kept[0]


def test_sparsegpt_beats_wanda_beats_magnitude_on_the_layer_error():
    W, X = layer(64, 256, tokens=2000)
    X = X.clone()
    X[..., ::7] *= 5
    flat = X.reshape(-1, 256)
    for spec in ("0.5", "2:4"):
        error = {name: ((prune(name, W, X, spec) - W) @ flat.T).square().sum() for name in ("magnitude", "wanda", "sparsegpt")}
        assert error["sparsegpt"] < error["wanda"] < error["magnitude"]


def indefinite_sparsegpt(name: str, first: float, device: str) -> tuple[Pruner, torch.Tensor]:
    """A pruner whose Hessian of linear `name` is the identity but for its first entry, and a weight for it."""
    pruner = make_pruner("sparsegpt")
    W, X = (tensor.to(device) for tensor in layer(8, 64))
    pruner.add_linear_activations(name, X)
    hessian = torch.eye(64, device=device)
    hessian[0, 0] = first
    pruner.statistics[name]._sum = hessian * pruner.statistics[name].num_tokens
    return pruner, W


def test_a_hessian_that_fails_is_damped_more_and_says_so(device):
    pruner, W = indefinite_sparsegpt("l", -0.05, device)  # damping 0.01 is too little, 0.1 is enough
    assert pruner.prune_linear(W, "l", NM(2, 4)).isfinite().all()
    assert pruner.notes["l"]["damping"] == pytest.approx(0.1)


def test_a_hessian_that_no_damping_mends_names_the_linear(device):
    pruner, W = indefinite_sparsegpt("model.layers.3.fc1", -60, device)
    with pytest.raises(ValueError, match=r"model\.layers\.3\.fc1.*900 tokens.*damping 1;"):
        pruner.prune_linear(W, "model.layers.3.fc1", NM(2, 4))


def test_linears_of_one_input_are_factorised_once(monkeypatch):
    pruner = make_pruner("sparsegpt")
    W, X = layer(8, 64)
    pruner.add_linear_activations("q", X)
    pruner.statistics["k"] = pruner.statistics["q"]
    calls = []
    factorise = pruner._factorise
    monkeypatch.setattr(pruner, "_factorise", lambda *arguments: calls.append(arguments) or factorise(*arguments))
    for name in ("q", "k"):
        pruner.prune_linear(W, name, NM(2, 4))
    assert len(calls) == 1
