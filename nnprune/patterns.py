"""Sparsity patterns: how many weights of a linear must be zero, which ones may be, and how a weight is checked.

Letters: O output features, I input features. A mask is bool, True = keep. Knows no model and no pruner.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from nnprune.checks import quoted
from nnprune.kernels.selection import keep_largest

ComparisonGroup = Literal["row", "matrix"]

MAX_M = 1 << 20
"""Upper bound of M in N:M: no linear has so many inputs."""


class PatternError(ValueError):
    """A weight or a width that does not fit its sparsity pattern."""


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

    def measure(self, weight: Tensor) -> Tensor:
        """What `judge` needs to know of `weight`, int64 () on its device: the number of zeros."""
        return zeros_on_device(weight)

    def judge(self, measured: int, size: int) -> None:
        """Raise PatternError when a weight of `size` entries has fewer than ceil(sparsity x size) zeros."""
        if measured < (asked := self.num_zeros(size)):
            raise PatternError(f"has {measured} zeros, fewer than the {asked} that sparsity {self} asks for")

    def check(self, weight: Tensor) -> None:
        """Raise PatternError when `weight` (O, I) has fewer than ceil(sparsity x O x I) zeros. The host waits for it."""
        self.judge(int(self.measure(weight)), weight.numel())


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

    def measure(self, weight: Tensor) -> Tensor:
        """What `judge` needs to know of `weight`, int32 () on its device: the nonzeros of the fullest group."""
        self.check_width(weight.shape[-1])
        return weight.bool().unflatten(-1, (-1, self.m)).sum(-1, dtype=torch.int32).max()

    def judge(self, measured: int, size: int) -> None:
        """Raise PatternError when a group of m inputs has more than n nonzeros."""
        if measured > self.n:
            raise PatternError(f"keeps {measured} weights in a group of {self.m}, more than {self} allows")

    def check(self, weight: Tensor) -> None:
        """Raise PatternError when a group of m inputs of `weight` (O, I) has more than n nonzeros. The host waits for it."""
        self.judge(int(self.measure(weight)), weight.numel())


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
            meant.append(f'; YAML reads an unquoted {n}:{m} as {int(value)}, so quote it: "{n}:{m}"')
    return "".join(meant)
