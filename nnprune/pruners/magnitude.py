"""Magnitude pruning: removes the smallest weights (Han et al. 2015, arXiv:1506.02626)."""

from torch import Tensor

from nnprune.pruners.base import ScorePruner


class Magnitude(ScorePruner):
    """Scores a weight by |W_ij|, compared over the whole matrix; needs no calibration."""

    comparison_group = "matrix"

    def score(self, W: Tensor, module_name: str) -> Tensor:
        return W.abs().float()
