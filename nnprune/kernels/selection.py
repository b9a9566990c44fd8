"""Masks that keep the largest of scores, by the way that suits their number and the device.

A mask is bool, True = keep.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nnprune.kernels.work_sizes import work_sizes

MAX_SORTED = 8
"""Entries of a group that `nth_largest` keeps sorted at most."""

MAX_SMALL_GROUP = 32
"""Width of a group up to which one tensor for each position is faster than `topk`."""

DIGITS = 1 << 16
"""Values of half a float32's bits."""


def keep_largest(score: Tensor, num_keep: int) -> Tensor:
    """Mask (shape of `score`) that keeps exactly the `num_keep` largest entries along the last dimension.

    The count is exact whatever the ties; weights that were once quantised have many. Which of equal scores are kept is not specified: it
    is the same in each run on a device, and differs between devices.
    """
    width = score.shape[-1]
    # Always contiguous: otherwise flatten may copy.
    mask = torch.ones_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
    sizes = work_sizes(score.device)
    groups_at_once = max(sizes.scores // width, 1)
    chunks = zip(score.flatten(0, -2).split(groups_at_once), mask.flatten(0, -2).split(groups_at_once), strict=True)
    is_small = 0 < num_keep < width <= MAX_SMALL_GROUP and can_sort(num_keep, width)
    select = _keep_in_small_groups if is_small else _keep_by_index
    if sizes.is_asynchronous and is_small:
        select = _keep_in_small_groups_by_place
    elif sizes.is_asynchronous and score.dtype == torch.float32 and len(mask) == 1 and 0 < num_keep < width:
        select = _keep_by_histogram
    for scores, kept in chunks:
        select(scores, kept, num_keep)
    return mask


def _keep_by_index(scores: Tensor, kept: Tensor, num_keep: int) -> None:
    """Clear all but the `num_keep` largest scores of each group in a mask (groups, width) of ones."""
    drop = scores.topk(scores.shape[-1] - num_keep, dim=-1, largest=False, sorted=False).indices
    kept.scatter_(-1, drop, False)


def _keep_by_histogram(scores: Tensor, kept: Tensor, num_keep: int) -> None:
    """The same for one large group of float32, without sorting it and without a wait of the host: on CUDA `topk` of half of a million
    scores sorts them.

    The bits of a float, as an integer, are in the order of the floats. Two histograms of half the bits each find the threshold.
    """
    bits = scores.flatten().view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats are in reverse order
    keys.masked_fill_(scores.flatten().isnan(), 0x7FFFFFFF)  # above all, as in `topk`
    upper = (keys >> 16) + DIGITS // 2
    first, rank = _digit_of_rank(upper, torch.ones_like(keys), len(keys) - num_keep)
    second, rank = _digit_of_rank(keys & (DIGITS - 1), (upper == first).int(), rank)
    threshold = ((first - DIGITS // 2) << 16 | second).int()
    is_equal = keys == threshold
    drop = (keys < threshold) | (is_equal & (is_equal.cumsum(0, dtype=torch.int32) <= rank))
    kept.copy_(drop.logical_not_().view_as(kept))


def _digit_of_rank(digits: Tensor, counted: Tensor, rank: int | Tensor) -> tuple[Tensor, Tensor]:
    """The digit of the rank-th smallest of those `digits` (n,) where `counted` (n,) is 1, and its rank among equal ones, each (1,)."""
    counts = torch.zeros(DIGITS, dtype=torch.int32, device=digits.device).scatter_add_(0, digits.long(), counted)
    totals = counts.cumsum(0)
    digit = (totals < rank).sum(0, keepdim=True)
    return digit, rank - totals[digit] + counts[digit]


def _keep_in_small_groups(scores: Tensor, kept: Tensor, num_keep: int) -> None:
    """The same by thresholds, several times faster for small groups."""
    planes = scores.t().contiguous()
    torch.ge(scores, nth_largest(planes.unbind(), num_keep)[:, None], out=kept)
    _repair_groups(scores, kept, num_keep, kept.sum(1, dtype=torch.uint8) != num_keep)


def _keep_in_small_groups_by_place(scores: Tensor, kept: Tensor, num_keep: int) -> None:
    """The same without a wait of the host: of scores equal to a group's threshold the first are dropped."""
    scores = scores.masked_fill(scores.isnan(), torch.inf)
    threshold = nth_largest(scores.t().contiguous().unbind(), num_keep)[:, None]
    torch.ge(scores, threshold, out=kept)
    is_equal = scores == threshold
    surplus = kept.sum(1, keepdim=True, dtype=torch.int32) - num_keep
    kept.logical_xor_(is_equal & (is_equal.cumsum(1, dtype=torch.int32) <= surplus))


def _repair_groups(scores: Tensor, kept: Tensor, num_keep: int, is_wrong: Tensor) -> None:
    """Select by index in the groups (marked in `is_wrong`) whose count ties or NaN made wrong."""
    if len(groups := is_wrong.nonzero().flatten()):
        again = torch.ones_like(kept[groups])
        _keep_by_index(scores[groups], again, num_keep)
        kept[groups] = again


def can_sort(n: int, m: int) -> bool:
    """Whether `nth_largest` of m tensors is fast."""
    return min(n, m - n + 1) <= MAX_SORTED


def nth_largest(planes: Sequence[Tensor], n: int) -> Tensor:
    """The n-th largest of m tensors, elementwise: insertion into a sorted list, from the end of the order that is nearer."""
    better, worse, length = torch.maximum, torch.minimum, n
    if len(planes) - n + 1 < n:
        better, worse, length = torch.minimum, torch.maximum, len(planes) - n + 1
    best: list[Tensor] = []
    for plane in planes:
        for place in range(len(best)):
            best[place], plane = better(best[place], plane), worse(best[place], plane)
        if len(best) < length:
            best.append(plane)
    return best[-1]
