"""Weights, inputs and patterns for methods that choose a mask, and what holds of the weights that they keep."""

import torch
from hypothesis import strategies as st

from nnprune.patterns import NM, SparsityPattern, Unstructured
from nnprune.pruners.base import Pruner


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


def same_counts(pruned: torch.Tensor, other: torch.Tensor, pattern: SparsityPattern) -> bool:
    """Whether two masks keep equally many in each group that the pattern knows."""
    group_size = pattern.m if isinstance(pattern, NM) else pruned.shape[1]
    one, two = (weight.unflatten(1, (-1, group_size)).count_nonzero(-1) for weight in (pruned, other))
    return torch.equal(one, two)


def kept_weights_are_dense(pruned: torch.Tensor, W: torch.Tensor) -> bool:
    return torch.equal(pruned, torch.where(pruned != 0, W, 0))


CASES = {
    "rows": st.integers(1, 12),
    "num_groups": st.integers(1, 12),
    "n": st.integers(1, 7),
    "m": st.integers(2, 8),
    "structured": st.booleans(),
    "tokens": st.sampled_from([1, 5, 200]),
    "offset": st.sampled_from([0, 1, 30]),
    "seed": st.integers(0, 999),
}


def case(rows, num_groups, n, m, structured, tokens, offset, seed):
    """A weight, inputs whose mean is `offset` times their deviation, and a pattern."""
    n = min(n, m - 1)
    W, X = layer(rows, num_groups * m, tokens, seed)
    X[:, : X.shape[1] // 2] += offset  # all alive, and some with hardly any variance
    return W, X, NM(n, m) if structured else Unstructured(1 - n / m)
