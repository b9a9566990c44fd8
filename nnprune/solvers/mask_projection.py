"""Masks chosen again and again while a solver iterates: faster than an exact selection, which only the last one needs.

Letters: O output features, I input features.
"""

from functools import partial

import torch
from torch import Tensor

from nnprune.patterns import NM, SparsityPattern, can_list, nth_largest

SAMPLED = 1 << 13
"""Scores of a linear from which a threshold without structure is taken."""


class Projection:
    """Keeps the largest entries of linears that stand side by side, each by itself as a pattern has it.

    Args:
        pattern: N:M, or a fraction of each linear's entries.
        sizes: output features of each linear.
    """

    def __init__(self, pattern: SparsityPattern, sizes: list[int]) -> None:
        self.pattern = pattern
        self.sizes = sizes
        self._places: Tensor | None = None  # of the sampled scores

    def exact(self, score_IO: Tensor) -> Tensor:
        """The mask (I, O) of the scores (I, O), with the pattern's exact counts."""
        pieces = score_IO.split(self.sizes, dim=1)
        return torch.cat([self.pattern.mask(piece.t().contiguous(), per="matrix").t() for piece in pieces], dim=1)

    def fast(self, score_IO: Tensor, sparsity: float | None = None) -> Tensor:
        """The mask as zeros and ones, in place of the scores (I, O), contiguous: for N:M exact but for ties, which are all
        kept; otherwise above a threshold taken from a sample.

        `sparsity`, less than the pattern's, keeps more: of N:M the entries outside the N that are largest in their linear.
        """
        if not isinstance(self.pattern, NM):
            return self._above(score_IO, sparsity or float(self.pattern.sparsity))
        if sparsity is None or sparsity >= self.pattern.sparsity:
            return self._largest_of_groups(score_IO)
        mask = self._largest_of_groups(score_IO.clone())
        share = sparsity / self.pattern.sparsity  # of the entries outside the N
        score_IO.add_(mask, alpha=float(score_IO.max()))
        return self._above(score_IO, share * float(self.pattern.sparsity)).maximum(mask)

    def _above(self, score_IO: Tensor, sparsity: float) -> Tensor:
        """1 in place of the scores (I, O) above a threshold for each linear, its k-th smallest sampled score, and 0 elsewhere."""
        if self._places is None:
            self._places = self._draw(*score_IO.shape, score_IO.device)
        sampled = score_IO.view(-1)[self._places]
        thresholds = sampled.kthvalue(max(round(sparsity * SAMPLED), 1), dim=1).values
        for score, threshold in zip(score_IO.split(self.sizes, dim=1), thresholds, strict=True):
            score.gt_(threshold)
        return score_IO

    def _draw(self, in_features: int, out_features: int, device: torch.device) -> Tensor:
        """Places of the scores to be sampled, a row a linear, in the flattened (I, O)."""
        draw = partial(torch.randint, size=(SAMPLED,), generator=torch.Generator(device).manual_seed(0), device=device)
        starts = [sum(self.sizes[:index]) for index in range(len(self.sizes))]
        return torch.stack(
            [draw(in_features) * out_features + start + draw(size) for start, size in zip(starts, self.sizes, strict=True)]
        )

    def _largest_of_groups(self, score_IO: Tensor) -> Tensor:
        n, m = self.pattern.n, self.pattern.m
        if not can_list(n, m):
            return score_IO.copy_(self.exact(score_IO))
        groups = score_IO.unflatten(0, (-1, m))
        groups.ge_(nth_largest(groups.unbind(1), n).unsqueeze(1))
        return score_IO
