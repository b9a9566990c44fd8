"""The contract between a run and an allocation, and the rules that every plan obeys.

A plan gives each linear a pattern. Whatever a method would like, the mean of the linears' sparsities, weighted by their
parameters, is the sparsity that was asked for, so that allocations are compared at the same size of model.

Letters: L decoder layers, O output features, I input features, s the sparsity asked for, p_l the parameters of the linears
of decoder layer l, s_l its sparsity. N:M keeps n of every m.
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any, Literal

from torch import Tensor

from nnprune.patterns import NM, PatternError, SparsityPattern, Unstructured

log = logging.getLogger(__name__)

Shapes = Sequence[dict[str, tuple[int, int]]]
"""A dict a decoder layer: linear name -> (O, I)."""

Plan = dict[str, SparsityPattern]
"""Linear name -> pattern."""

MAX_SPARSITY = 0.99
"""What a decoder layer loses at most, unless more is asked of all: a layer without weights passes nothing on."""

DECIMALS = 12
"""Digits of a sparsity: without the noise beyond them 0.55 of 100 weights are 55, and not 56."""

MAX_WAYS = 4096
"""Ways of rounding that are followed up at a time, where decoder layers are of many sizes."""


@dataclass
class DenseLayer:
    """What an allocation may look at of one dense decoder layer, by the names of its linears.

    Args:
        weights: (O, I), in the model's dtype.
        squared_norms: E[x_i^2] of the inputs (I,), float32; empty where no calibration is asked for.
        samples: some of the inputs (tokens, I), float32; likewise.
    """

    weights: dict[str, Tensor]
    squared_norms: dict[str, Tensor]
    samples: dict[str, Tensor]

    @property
    def num_weights(self) -> int:
        """p_l."""
        return sum(W.numel() for W in self.weights.values())

    def score(self, name: str) -> Tensor:
        """Wanda's score |W_ij| sqrt(E[x_j^2]) (O, I), float32 (Sun et al. 2023, arXiv:2306.11695)."""
        return self.weights[name].abs().float() * self.squared_norms[name].sqrt()


class Allocation(ABC):
    """Gives each linear its pattern."""

    looks_at: Literal["nothing", "weights", "inputs"] = "nothing"
    """What an importance pass over the dense model shows to `measure` before anything is pruned."""

    def check(self, pattern: SparsityPattern, shapes: Shapes) -> set[SparsityPattern]:
        """The patterns that a plan may hold, for the pruner to agree to. Raises ValueError, before any weight is read, for
        what can be known from shapes to be wrong."""
        check_widths(pattern, shapes)
        return {pattern}

    def key(self, pattern: SparsityPattern) -> str:
        """What `measure` is asked for: the same key is measured once."""
        options = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    def measure(self, layer: DenseLayer, pattern: SparsityPattern) -> float:
        """One number that tells what the plan needs to know of a decoder layer."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Settings that stand for others in the fingerprint, such as the content of a file for its path."""
        return {}

    @abstractmethod
    def plan(self, pattern: SparsityPattern, shapes: Shapes, measured: Sequence[float] = ()) -> Plan:
        """The plan whose mean sparsity is that of `pattern`, from the numbers (L,) that `measure` gave."""


class LayerwiseAllocation(Allocation):
    """One sparsity a decoder layer. Subclasses tell in `sparsities` which they would like; the rules are here.

    For N:M every layer keeps the M and gets an n of its own from 1 to M - 1.
    """

    looks_at = "inputs"

    @abstractmethod
    def sparsities(self, measured: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
        """The s_l (L,) wanted, of mean s; they may leave [0, 1). `sizes` are the p_l."""

    def check(self, pattern: SparsityPattern, shapes: Shapes) -> set[SparsityPattern]:
        check_widths(pattern, shapes)
        if not all(shapes):
            raise ValueError(f"allocation: {type(self).__name__} finds a decoder layer without linears; use allocation=uniform")
        if isinstance(pattern, Unstructured):
            return {pattern}
        if pattern.m == 2:
            raise ValueError(
                f"sparsity={pattern}: {type(self).__name__} cannot vary it, 1:2 is the only N:2; use allocation=uniform or a larger M"
            )
        return {NM(n, pattern.m) for n in range(1, pattern.m)}

    def plan(self, pattern: SparsityPattern, shapes: Shapes, measured: Sequence[float] = ()) -> Plan:
        sizes = [sum(num_outputs * num_inputs for num_outputs, num_inputs in layer.values()) for layer in shapes]
        wanted = self.sparsities(measured, sizes, float(pattern.sparsity))
        if isinstance(pattern, NM):
            patterns = mixed_nm(wanted, sizes, pattern)
            if len(set(patterns)) == 1 and len(set(measured)) > 1:
                log.warning("warning: no layer is moved away from %s; raise allocation.strength or choose a larger M", pattern)
        else:
            highest = max(MAX_SPARSITY, float(pattern.sparsity))
            if max(wanted) > highest:
                log.warning("warning: a layer would lose more than %g of its weights; lower allocation.strength", highest)
            kept = within(wanted, sizes, float(pattern.sparsity), 0, highest)
            patterns = [Unstructured(round(sparsity, DECIMALS)) for sparsity in kept]
        return {name: pattern for layer, pattern in zip(shapes, patterns, strict=True) for name in layer}


def spread(importance: Sequence[float], sizes: Sequence[int], sparsity: float, strength: float) -> list[float]:
    """s_l = s + mean(d) - d_l with d_l = 2 strength (importance_l - min) / (max - min), the density that more important layers
    get on top; the mean is weighted by p_l. OWL's map (Yin et al. 2023, section 4.1). Equal importance gives s to all."""
    lowest, highest = min(importance), max(importance)
    if lowest == highest:
        return [sparsity] * len(importance)
    extra = [2 * strength * (one - lowest) / (highest - lowest) for one in importance]
    return [sparsity + mean(extra, sizes) - one for one in extra]


def mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """The mean of `values` (L,) weighted by `sizes` (L,)."""
    return math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def within(sparsities: Sequence[float], sizes: Sequence[int], target: float, lower: float, upper: float) -> list[float]:
    """`sparsities` (L,) clipped to [lower, upper], with what that took away or gave spread evenly over the layers that can
    have it: clip(s_l + c) for the one c of which the mean is `target`. It is found by bisection, as the mean grows with c."""

    def clipped(shift: float) -> list[float]:
        return [min(max(one + shift, lower), upper) for one in sparsities]

    if clipped(0) == list(sparsities) and abs(mean(sparsities, sizes) - target) < 1e-14:
        return list(sparsities)
    below, above = lower - max(sparsities), upper - min(sparsities)
    for _ in range(100):  # more than a float has bits
        middle = (below + above) / 2
        below, above = (middle, above) if mean(clipped(middle), sizes) < target else (below, middle)
    return clipped(above)


def mixed_nm(sparsities: Sequence[float], sizes: Sequence[int], pattern: NM) -> list[NM]:
    """n_l:M for each layer, 0 < n_l < M, near the wanted `sparsities` (L,), with a parameter-weighted mean of n_l that is N.

    With d_l = M (1 - s_l), clipped to [1, M - 1] with the mean kept, each n_l is d_l rounded down or up: of all ways that give
    the mean exactly, the one of least sum p_l (n_l - d_l)^2. For layers of equal size that is rounding by largest
    remainder; the search is over the weights kept so far, of which there are few, as sizes repeat themselves.

    Raises ValueError when layers of different size leave no way that was found.
    """
    m = pattern.m
    wanted = [m * (1 - one) for one in within(sparsities, sizes, pattern.sparsity, 1 / m, 1 - 1 / m)]
    found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # weights kept -> distance, and the n_l so far
    for density, size in zip(wanted, sizes, strict=True):
        lowest = min(max(math.floor(density), 1), m - 1)
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for kept, (distance, chosen) in found.items():
            for n in range(lowest, min(lowest + 2, m)):
                further = distance + size * (n - density) ** 2
                if kept + n * size not in longer or further < longer[kept + n * size][0]:
                    longer[kept + n * size] = further, (*chosen, n)
        found = dict(nsmallest(MAX_WAYS, longer.items(), key=lambda way: way[1][0]))
    if pattern.n * sum(sizes) not in found:
        raise ValueError(
            f"sparsity={pattern}: decoder layers of {min(sizes)} to {max(sizes)} weights were not given N:{m} with exactly "
            f"that mean; use allocation=uniform, or an unstructured sparsity such as sparsity={pattern.sparsity:g}"
        )
    return [NM(n, m) for n in found[pattern.n * sum(sizes)][1]]


def check_widths(pattern: SparsityPattern, shapes: Shapes) -> None:
    """Raise ValueError when there is no linear, or a linear's width does not suit the pattern."""
    if not any(shapes):
        raise ValueError("the decoder layers hold no linear that could be pruned")
    for layer in shapes:
        for name, (_, num_inputs) in layer.items():
            try:
                pattern.check_width(num_inputs)
            except PatternError as error:
                raise ValueError(
                    f"sparsity={pattern}: {name} {error}; choose another N:M or an unstructured sparsity"
                ) from None
