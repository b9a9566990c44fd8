"""Masks chosen again and again while a solver iterates: faster than an exact selection, which only the last one needs.

Letters: O output features, I input features.
"""

import torch
from torch import Tensor

from nnprune.patterns import NM, SparsityPattern

SAMPLED = 1 << 15
"""Scores of a linear from which a threshold without structure is taken."""

LARGEST_M = 16
"""Largest group whose entries are compared pair by pair."""


class Projection:
    """Keeps the largest entries of linears that stand side by side, each by itself as a pattern has it.

    Args:
        pattern: N:M, or a fraction of each linear's entries.
        sizes: output features of each linear.
    """

    def __init__(self, pattern: SparsityPattern, sizes: list[int]) -> None:
        self.pattern = pattern
        self.sizes = sizes

    def exact(self, score_IO: Tensor) -> Tensor:
        """The mask (I, O) of the scores (I, O), with the pattern's exact counts."""
        pieces = score_IO.split(self.sizes, dim=1)
        return torch.cat([self.pattern.mask(piece.t().contiguous(), per="matrix").t() for piece in pieces], dim=1)

    def fast(self, score_IO: Tensor, sparsity: float | None = None) -> Tensor:
        """The mask (I, O): for N:M exact but for the order of equal scores; otherwise above a threshold taken from a sample.

        `sparsity`, less than the pattern's, keeps more: of N:M the entries outside the N that are largest in their linear.
        """
        nm = isinstance(self.pattern, NM)
        if nm and self.pattern.m > LARGEST_M:
            mask = self.exact(score_IO)
        elif nm:
            mask = _largest_of_groups(score_IO, self.pattern.n, self.pattern.m)
        else:
            return self._above(score_IO, sparsity or float(self.pattern.sparsity))
        if sparsity is not None and sparsity < self.pattern.sparsity:
            share = sparsity / self.pattern.sparsity  # of the entries outside the N
            largest = float(score_IO.max())
            mask |= self._above(score_IO + mask.to(score_IO.dtype).mul_(largest), share * float(self.pattern.sparsity))
        return mask

    def _above(self, score_IO: Tensor, sparsity: float) -> Tensor:
        masks = []
        for score in score_IO.split(self.sizes, dim=1):
            sample = score[:, :: max(score.numel() // SAMPLED, 1)].flatten()
            rank = max(round(sparsity * sample.numel()), 1)
            masks.append(score > sample.kthvalue(rank).values)
        return torch.cat(masks, dim=1)


def _largest_of_groups(score_IO: Tensor, n: int, m: int) -> Tensor:
    """Mask (I, O) of the n largest in each m consecutive inputs, by counting for each entry how many are larger."""
    planes = score_IO.unflatten(0, (-1, m)).unbind(1)
    larger = [torch.zeros_like(planes[0], dtype=torch.int8) for _ in planes]
    for i in range(m):
        for j in range(i + 1, m):
            first = planes[i] >= planes[j]
            larger[j] += first
            larger[i] += ~first
    return torch.stack([count < n for count in larger], dim=1).flatten(0, 1)
