"""DSnoT: dynamic sparse no training (Zhang et al., ICLR 2024, arXiv:2310.08915, section 3): grow and prune in turns.

A row w with pruned part d causes the error d x on an input x. DSnoT drives the expected error to zero:

  expected residual   r = sum of e_j over pruned j,   e_j = w_j E[x_j]
  grow                of the pruned i whose e_i has the sign of r, the one with the largest |e_i| / Var[x_i]^power:   r -= e_i
  prune               of the kept j whose e_j has the opposite sign of r, the one with the smallest Wanda score
                      |w_j| E[x_j^2]^(1/2):   r += e_j.  N:M: of the weights kept in the group of i, whatever their sign

until |r| <= threshold or, for N:M, r changes sign. This cancels first moments only: r = 0 says nothing about E[(d x)^2], the layer
error, which often rises. If inputs have mean zero, r is 0 from the start and the mask does not change.

Letters: R rows (output features) of a chunk, I input features, G groups of M inputs in a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from nnprune.checks import check_count, check_number, quoted
from nnprune.kernels.work_sizes import work_sizes
from nnprune.patterns import NM, SparsityPattern, keep_where
from nnprune.pruners.base import Pruner
from nnprune.statistics import Moments

BYTES_PER_WEIGHT = 64  # of the rows refined together: their float64 effects and gains, queues and masks
MIN_VARIANCE = 1e-6  # as a fraction of E[x^2]: E[x^2] - E[x]^2 has this error in float32, and is 0 for a constant input


class DSnoT(Pruner):
    """Refines Wanda's mask, all rows at once; kept weights do not change.

    A pair that would increase |r| is skipped, and a weight is grown or pruned at most once. The authors keep Wanda's mask in the
    linears of the MLP. Here all linears are refined, because each architecture has its own names: list those to leave out in `skip`.
    Raises ValueError for a setting out of range.

    Args:
        max_cycles: weights that a row may try to grow.
        threshold: |r|, as a mean over tokens, at which a row stops. The authors' code sums r over the tokens of a sample, so its
            0.1 corresponds to a stricter 0.1 / calibration.seq_len here.
        variance_power: exponent of Var[x_i] in the choice of the weight to grow; 0: the largest |e_i|.
        skip: parts of the names of linears that keep Wanda's mask, such as [mlp], or [fc1, fc2] in OPT.
    """

    statistic = Moments

    def __init__(
        self, max_cycles: int = 50, threshold: float = 0.1, variance_power: float = 1.0, skip: Sequence[str] = ()
    ) -> None:
        if not isinstance(skip, list | tuple) or not all(isinstance(part, str) and part for part in skip):
            raise ValueError(f"pruner.skip={quoted(skip)}: must be a list of parts of names, such as [mlp]")
        self.max_cycles = check_count("pruner.max_cycles", max_cycles, 1)
        self.threshold = check_number("pruner.threshold", threshold, 0)
        self.variance_power = check_number("pruner.variance_power", variance_power, 0)
        self.skip = skip

    def prune_linear(self, W: Tensor, module_name: str, pattern: SparsityPattern) -> Tensor:
        mean, square = self.statistics[module_name].mean()
        wanda = W.abs().float() * square.sqrt()
        mask = pattern.mask(wanda, per="row")
        if not any(part in module_name for part in self.skip):
            mean, square = mean.double(), square.double()
            variance = torch.maximum(square - mean.square(), MIN_VARIANCE * square)
            group_size = pattern.m if isinstance(pattern, NM) else None
            rows_at_once = max(work_sizes(W.device).piece_bytes // (BYTES_PER_WEIGHT * W.shape[1]), 1)
            for weight, score, kept in zip(*(tensor.split(rows_at_once) for tensor in (W, wanda, mask)), strict=True):
                effect = weight.double() * mean
                gain = effect.abs() / variance**self.variance_power
                kept.logical_xor_(self._flips(effect, gain, score, kept, group_size))
        return keep_where(mask, W)

    def _flips(self, effect_RI: Tensor, gain_RI: Tensor, wanda_RI: Tensor, mask_RI: Tensor, group_size: int | None) -> Tensor:
        """Entries (R, I) of the mask to invert, from e_j, |e_j| / Var^power and Wanda's scores."""
        rows = torch.arange(len(mask_RI), device=mask_RI.device)
        flips_RI = torch.zeros_like(mask_RI)
        residual = effect_RI.masked_fill(mask_RI, 0).sum(1)
        growable = _Queues(-gain_RI, effect_RI, ~mask_RI, self.max_cycles)
        prunable = _Queues(wanda_RI, effect_RI, mask_RI, self.max_cycles) if group_size is None else None
        unpruned_RI = wanda_RI.masked_fill(~mask_RI, torch.inf)
        active = residual.abs() > self.threshold
        is_asynchronous = work_sizes(mask_RI.device).is_asynchronous
        for _ in range(self.max_cycles):
            i, found = growable.first(residual > 0)
            active &= found
            if not is_asynchronous and not active.any():  # a device goes on in vain sooner than that the host waits for it
                break
            grown = residual - effect_RI[rows, i]
            j, paired = prunable.first(grown < 0) if prunable else _lowest_in_group(unpruned_RI, i, group_size)
            moved = grown + effect_RI[rows, j]
            made = active & paired & (moved.abs() < residual.abs())
            flips_RI[rows, i] |= made
            flips_RI[rows, j] |= made
            growable.advance(residual > 0, active)
            if prunable:
                prunable.advance(grown < 0, made)
            else:
                unpruned_RI[rows, j] = unpruned_RI[rows, j].masked_fill(made, torch.inf)
            going = moved * residual > 0 if group_size else True  # N:M: a row stops when its residual changes sign
            residual = torch.where(made, moved, residual)
            active &= (residual.abs() > self.threshold) & (going | ~paired)
        return flips_RI


class _Queues:
    """Two queues of columns for each row, for negative and for positive e_j, ordered by increasing `rank` (R, I).

    They hold the first `length` columns, so that a cycle need not scan the whole row.
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
        """First column (R,) in each row's queue of this sign, and whether there is one (R,)."""
        side = positive.long()
        column = self.columns[self.rows, side, self.heads[self.rows, side]]
        return column.clamp_min(0), column >= 0

    def advance(self, positive: Tensor, done: Tensor) -> None:
        """Remove the first column from the queue of this sign where `done` (R,)."""
        self.heads[self.rows, positive.long()] += done


def _lowest_in_group(score_RI: Tensor, i: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Column (R,) with the lowest score in the group of column i (R,), and whether that score is finite (R,)."""
    group = i // group_size
    score, place = score_RI.unflatten(1, (-1, group_size))[torch.arange(len(i), device=i.device), group].min(1)
    return group * group_size + place, score < torch.inf
