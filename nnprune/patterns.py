"""Sparsity patterns: how many weights of a linear must be zero, which ones may be, and how a weight is checked.

Letters: O output features, I input features. A mask is bool, True = keep. Knows no model and no pruner.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from nnprune.checks import quoted

ComparisonGroup = Literal["row", "matrix"]

SCORES_AT_ONCE = 1 << 22
"""Scores that one selection handles: their indices take 8 bytes each."""

MAX_SORTED = 8
"""Entries of a group that `nth_largest` keeps sorted at most."""

MAX_SMALL_GROUP = 32
"""Width of a group up to which one tensor for each position is faster than `topk`."""

DIGITS = 1 << 16
"""Values of half a float32's bits."""

MAX_M = 1 << 20
"""Upper bound of M in N:M: no linear has so many inputs."""


class PatternError(ValueError):
    """A weight or a width that does not fit its sparsity pattern."""


def keep_largest(score: Tensor, num_keep: int) -> Tensor:
    """Mask (shape of `score`) that keeps exactly the `num_keep` largest entries along the last dimension.

    The count is exact whatever the ties; weights that were once quantised have many. Ties are broken by index, as in the official
    SparseGPT and Wanda code, which selects the smallest entries too.
    """
    width = score.shape[-1]
    # Always contiguous: otherwise flatten may copy.
    mask = torch.ones_like(score, dtype=torch.bool, memory_format=torch.contiguous_format)
    groups_at_once = max(SCORES_AT_ONCE // width, 1)
    chunks = zip(score.flatten(0, -2).split(groups_at_once), mask.flatten(0, -2).split(groups_at_once), strict=True)
    is_small = 0 < num_keep < width <= MAX_SMALL_GROUP and can_sort(num_keep, width)
    select = _keep_in_small_groups if is_small else _keep_by_index
    if score.is_cuda and score.dtype == torch.float32 and len(mask) == 1 and 0 < num_keep < width:
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


def keep_where(mask: Tensor, weight: Tensor) -> Tensor:
    """The weights, bit for bit, where a mask of the same shape is True, and +0 elsewhere. A product of integers takes a tenth of the
    time of `torch.where`."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    return (weight.view(integers) * mask).view(weight.dtype)


def zeros_on_device(weight: Tensor) -> Tensor:
    """Number of zeros of a tensor, int64 (), on its device. `count_nonzero` is fast only for bool, and `sum` would convert to int64."""
    return weight.numel() - weight.bool().count_nonzero()


def zeros_in(weight: Tensor) -> int:
    """Number of zeros of a tensor, for which the host waits."""
    return int(zeros_on_device(weight))


@dataclass(frozen=True)
class Unstructured:
    """A fraction of zeros anywhere in the comparison group. `sparsity` is in [0, 1); 0 is the dense model."""

    sparsity: float | Fraction

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity={self.sparsity}: must be a fraction of zeros, 0 <= sparsity < 1")

    def __str__(self) -> str:
        return str(float(self.sparsity)) if self.sparsity else "dense"

    def num_zeros(self, group_size: int) -> int:
        """ceil(sparsity x group_size), exact: 0.55 of 100 is 55, although 0.55 * 100 > 55 in floating point."""
        exact = self.sparsity if isinstance(self.sparsity, Fraction) else Fraction(str(self.sparsity))
        return math.ceil(exact * group_size)

    def mask(self, score: Tensor, per: ComparisonGroup = "row") -> Tensor:
        """Mask (O, I) of the largest scores (O, I), compared within each row or over the whole matrix."""
        groups = score if per == "row" else score.reshape(1, -1)
        num_keep = groups.shape[-1] - self.num_zeros(groups.shape[-1])
        return keep_largest(groups, num_keep).view_as(score)

    def check_width(self, in_features: int) -> None:
        """Every width fits."""

    def check(self, weight: Tensor) -> None:
        """Raise PatternError when `weight` (O, I) has fewer than ceil(sparsity x O x I) zeros."""
        asked, found = self.num_zeros(weight.numel()), zeros_in(weight)
        if found < asked:
            raise PatternError(f"has {found} zeros, fewer than the {asked} that sparsity {self} asks for")


@dataclass(frozen=True)
class NM:
    """At most `n` nonzeros in every `m` consecutive inputs of a row: keep n of m, 0 < n < m."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"sparsity={quoted(str(self))}: N:M keeps N of every M weights and needs 0 < N < M, such as 2:4")
        if self.m > MAX_M:
            raise ValueError(f"sparsity={self}: M must be at most {MAX_M}; choose a smaller group, such as 2:4")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.n / self.m

    def mask(self, score: Tensor, per: ComparisonGroup = "row") -> Tensor:
        """Mask (O, I) of the n largest scores (O, I) in each group of m inputs, whatever `per` is."""
        self.check_width(score.shape[-1])
        return keep_largest(score.unflatten(-1, (-1, self.m)), self.n).view_as(score)

    def check_width(self, in_features: int) -> None:
        """Raise PatternError when m does not divide `in_features`."""
        if in_features % self.m:
            raise PatternError(f"has {in_features} inputs, which the group size {self.m} of {self} does not divide")

    def check(self, weight: Tensor) -> None:
        """Raise PatternError when a group of m inputs of `weight` (O, I) has more than n nonzeros."""
        self.check_width(weight.shape[-1])
        fullest = int(weight.bool().unflatten(-1, (-1, self.m)).sum(-1, dtype=torch.int32).max())
        if fullest > self.n:
            raise PatternError(f"keeps {fullest} weights in a group of {self.m}, more than {self} allows")


SparsityPattern = Unstructured | NM


def parse_pattern(spec: float | str) -> SparsityPattern:
    """The pattern for 0.5, "0.5", "2:4" or "dense".

    Raises ValueError, with the remedy, for a fraction outside [0, 1), for an N:M without 0 < N < M, for a percentage,
    and for the integer that YAML 1.1 reads instead of an unquoted N:M (2:4 is 124 in base 60).
    """
    text = spec.strip() if isinstance(spec, str) else quoted(spec)
    if text == "dense":
        return Unstructured(0.0)
    if match := re.fullmatch(r"(-?\d{1,20}):(-?\d{1,20})", text):
        return NM(int(match[1]), int(match[2]))
    try:
        value = float(text)
    except ValueError:
        raise ValueError(
            f"sparsity={quoted(text)}: not a pattern; use a fraction such as 0.5, N:M such as 2:4, or dense"
        ) from None
    if not 0 <= value < 1:
        raise ValueError(f"sparsity={quoted(text)}: must be a fraction of zeros, 0 <= sparsity < 1{_suggestion(value)}")
    return Unstructured(value)


def _suggestion(value: float) -> str:
    """What a number outside [0, 1) was probably meant to be."""
    meant = []
    if 1 < value < 100:
        meant.append(f"; for {value:g} % write {value / 100:g}")
    if value.is_integer():
        n, m = divmod(int(value), 60)
        if 0 < n < m:
            meant.append(f'; YAML reads an unquoted {n}:{m} as {int(value)}, so quote it: pattern: "{n}:{m}"')
    return "".join(meant)
