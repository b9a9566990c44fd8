"""OWL: layers with more outliers are pruned less (Yin et al. 2023, arXiv:2310.05175)."""

from collections.abc import Sequence

import torch

from nnprune.allocations.base import DenseLayer, LayerwiseAllocation, spread
from nnprune.checks import check_positive
from nnprune.patterns import SparsityPattern


class OWL(LayerwiseAllocation):
    """Outlier Weighed Layerwise sparsity.

    With Wanda's scores A_ij = |W_ij| ||X_j||_2 of all linears of decoder layer l taken together,

        D_l = share of the A_ij greater than M mean(A)
        s_l = s + mean(d) - d_l,    d_l = 2 lambda (D_l - min D) / (max D - min D)

    so that the sparsities of two layers differ by at most 2 lambda.

    Args:
        threshold: M > 0, how many times the mean an outlier exceeds.
        strength: lambda, in (0, 1).
    """

    def __init__(self, threshold: float = 5.0, strength: float = 0.08) -> None:
        self.threshold = check_positive("allocation.threshold", threshold)
        self.strength = check_positive("allocation.strength", strength, below=1)

    def measure(self, layer: DenseLayer, pattern: SparsityPattern) -> float:
        # Computed twice, so that only the scores of one linear are in memory.
        total = sum(float(layer.score(name).sum(dtype=torch.float64)) for name in layer.weights)
        bound = self.threshold * total / layer.num_weights
        return sum(int((layer.score(name) > bound).sum()) for name in layer.weights) / layer.num_weights

    def sparsities(self, measured: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
        return spread(measured, sizes, sparsity, self.strength)
