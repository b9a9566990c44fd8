"""DLP: layers whose typical score is low are pruned less (Chen et al. 2025, arXiv:2505.23807)."""

from collections.abc import Sequence

from nnprune.allocations.base import DenseLayer, LayerwiseAllocation, spread
from nnprune.checks import check_positive
from nnprune.patterns import SparsityPattern


class DLP(LayerwiseAllocation):
    """Dynamic Layerwise Pruning.

    With Wanda's scores A_ij = |W_ij| ||X_j||_2 of a linear of O outputs and I inputs, decoder layer l has

        unimportance  S_l = sum over its linears of O I median(A) / p_l      a high median means many similar weights
        importance    I_l = 1 - S_l / sum_k S_k
        sparsity      s_l = s + mean(d) - d_l,    d_l = 2 alpha (I_l - min I) / (max I - min I)

    The paper sums Median(A_ij) over i and j; we read this as the median of each linear times its size. The division by p_l changes
    nothing if all decoder layers have the same size, and otherwise keeps large ones from looking unimportant. The median of an even
    number of scores is the lower of the two in the middle.

    Args:
        strength: alpha, in (0, 1); the paper tunes it for each sparsity (appendix G).
    """

    def __init__(self, strength: float = 0.15) -> None:
        self.strength = check_positive("allocation.strength", strength, below=1)

    def measure(self, layer: DenseLayer, pattern: SparsityPattern) -> float:
        """S_l."""
        return sum(float(layer.score(name).median()) * W.numel() for name, W in layer.weights.items()) / layer.num_weights

    def sparsities(self, measured: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
        # Any decreasing linear function of S gives the same d_l as I = 1 - S / sum S; -S needs no division.
        return spread([-one for one in measured], sizes, sparsity, self.strength)
