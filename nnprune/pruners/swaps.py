"""Swaps: local search for a better mask; kept weights keep their dense values. The problem and the costs of single swaps are those of
"SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale" (ZIB-IOL 2025); several swaps in one step are ours.

With H = E[x x^T] and d the pruned part of a row w (d_j = w_j where pruned, else 0), the row's error is E[(d x)^2] = d^T H d.
A step d -> d + s changes it by 2 s^T c + s^T H s, where c = H d:

  prune a kept u       a_u =  2 w_u c_u + w_u^2 H_uu          (s = w_u at u)
  restore a pruned p   b_p = -2 w_p c_p + w_p^2 H_pp          (s = -w_p at p)
  swap u for p         a_u + b_p - 2 w_u w_p H_up             (both)
  swap j after swap i  the change of j alone, + 2 s_i^T H s_j

Swaps stay within a group of M (N:M) or a row (unstructured), so the counts never change.

Letters: R rows (output features) of a chunk, I input features, G groups of M inputs in a row (one group of I for an
unstructured pattern), K kept and P pruned candidates of a group, S swaps proposed for a row, best first.
"""

import itertools

import torch
from torch import Tensor

from nnprune.checks import check_count, quoted
from nnprune.kernels.work_sizes import work_sizes
from nnprune.patterns import NM, SparsityPattern, keep_where
from nnprune.pruners.base import Pruner
from nnprune.statistics import Hessian

BYTES_PER_PAIR = 40  # or weight if those are more, of the rows processed together: about ten float32 tensors
SWAPS_PER_STEP = 16  # proposed for a row
MIN_GAIN = 1e-6  # of a swap, as a fraction of the row's first error if inputs were uncorrelated: less may be float32 rounding


class Swaps(Pruner):
    """Starts from a cheap mask and swaps kept for pruned weights while that lowers the row's error on the calibration tokens. Raises
    ValueError for a setting out of range.

    Args:
        start: the first mask, "wanda" or "magnitude", compared within each row.
        max_swaps: upper bound of the swaps in a row.
        num_candidates: kept weights of smallest a_u, and pruned weights of smallest b_p, that are paired in a group. The result is a
            local optimum among these pairs. Groups of N:M are usually smaller, so all their pairs count.
    """

    statistic = Hessian

    def __init__(self, start: str = "wanda", max_swaps: int = 100, num_candidates: int = 64) -> None:
        if start not in ("wanda", "magnitude"):
            raise ValueError(f"pruner.start={quoted(start)}: must be wanda or magnitude")
        self.start = start
        self.max_swaps = check_count("pruner.max_swaps", max_swaps, 1)
        self.num_candidates = check_count("pruner.num_candidates", num_candidates, 1)

    def prune_linear(self, W: Tensor, module_name: str, pattern: SparsityPattern) -> Tensor:
        hessian = self.statistics[module_name].mean()
        score = W.abs().float()
        mask = pattern.mask(score * hessian.diagonal().sqrt() if self.start == "wanda" else score, per="row")
        group_size = pattern.m if isinstance(pattern, NM) else W.shape[1]
        num_kept = pattern.n if isinstance(pattern, NM) else group_size - pattern.num_zeros(group_size)
        if num_kept:  # otherwise there is nothing to swap
            num_pairs = min(num_kept, self.num_candidates) * min(group_size - num_kept, self.num_candidates)
            pairs_at_once = work_sizes(W.device).piece_bytes // BYTES_PER_PAIR
            rows_at_once = max(pairs_at_once // (W.shape[1] // group_size * max(num_pairs, group_size)), 1)
            for weight, found in zip(W.split(rows_at_once), mask.split(rows_at_once), strict=True):
                self._search(weight.float(), found, hessian, group_size, num_kept)
        return keep_where(mask, W)

    def _search(self, weight_RI: Tensor, found_RI: Tensor, hessian: Tensor, group_size: int, num_kept: int) -> None:
        """Improve the mask `found_RI` in place until no pair of candidates lowers a row's error, or after `max_swaps`.

        One swap per step would be slow, because each step evaluates all pairs. So a step takes the best swaps of a row one after the
        other, each at its exact cost given those before it, as long as they gain: the error falls with every swap. One product with
        the hessian then updates c in all rows.
        """
        dropped_RI = weight_RI.masked_fill(found_RI, 0)
        c_RI = dropped_RI @ hessian
        least = MIN_GAIN * (dropped_RI.square() * hessian.diagonal()).sum(1)
        num_groups = weight_RI.shape[1] // group_size
        every = work_sizes(found_RI.device).steps_per_read
        mask_RI, rows = found_RI, torch.arange(len(found_RI), device=found_RI.device)  # those still searching
        budget = torch.full_like(rows, self.max_swaps)
        for step in itertools.count(1):
            change_RS, u_RS, p_RS = self._propose(weight_RI, mask_RI, c_RI, hessian, num_groups, num_kept)
            taken_RS = _take(change_RS, _interactions(weight_RI, u_RS, p_RS, hessian), p_RS, least, budget)
            flips_RI = torch.zeros_like(weight_RI).scatter_add_(1, u_RS, taken_RS).scatter_add_(1, p_RS, taken_RS)
            c_RI = c_RI + (torch.where(mask_RI, weight_RI, -weight_RI) * flips_RI) @ hessian
            mask_RI = mask_RI ^ flips_RI.bool()
            found_RI[rows] = mask_RI
            num_taken = taken_RS.sum(1).long()
            budget = budget - num_taken
            if step % every:  # a row that has stopped takes no more swaps
                continue
            going = (num_taken > 0) & (budget > 0)
            if not (num_going := int(going.count_nonzero())):
                break
            place = going.nonzero_static(size=num_going).flatten()
            state = (rows, weight_RI, mask_RI, c_RI, least, budget)
            rows, weight_RI, mask_RI, c_RI, least, budget = (tensor.index_select(0, place) for tensor in state)

    def _propose(
        self, weight_RI: Tensor, mask_RI: Tensor, c_RI: Tensor, hessian: Tensor, num_groups: int, num_kept: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best swaps of each row: changes of its error, columns u to prune and columns p to restore, each (R, S).

        Each u occurs once, with the best p of its group; several u may have the same p.
        """
        num_pruned = weight_RI.shape[1] // num_groups - num_kept
        linear, square = 2 * weight_RI * c_RI, weight_RI.square() * hessian.diagonal()
        cost_K, kept = self._candidates(square + linear, mask_RI, num_groups, num_kept)
        cost_P, pruned = self._candidates(square - linear, ~mask_RI, num_groups, num_pruned)
        change_KP = _products(weight_RI, kept, pruned, hessian).mul_(-2).add_(cost_K[..., None]).add_(cost_P[..., None, :])
        change_K, partner = change_KP.min(-1)
        change_RS, place = change_K.flatten(1).topk(min(SWAPS_PER_STEP, change_K[0].numel()), largest=False)
        return change_RS, kept.flatten(1).gather(1, place), pruned.gather(-1, partner).flatten(1).gather(1, place)

    def _candidates(self, cost_RI: Tensor, mask_RI: Tensor, num_groups: int, per_group: int) -> tuple[Tensor, Tensor]:
        """Costs and columns (R, G, candidates) of the cheapest weights in `mask_RI`, or of all if there are few.

        The mask has `per_group` in each group.
        """
        size = len(mask_RI) * num_groups * per_group  # known, so that the host need not wait for it
        columns = mask_RI.nonzero_static(size=size)[:, 1].view(len(mask_RI), num_groups, per_group)
        cost = cost_RI.gather(1, columns.flatten(1)).view_as(columns)
        if columns.shape[-1] <= self.num_candidates:
            return cost, columns
        cost, place = cost.topk(self.num_candidates, largest=False)
        return cost, columns.gather(-1, place)


def _products(weight_RI: Tensor, left: Tensor, right: Tensor, hessian: Tensor) -> Tensor:
    """w_i w_j H_ij of columns i of `left` (R, ..., K) and j of `right` (R, ..., P), as (R, ..., K, P)."""
    weight_K, weight_P = (weight_RI.gather(1, columns.flatten(1)).view_as(columns) for columns in (left, right))
    return hessian[left[..., None], right[..., None, :]].mul_(weight_K[..., None]).mul_(weight_P[..., None, :])


def _interactions(weight_RI: Tensor, u_RS: Tensor, p_RS: Tensor, hessian: Tensor) -> Tensor:
    """s_i^T H s_j for the steps of each two proposed swaps, (R, S, S)."""
    mixed = _products(weight_RI, u_RS, p_RS, hessian)
    same = _products(weight_RI, u_RS, u_RS, hessian).add_(_products(weight_RI, p_RS, p_RS, hessian))
    return same.sub_(mixed).sub_(mixed.mT)


def _take(change_RS: Tensor, interactions_RSS: Tensor, p_RS: Tensor, least: Tensor, budget: Tensor) -> Tensor:
    """Which of the proposed swaps (R, S) to make, 1 or 0, float32: the best, then the best given that one, while they gain."""
    taken_RS = torch.zeros_like(change_RS)
    for count in range(change_RS.shape[1]):
        best, i = change_RS.min(1, keepdim=True)
        take = (best < -least[:, None]) & (budget[:, None] > count)
        taken_RS.scatter_add_(1, i, take.float())
        with_i = interactions_RSS.gather(1, i[..., None].expand_as(interactions_RSS[:, :1]))[:, 0]
        change_RS = change_RS + 2 * take * with_i
        change_RS.masked_fill_(p_RS == p_RS.gather(1, i), torch.inf)  # swaps with the same p, and i itself
    return taken_RS
