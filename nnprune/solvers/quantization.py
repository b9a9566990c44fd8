"""The grid of values that kept weights are rounded to: group-wise, symmetric.

A weight is level x scale with an integer level in [-K, K], K = 2^(bits - 1) - 1, and one scale for `group_size` consecutive inputs of
an output. A scale has 9 - bits significant bits, so that each product has at most 8: it is exact in bfloat16 as well as in float16 and
float32, and levels and scales can be computed from stored weights alone.

Letters: O output features, I input features, G inputs of a group, N groups of a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nnprune.checks import check_count
from nnprune.patterns import SparsityPattern

SHRINK = tuple(1 - step / 20 for step in range(12))
"""Fractions of the scale that holds the largest weight, tried for each group."""

SCALE_BITS = 16
"""What a scale counts in `bits_per_weight`."""

MAX_GROUP_SIZE = 1 << 20  # no linear has so many inputs


@dataclass(frozen=True)
class Quantization:
    """A grid of `bits` for groups of `group_size` inputs."""

    bits: int
    group_size: int

    @classmethod
    def checked(cls, part: str, bits: int, group_size: int) -> "Quantization":
        """From the settings of `part`, such as "pruner". Raises ValueError for one out of range."""
        check_count(f"{part}.group_size", group_size, 1, MAX_GROUP_SIZE)
        return cls(check_count(f"{part}.bits", bits, 2, 8), group_size)

    @property
    def most(self) -> int:
        """K, the highest level."""
        return 2 ** (self.bits - 1) - 1

    def scale(self, weight_GO: Tensor, deviation_G: Tensor | None = None) -> Tensor:
        """Scales (O,) of one group of weights, float32, zero where pruned: of those tried the one with the least squared error.

        An error counts in units of `deviation_G`, by default 1. Scales are positive.
        """
        largest_O = weight_GO.abs().amax(0) / self.most
        best_O = least_O = None
        for factor in SHRINK:
            scale_O = self._upwards(largest_O * factor)
            error_GO = self.round(weight_GO, scale_O).sub_(weight_GO)
            if deviation_G is not None:
                error_GO.div_(deviation_G[:, None])
            error_O = error_GO.square_().sum(0)
            if best_O is None:
                best_O, least_O = scale_O, error_O
            else:
                is_less = error_O < least_O
                best_O, least_O = torch.where(is_less, scale_O, best_O), torch.where(is_less, error_O, least_O)
        return best_O

    def round(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The nearest values of the grid to weights, float32, with scales that broadcast against them."""
        return (weight / scale).round_().clamp_(-self.most, self.most).mul_(scale)

    def round_all(self, weight_OI: Tensor) -> Tensor:
        """A weight (O, I), float32, with its nonzeros rounded group by group."""
        groups = weight_OI.split(self.group_size, 1)
        return torch.cat([self.round(group, self.scale(group.t())[:, None]) for group in groups], 1)

    def scales_of(self, weight_OI: Tensor) -> Tensor:
        """Scales (O, N) of a weight (O, I) on the grid, in its dtype: positive, so that weight / scale is a level.

        They need not be those that it was rounded with: where all levels of a group are even, say, twice the scale gives the same
        weights. Raises ValueError if no scale gives the weights of a group.
        """
        return torch.stack([self._scale_of(group) for group in weight_OI.float().split(self.group_size, 1)], 1).to(
            weight_OI.dtype
        )

    def _scale_of(self, group_OG: Tensor) -> Tensor:
        """(O,), float32."""
        largest_O = group_OG.abs().amax(1)
        scale_O = torch.ones_like(largest_O)
        missing = largest_O.bool()  # any scale gives zeros
        for level in range(self.most, 0, -1):
            if not bool(missing.any()):
                return scale_O
            rows, tried = group_OG[missing], largest_O[missing] / level
            is_right = (self._upwards(tried) == tried) & (self.round(rows, tried[:, None]) == rows).all(1)
            places = missing.nonzero()[is_right, 0]
            scale_O[places] = tried[is_right]
            missing[places] = False
        if bool(missing.any()):
            raise ValueError(f"its weights are on no grid of {self.bits} bits with a scale for {self.group_size} inputs")
        return scale_O

    def _upwards(self, scale: Tensor) -> Tensor:
        """The next scales that are not below positive ones, float32, with few enough significant bits and products that float16 has."""
        cut = (1 << (15 + self.bits)) - 1  # the last 15 + bits of float32's 24 significant bits
        return ((scale.view(torch.int32) + cut) & ~cut).view(torch.float32).clamp_min(2.0 ** (-16 - self.bits))

    def levels(self, weight_OI: Tensor, scale_ON: Tensor) -> Tensor:
        """Levels (O, I), int8, of a weight on the grid and its scales. Raises ValueError for a weight that is no level times its scale."""
        scale_OI = scale_ON.float().repeat_interleave(self.group_size, 1)[:, : weight_OI.shape[1]]
        if bool((wrong := self.round(weight_OI.float(), scale_OI) != weight_OI).any()):
            raise ValueError(f"{int(wrong.sum())} weights are no level of {self.bits} bits times their scale")
        return (weight_OI.float() / scale_OI).to(torch.int8)

    def summary(self, shapes: Mapping[str, tuple[int, int]], plan: Mapping[str, SparsityPattern]) -> dict[str, float]:
        """The entry of a record: bits, group_size and bits_per_weight, the mean over the linears of `shapes` that `plan` prunes.

        Counted are the levels of what a pattern keeps, a bit a weight that says which these are, and the scales.
        """
        size = total = 0.0
        for name, (num_outputs, num_inputs) in shapes.items():
            if sparsity := float(plan[name].sparsity):
                num_groups = -(-num_inputs // self.group_size)
                size += num_outputs * num_inputs
                total += num_outputs * (num_inputs * ((1 - sparsity) * self.bits + 1) + num_groups * SCALE_BITS)
        return {"bits": self.bits, "group_size": self.group_size, "bits_per_weight": total / size if size else 0.0}
