"""RIA, swaps and DSnoT: methods that choose a mask and leave the kept weights as they are."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import set_work_sizes
from support.mask_cases import CASES, case, kept_weights_are_dense, layer, prune, same_counts

from nnprune.patterns import NM, Unstructured
from nnprune.pruners.dsnot import DSnoT
from nnprune.pruners.magnitude import Magnitude
from nnprune.pruners.ria import RIA
from nnprune.pruners.swaps import Swaps
from nnprune.pruners.wanda import Wanda

BAD_OPTIONS = [
    (RIA, "activation_power", (-0.5, "x", math.nan, None, True)),
    (RIA, "comparison_group", ("block", None)),
    (Swaps, "start", ("sparsegpt", None)),
    (Swaps, "max_swaps", (0, 1.5)),
    (Swaps, "num_candidates", (0, "all")),
    (DSnoT, "max_cycles", (0, 2.5)),
    (DSnoT, "threshold", (-1, math.inf, "x")),
    (DSnoT, "variance_power", (-1, math.nan)),
    (DSnoT, "skip", ("mlp", [1], [""], None)),
]


@pytest.mark.parametrize(
    ("kind", "option", "value"), [(kind, option, value) for kind, option, values in BAD_OPTIONS for value in values]
)
def test_bad_options_are_named(kind, option, value):
    with pytest.raises(ValueError, match=rf"^pruner\.{option}=.*: must be "):
        kind(**{option: value})


# RIA


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_ria_equals_its_formula(power):
    W, X = layer(6, 9, tokens=50, seed=0)
    pruner = RIA(activation_power=power)
    pruner.add_linear_activations("l", X)
    score = pruner.score(W, "l")
    size, norm = W.double().abs(), X.double().norm(dim=0) / 50**0.5
    for i in range(6):
        for j in range(9):
            share = size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()
            assert float(score[i, j]) == pytest.approx(float(share * norm[j] ** power), rel=1e-5)


def test_ria_has_a_score_for_empty_rows_and_columns():
    W, X = layer(8, 12, tokens=50, seed=0)
    W[3], W[:, 5], W[7] = 0, 0, 1e-42
    for pattern in (Unstructured(0.5), NM(2, 4)):
        pattern.check(prune(RIA(), W, X, pattern))


def test_ria_spares_small_channels_that_wanda_empties():
    W, X = layer(64, 32, tokens=100, seed=0)
    W[:, 3] *= 1e-3
    assert prune(Wanda(), W, X, Unstructured(0.5))[:, 3].count_nonzero() == 0
    assert prune(RIA(), W, X, Unstructured(0.5))[:, 3].count_nonzero() > 0


def test_ria_compares_within_rows_or_over_the_matrix():
    W, X = layer(32, 40, tokens=100, seed=0)
    kept = {group: (prune(RIA(0.5, group), W, X, Unstructured(0.5)) != 0).sum(1) for group in ("row", "matrix")}
    assert (kept["row"] == 20).all()
    assert kept["matrix"].sum() == 640
    assert kept["matrix"].unique().numel() > 1


# Swaps


def row_errors(pruned: torch.Tensor, W: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    change = pruned.double() - W.double()
    return ((change @ hessian.double()) * change).sum(1)


@given(
    **CASES,
    start=st.sampled_from(["wanda", "magnitude"]),
    max_swaps=st.sampled_from([1, 3, 100]),
    num_candidates=st.sampled_from([1, 3, 64]),
)
@settings(max_examples=150)
def test_swaps_never_raise_the_error_of_a_row(start, max_swaps, num_candidates, **shape):
    W, X, pattern = case(**shape)
    pruner = Swaps(start, max_swaps, num_candidates)
    pruned = prune(pruner, W, X, pattern)
    hessian = pruner.statistics["l"].mean()
    score = W.abs() * hessian.diagonal().sqrt() if start == "wanda" else W.abs()
    first = torch.where(pattern.mask(score), W, 0)
    assert (row_errors(pruned, W, hessian) <= row_errors(first, W, hessian)).all()
    assert same_counts(pruned, first, pattern)
    assert kept_weights_are_dense(pruned, W)
    assert ((pruned != 0) & (first == 0)).sum(1).max() <= max_swaps


@given(**CASES)
@settings(max_examples=50)
def test_swaps_end_where_no_single_swap_helps(**shape):
    W, X, pattern = case(**shape)
    pruner = Swaps(max_swaps=10_000, num_candidates=1000)
    pruned = prune(pruner, W, X, pattern)
    hessian = pruner.statistics["l"].mean().double()
    dropped, first = (W - weight for weight in (pruned.double(), prune(Wanda(), W, X, pattern).double()))
    c = dropped @ hessian
    alone = W.double() ** 2 * hessian.diagonal()
    linear = 2 * W * c
    change = (alone + linear)[:, :, None] + (alone - linear)[:, None] - 2 * hessian * W[:, :, None] * W[:, None]
    group = torch.arange(W.shape[1]) // (pattern.m if isinstance(pattern, NM) else W.shape[1])
    allowed = (pruned != 0)[:, :, None] & (pruned == 0)[:, None] & (group[:, None] == group)
    least = 3e-6 * (first**2 * hessian.diagonal()).sum(1)  # what is lost in float32 may be left
    assert (change.masked_fill(~allowed, 0).amin((1, 2)) >= -least).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4), NM(3, 4), NM(4, 8)])
def test_swaps_lower_the_layer_error_of_their_start(pattern):
    W, X = layer(32, 96, tokens=500, seed=1)
    hessian = X.t() @ X
    for start, first in (("wanda", Wanda()), ("magnitude", Magnitude())):
        first.comparison_group = "row"
        before = row_errors(prune(first, W, X, pattern), W, hessian).sum()
        assert row_errors(prune(Swaps(start), W, X, pattern), W, hessian).sum() < 0.85 * before


def test_swaps_do_not_depend_on_the_chunks_of_rows(monkeypatch):
    W, X = layer(40, 48, tokens=300, seed=2)
    whole = [prune(Swaps(), W, X, pattern) for pattern in (Unstructured(0.5), NM(2, 4))]
    set_work_sizes(monkeypatch, piece_bytes=80_000)
    assert all(torch.equal(prune(Swaps(), W, X, p), one) for p, one in zip((Unstructured(0.5), NM(2, 4)), whole, strict=True))


def test_swaps_leave_a_row_that_keeps_nothing():
    W, X = layer(4, 10, tokens=30, seed=0)
    assert prune(Swaps(), W, X, Unstructured(0.99)).count_nonzero() == 0


# DSnoT


def residuals(pruned: torch.Tensor, W: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """|E[(w0 - w) x]| of each row."""
    return ((W.double() - pruned.double()) @ mean.double()).abs()


@given(
    **CASES,
    max_cycles=st.sampled_from([1, 5, 50]),
    threshold=st.sampled_from([0, 0.1, 1]),
    variance_power=st.sampled_from([0, 0.5, 1, 3]),
)
@settings(max_examples=150)
def test_dsnot_never_raises_the_expected_residual_of_a_row(max_cycles, threshold, variance_power, **shape):
    W, X, pattern = case(**shape)
    pruner = DSnoT(max_cycles, threshold, variance_power)
    pruned, first = prune(pruner, W, X, pattern), prune(Wanda(), W, X, pattern)
    mean = pruner.statistics["l"].mean()[0]
    before, after = residuals(first, W, mean), residuals(pruned, W, mean)
    assert (after <= before).all()
    done = before <= threshold
    assert torch.equal(pruned[done], first[done])
    assert same_counts(pruned, first, pattern)
    assert kept_weights_are_dense(pruned, W)
    assert ((pruned != 0) & (first == 0)).sum(1).max() <= max_cycles


def test_dsnot_by_hand():
    W = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    X = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.9, 1.1, 0.9, 1.1]])  # all of mean about 1; Wanda keeps 4 and -3
    # r = 0.95 * 2 + 1.05 = 2.95: growing 2 leaves 1.05, pruning -3, the only one of the sign, -2.1. Growing 1 leaves 1.9,
    # pruning -3 -1.25. Both lower |r|; the first in order is that of largest |e| / variance, which is 2.
    pruned = prune(DSnoT(max_cycles=1), W, X, Unstructured(0.5))
    assert pruned.tolist() == [[4.0, 0.0, 2.0, 0.0]]
    # In a group of 2, Wanda keeps 4 and 2, r = -3.15 + 1.05 = -2.1. Growing -3 for 4 leads to 1.05 + 3.8, which is worse.
    assert prune(DSnoT(), W, X, NM(1, 2)).tolist() == [[4.0, 0.0, 2.0, 0.0]]


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
def test_dsnot_cancels_the_mean_where_inputs_have_one(pattern):
    W, X = layer(64, 96, tokens=400, seed=1)
    mean = X.mean(0)
    before, after = (residuals(prune(pruner, W, X, pattern), W, mean).mean() for pruner in (Wanda(), DSnoT(threshold=0)))
    assert after < 0.3 * before


def test_dsnot_leaves_inputs_of_mean_zero_and_skipped_linears_to_wanda():
    W, X = layer(16, 40, tokens=100, seed=0)
    wanda = prune(Wanda(), W, X, NM(2, 4))
    assert not torch.equal(prune(DSnoT(), W, X, NM(2, 4)), wanda)
    assert torch.equal(prune(DSnoT(skip=["attn", "l"]), W, X, NM(2, 4)), wanda)
    centred = torch.cat([X, -X])
    assert torch.equal(prune(DSnoT(), W, centred, NM(2, 4)), wanda)


def test_dsnot_divides_by_the_variance():
    W = torch.tensor([[5.0, -5.0, 1.0, 1.0]])
    X = torch.tensor([[1.0, 2.1, 0.5, 0.9], [1.0, -1.9, 1.5, 0.9]])  # Wanda keeps 5 and -5; of the others, one is constant
    assert prune(DSnoT(max_cycles=1), W, X, Unstructured(0.5)).tolist() == [[5.0, 0.0, 0.0, 1.0]]
    assert prune(DSnoT(max_cycles=1, variance_power=0), W, X, Unstructured(0.5)).tolist() == [[5.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)])
@pytest.mark.parametrize("method", [DSnoT(max_cycles=30), Swaps()])
def test_a_host_that_does_not_look_finds_the_same(method, pattern, monkeypatch):
    W, X = layer(40, 48, tokens=300, seed=2)
    X = X + 0.3  # a mean for DSnoT
    wanted = prune(method, W, X, pattern)
    set_work_sizes(monkeypatch, is_asynchronous=True, steps_per_read=4)
    assert torch.equal(prune(method, W, X, pattern), wanted)
