"""Layers that pruning hurts more are pruned less, by measured layer errors. Our own method."""

import math
from collections.abc import Sequence

from nnprune.allocations.base import DenseLayer, LayerwiseAllocation, spread
from nnprune.checks import check_positive
from nnprune.patterns import SparsityPattern
from nnprune.solvers.layer_error import relative_error

MIN_ERROR = 1e-12  # a layer that loses nothing must not stretch the scale of all others


class ByError(LayerwiseAllocation):
    """Density by the logarithm of the layer error at the requested pattern.

    Each linear of the dense model is pruned to W' by Wanda's mask with the requested pattern. With a sample X of its inputs:

        e_l = mean over the linears of decoder layer l, weighted by size, of ||X (W' - W)^T||_F^2 / ||X W^T||_F^2
        s_l = s + mean(d) - d_l,    d_l = 2 strength (log e_l - min log e) / (max log e - min log e)

    Errors of layers differ by factors, hence the logarithm. The mapping to sparsities is OWL's (arXiv:2310.05175).

    Args:
        strength: in (0, 1), half the largest difference between the sparsities of two layers.
    """

    def __init__(self, strength: float = 0.08) -> None:
        self.strength = check_positive("allocation.strength", strength, below=1)

    def key(self, pattern: SparsityPattern) -> str:
        return f"{super().key(pattern)} at {pattern}"

    def measure(self, layer: DenseLayer, pattern: SparsityPattern) -> float:
        total = 0.0
        for name, W in layer.weights.items():
            pruned = W * pattern.mask(layer.score(name))
            total += W.numel() * float(relative_error(W, pruned, layer.samples[name]))
        return total / layer.num_weights

    def sparsities(self, measured: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
        return spread([math.log(max(error, MIN_ERROR)) for error in measured], sizes, sparsity, self.strength)
