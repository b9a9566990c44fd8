"""Layer problems that are hard for a solver, and their exact answers."""

import torch

from nnprune.patterns import parse_pattern
from nnprune.pruners.base import Pruner
from nnprune.statistics import Hessian


def problem(rows: int, width: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Hessian]:
    """A weight (rows, width), correlated inputs (tokens, width) of very different loudness, and their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, width, generator=generator)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    X = torch.randn(tokens, width, generator=generator) @ mixing * torch.rand(width, generator=generator).mul(5).exp()
    X[:, 1] = 0
    statistic = Hessian()
    statistic.add(X)
    return W, X, statistic


def prune(pruner: Pruner, W: torch.Tensor, X: torch.Tensor, spec: str) -> torch.Tensor:
    pruner.add_linear_activations("l", X)
    return pruner.prune_linear(W, "l", parse_pattern(spec))


def error(W: torch.Tensor, pruned: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """(rows,): squared error of each output feature, in float64."""
    return ((pruned.double() - W.double()) @ X.double().t()).square().sum(1)


def best_on_support(W: torch.Tensor, pruned: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Exact least squares on the nonzeros of `pruned`, row by row, in float64."""
    answer = torch.zeros_like(W, dtype=torch.float64)
    for row in range(len(W)):
        kept = pruned[row] != 0
        wanted = X.double() @ W[row].double()
        answer[row, kept] = torch.linalg.lstsq(X[:, kept].double(), wanted[:, None], driver="gelsd").solution[:, 0]
    return answer
