"""AlphaPruning: layers with heavy-tailed spectra are pruned less (Lu et al. 2024, arXiv:2410.10912)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nnprune.allocations.base import DenseLayer, LayerwiseAllocation, mean
from nnprune.checks import check_positive
from nnprune.patterns import SparsityPattern

NUM_BINS = 100  # of the histogram of log eigenvalues, as in the paper


class AlphaPruning(LayerwiseAllocation):
    """Sparsity by the power law that the spectra of a layer's weights follow; needs no data.

    With alpha_l the mean of `hill_alpha` over the linears of decoder layer l,

        phi_l = 1 - epsilon + 2 epsilon (alpha_l - min alpha) / (max alpha - min alpha)
        s_l   = s phi_l / mean(phi)

    A smaller alpha means a heavier tail: a layer that learned more and is hurt more by pruning. Raises ValueError in `measure` for a
    weight whose spectrum cannot be fitted.

    Args:
        strength: epsilon, in (0, 1); 0.3 at 70 % sparsity.
    """

    looks_at = "weights"

    def __init__(self, strength: float = 0.3) -> None:
        self.strength = check_positive("allocation.strength", strength, below=1)

    def measure(self, layer: DenseLayer, pattern: SparsityPattern) -> float:
        alphas = []
        for name, W in layer.weights.items():
            values = torch.linalg.svdvals(W.float()).double().cpu()
            real = values > values.max() * max(W.shape) * torch.finfo(torch.float32).eps  # the others are rounding errors
            try:
                alphas.append(hill_alpha(values[real].square()))
            except ValueError as error:
                raise ValueError(f"{name}: {error}, which allocation=alphapruning needs; use another allocation") from None
        return sum(alphas) / len(alphas)

    def sparsities(self, measured: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
        lowest, highest = min(measured), max(measured)
        if lowest == highest:
            return [sparsity] * len(measured)
        phi = [1 - self.strength + 2 * self.strength * (alpha - lowest) / (highest - lowest) for alpha in measured]
        return [sparsity * one / mean(phi, sizes) for one in phi]


def hill_alpha(eigenvalues: Tensor) -> float:
    """Hill's estimate of alpha in a density that falls as lambda^-alpha, from eigenvalues > 0 (n,) of W^T W:

        alpha = 1 + k / sum_{i <= k} log(lambda_i / lambda_min)

    over the k eigenvalues above lambda_min, the smallest one in the fullest of 100 equal bins of log lambda: the tail begins at the
    peak of the histogram. Raises ValueError if no two eigenvalues differ there.
    """
    logs = eigenvalues.log().sort().values
    if len(logs) == 0 or logs[0] == logs[-1]:
        raise ValueError("its weight has no two different singular values and so no spectrum")
    width = (logs[-1] - logs[0]) / NUM_BINS
    bins = ((logs - logs[0]) / width).long().clamp_max(NUM_BINS - 1)
    peak = torch.bincount(bins, minlength=NUM_BINS).argmax()
    start = logs[bins >= peak][0]
    above = logs[logs > start]
    if len(above) == 0:
        raise ValueError("its weight has no singular value above the peak of its spectrum")
    return 1 + len(above) / float((above - start).sum())
