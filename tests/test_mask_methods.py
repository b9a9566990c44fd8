"""RIA, swaps and DSnoT: methods that choose a mask and leave the kept weights as they are."""

import math

import pytest
import torch

from nnprune.patterns import NM, SparsityPattern, Unstructured
from nnprune.pruners.base import Pruner
from nnprune.pruners.ria import RIA
from nnprune.pruners.wanda import Wanda


def layer(rows: int, columns: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (rows, columns) and inputs (tokens, columns): correlated, not centred, some loud and one dead."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    X = torch.randn(tokens, columns, generator=generator) @ mixing + torch.randn(columns, generator=generator)
    X[:, ::5] *= 4
    X[:, columns // 2] = 0
    return W, X


def prune(pruner: Pruner, W: torch.Tensor, X: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    pruner.add_linear_activations("l", X)
    return pruner.prune_linear(W, "l", pattern)


BAD_OPTIONS = [
    (RIA, "activation_power", (-0.5, "x", math.nan, None, True)),
    (RIA, "comparison_group", ("block", None)),
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
