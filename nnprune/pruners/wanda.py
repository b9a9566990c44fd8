"""Wanda: weights and activations (Sun et al. 2023, arXiv:2306.11695)."""

from torch import Tensor

from nnprune.pruners.base import ScorePruner
from nnprune.statistics import SquaredNorm


class Wanda(ScorePruner):
    """Scores a weight by |W_ij| ||X_j||_2 (equation 1), compared within each output row (section 3)."""

    statistic = SquaredNorm

    def score(self, W: Tensor, module_name: str) -> Tensor:
        return W.abs().float() * self.statistics[module_name].mean().sqrt()
