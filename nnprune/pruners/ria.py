"""RIA: relative importance and activations (Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models", ICLR 2024, section on relative importance; without its channel permutation).

Wanda may remove whole columns or rows of small weights. RIA relates a weight to its own row and column, so that no channel is lost:

  score_ij = ( |W_ij| / sum_i' |W_i'j|  +  |W_ij| / sum_j' |W_ij'| )  (E[x_j^2])^(a/2)

This is the paper's score with ||X_j||_2^a, up to a common factor: the number of tokens to the power a/2.

Letters: O output features (i), I input features (j).
"""

import torch
from torch import Tensor

from nnprune.checks import check_number, quoted
from nnprune.patterns import ComparisonGroup
from nnprune.pruners.base import ScorePruner
from nnprune.statistics import SquaredNorm


class RIA(ScorePruner):
    """Scores a weight by its share of its column and of its row, times the norm of its input; kept weights do not change.

    Args:
        activation_power: a >= 0, the power of the input's norm; 0: weights only. A negative one would favour dead inputs.
        comparison_group: of an unstructured pattern. "row": within each output row, as in Wanda, so that only the scores differ;
            "matrix": over the whole matrix, the default of the authors' code.
    """

    statistic = SquaredNorm

    def __init__(self, activation_power: float = 0.5, comparison_group: ComparisonGroup = "row") -> None:
        if comparison_group not in ("row", "matrix"):
            raise ValueError(f"pruner.comparison_group={quoted(comparison_group)}: must be row or matrix")
        self.activation_power = check_number("pruner.activation_power", activation_power, 0)
        self.comparison_group = comparison_group

    def score(self, W: Tensor, module_name: str) -> Tensor:
        size = W.abs().float()
        relative = _share(size, dim=0) + _share(size, dim=1)
        return relative * self.statistics[module_name].mean() ** (self.activation_power / 2)


def _share(size: Tensor, dim: int) -> Tensor:
    """Entries (O, I) >= 0 divided by their sum along `dim`; 0 if the sum is 0."""
    return size / size.sum(dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
