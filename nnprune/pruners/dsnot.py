"""DSnoT: dynamic sparse no training (Zhang et al., ICLR 2024, arXiv:2310.08915, section 3): grow and prune by turns.

A row w with pruned part d makes the error d x on an input x. DSnoT drives its expectation to zero and looks no further:

  expected residual   r = sum of e_j over pruned j,   e_j = w_j E[x_j]
  grow                of the pruned i whose e_i has the sign of r, the one of largest |e_i| / Var[x_i]^power:   r -= e_i
  prune               of the kept j whose e_j has the sign opposite to r, the one of least Wanda score |w_j| E[x_j^2]^(1/2):
                      r += e_j.  N:M: of those kept in the group of i the one of least Wanda score, whatever its sign

until |r| <= threshold or, N:M, r changes sign. This cancels first moments only: r = 0 says nothing about E[(d x)^2], the layer's
error, which often rises; and where inputs have mean zero, r is 0 from the start and nothing happens.

Letters: R rows (output features) of a chunk, I input features, G groups of M inputs in a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from nnprune.checks import check_count, check_number
from nnprune.patterns import NM, SparsityPattern, keep_where
from nnprune.pruners.base import Pruner
from nnprune.statistics import Moments

ROWS_AT_ONCE = 512
"""Rows whose float64 copies are needed at the same time."""

LEAST_VARIANCE = 1e-6
"""Of E[x^2]: in float32, E[x^2] - E[x]^2 is no more exact than that; and it is 0 for an input that never changes."""


class DSnoT(Pruner):
    """Refines Wanda's mask, all rows at once; kept weights stay as they are.

    A pair that would take r further from 0 is not made, so that |r| never rises, and a weight changes sides at most once. The
    authors leave the linears of the MLP with Wanda's mask. Here all are refined, for what they are called is up to each
    model, and a list that fits one would silently miss in another: name them in `skip` to leave them out.

    Args:
        max_cycles: how many weights a row may try to grow.
        threshold: |r|, as a mean over tokens, at which a row is done. The authors' code sums r over the tokens of a sample,
            so that its 0.1 is a stricter 0.1 / calibration.seq_len here.
        variance_power: of Var[x_i] in the choice of what to grow; 0: the largest |e_i|.
        skip: parts of the names of linears that keep Wanda's mask, such as [mlp], or [fc1, fc2] in OPT.

    Raises:
        ValueError: options out of range.
    """

    statistic = Moments

    def __init__(
        self, max_cycles: int = 50, threshold: float = 0.1, variance_power: float = 1.0, skip: Sequence[str] = ()
    ) -> None:
        check_count("pruner.max_cycles", max_cycles, 1)
        check_number("pruner.threshold", threshold, 0)
        check_number("pruner.variance_power", variance_power, 0)
        if not isinstance(skip, list | tuple) or not all(isinstance(part, str) and part for part in skip):
            raise ValueError(f"pruner.skip={skip}: must be a list of parts of names, such as [mlp]")
        self.max_cycles = max_cycles
        self.threshold = threshold
        self.variance_power = variance_power
        self.skip = skip

    def prune_linear(self, W: Tensor, module_name: str, pattern: SparsityPattern) -> Tensor:
        mean, square = self.statistics[module_name].mean()
        wanda = W.abs().float() * square.sqrt()
        mask = pattern.mask(wanda, per="row")
        if not any(part in module_name for part in self.skip):
            mean, square = mean.double(), square.double()
            variance = torch.maximum(square - mean.square(), LEAST_VARIANCE * square)
            group_size = pattern.m if isinstance(pattern, NM) else None
            chunks = zip(W.split(ROWS_AT_ONCE), wanda.split(ROWS_AT_ONCE), mask.split(ROWS_AT_ONCE), strict=True)
            for weight, score, kept in chunks:
                effect = weight.double() * mean
                gain = effect.abs() / variance**self.variance_power
                kept.logical_xor_(self._flips(effect, gain, score, kept, group_size))
        return keep_where(mask, W)

    def _flips(self, effect_RI: Tensor, gain_RI: Tensor, wanda_RI: Tensor, mask_RI: Tensor, group_size: int | None) -> Tensor:
        """Where the mask (R, I) is to change: e_j, |e_j| / Var^power and Wanda's scores decide."""
        rows = torch.arange(len(mask_RI), device=mask_RI.device)
        flips_RI = torch.zeros_like(mask_RI)
        residual = effect_RI.masked_fill(mask_RI, 0).sum(1)
        growable = _Queues(-gain_RI, effect_RI, ~mask_RI, self.max_cycles)
        prunable = _Queues(wanda_RI, effect_RI, mask_RI, self.max_cycles) if group_size is None else None
        unpruned_RI = wanda_RI.masked_fill(~mask_RI, torch.inf)
        active = residual.abs() > self.threshold
        for _ in range(self.max_cycles):
            i, found = growable.first(residual > 0)
            active &= found
            if not active.any():
                break
            grown = residual - effect_RI[rows, i]
            j, paired = prunable.first(grown < 0) if prunable else _least_of_group(unpruned_RI, i, group_size)
            moved = grown + effect_RI[rows, j]
            made = active & paired & (moved.abs() < residual.abs())
            flips_RI[rows, i] |= made
            flips_RI[rows, j] |= made
            growable.advance(residual > 0, active)
            if prunable:
                prunable.advance(grown < 0, made)
            else:
                unpruned_RI[rows, j] = unpruned_RI[rows, j].masked_fill(made, torch.inf)
            going = moved * residual > 0 if group_size else True  # in N:M a row is done when its residual changes sign
            residual = torch.where(made, moved, residual)
            active &= (residual.abs() > self.threshold) & (going | ~paired)
        return flips_RI


class _Queues:
    """For each row two queues of columns, those of negative and those of positive e_j, least `rank` (R, I) first.

    No more than `length` weights of a row are ever asked for, so that a cycle costs no look at the whole row.
    """

    def __init__(self, rank_RI: Tensor, effect_RI: Tensor, eligible_RI: Tensor, length: int) -> None:
        queues = []
        for of_sign_RI in (effect_RI < 0, effect_RI > 0):
            ranked = rank_RI.masked_fill(~(eligible_RI & of_sign_RI), torch.inf)
            rank, column = ranked.topk(min(length, ranked.shape[1]), largest=False)
            queues.append(pad(column.masked_fill(rank == torch.inf, -1), (0, 1), value=-1))  # -1: the end
        self.columns = torch.stack(queues, dim=1)
        self.heads = self.columns.new_zeros(len(rank_RI), 2)
        self.rows = torch.arange(len(rank_RI), device=rank_RI.device)

    def first(self, positive: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's first column (R,) in the queue of this sign, and whether there is one."""
        side = positive.long()
        column = self.columns[self.rows, side, self.heads[self.rows, side]]
        return column.clamp_min(0), column >= 0

    def advance(self, positive: Tensor, done: Tensor) -> None:
        """Take the first column off the queue of this sign where `done` (R,)."""
        self.heads[self.rows, positive.long()] += done


def _least_of_group(score_RI: Tensor, i: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Each row's column (R,) of least score in the group of column i (R,), and whether that is finite."""
    group = i // group_size
    score, place = score_RI.unflatten(1, (-1, group_size))[torch.arange(len(i), device=i.device), group].min(1)
    return group * group_size + place, score < torch.inf
