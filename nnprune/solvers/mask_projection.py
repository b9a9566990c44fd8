"""Masks for the iterations of a solver: faster than an exact selection, which only the last mask needs.

Letters: O output features, I input features.
"""

from functools import partial

import torch
from torch import Tensor

from nnprune.kernels.selection import can_sort, nth_largest
from nnprune.patterns import NM, SparsityPattern

SAMPLED = 1 << 13
"""Scores of a linear that are sampled for the threshold of an unstructured mask."""


class Projection:
    """Keeps the largest entries of several linears side by side; each linear fulfils the pattern by itself.

    Args:
        pattern: N:M, or a fraction of zeros in each linear.
        sizes: output features of each linear.
    """

    def __init__(self, pattern: SparsityPattern, sizes: list[int]) -> None:
        self.pattern = pattern
        self.sizes = sizes
        self._places: Tensor | None = None  # of the sampled scores, drawn once

    def exact(self, score_IO: Tensor) -> Tensor:
        """The mask (I, O) of the scores (I, O), with the pattern's exact counts."""
        pieces = score_IO.split(self.sizes, dim=1)
        return torch.cat([self.pattern.mask(piece.t().contiguous(), per="matrix").t() for piece in pieces], dim=1)

    def fast(self, score_IO: Tensor, sparsity: float | None = None) -> Tensor:
        """The mask as ones and zeros, written over the contiguous scores (I, O).

        N:M is exact except that ties are all kept. Without structure the threshold comes from a sample of the scores.

        Args:
            score_IO: (I, O), float32, >= 0; overwritten.
            sparsity: below that of the pattern, keeps more; for N:M also the largest of the other entries of each linear.
        """
        if not isinstance(self.pattern, NM):
            return self._above(score_IO, sparsity or float(self.pattern.sparsity))
        if sparsity is None or sparsity >= self.pattern.sparsity:
            return self._largest_of_groups(score_IO)
        mask = self._largest_of_groups(score_IO.clone())
        share = sparsity / self.pattern.sparsity  # of the entries outside the N
        score_IO.addcmul_(mask, score_IO.max())
        return self._above(score_IO, share * float(self.pattern.sparsity)).maximum(mask)

    def _above(self, score_IO: Tensor, sparsity: float) -> Tensor:
        """Replace scores (I, O) by 1 above the threshold of their linear, the k-th smallest sampled score, and by 0 elsewhere."""
        if self._places is None:
            in_features, out_features = score_IO.shape
            self._places = self._draw(in_features, out_features, score_IO.device)
        sampled = score_IO.view(-1)[self._places]
        thresholds = sampled.kthvalue(max(round(sparsity * SAMPLED), 1), dim=1).values
        for score, threshold in zip(score_IO.split(self.sizes, dim=1), thresholds, strict=True):
            score.gt_(threshold)
        return score_IO

    def _draw(self, in_features: int, out_features: int, device: torch.device) -> Tensor:
        """Places of the sampled scores in the flattened (I, O): one row for each linear."""
        draw = partial(torch.randint, size=(SAMPLED,), generator=torch.Generator(device).manual_seed(0), device=device)
        starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        return torch.stack(
            [draw(in_features) * out_features + start + draw(size) for start, size in zip(starts, self.sizes, strict=True)]
        )

    def _largest_of_groups(self, score_IO: Tensor) -> Tensor:
        assert isinstance(self.pattern, NM)
        n, m = self.pattern.n, self.pattern.m
        if not can_sort(n, m):
            return score_IO.copy_(self.exact(score_IO))
        groups = score_IO.unflatten(0, (-1, m))
        groups.ge_(nth_largest(groups.unbind(1), n).unsqueeze(1))
        return score_IO
