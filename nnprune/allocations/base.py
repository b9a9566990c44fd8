"""The contract between a run and an allocation, and the rules for every plan.

A plan maps each linear to a pattern. Whatever a method proposes, the mean of the linears' sparsities, weighted by their parameters,
is the requested sparsity, so that allocations are compared at the same model size.

Letters: L decoder layers, O output features, I input features, s the requested sparsity, p_l the parameters of the linears of decoder
layer l, s_l its sparsity. N:M keeps n of every m.
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

Shapes = Sequence[dict[str, tuple[int, int]]]  # for each decoder layer: linear name -> (O, I)
Plan = dict[str, SparsityPattern]  # linear name -> pattern
MAX_SPARSITY = 0.99  # of a decoder layer, unless s is higher: a layer without weights passes nothing on
DECIMALS = 12  # of a sparsity: rounding noise beyond them would turn 0.55 of 100 weights into 56
MAX_PARTIAL = 4096  # partial roundings that `mixed_nm` keeps; only decoder layers of many sizes give as many


@dataclass
class DenseLayer:
    """What an allocation sees of one dense decoder layer, by linear name; no inputs if it does not look at them."""

    weights: dict[str, Tensor]  # (O, I), in the model's dtype
    squared_norms: dict[str, Tensor]  # E[x_i^2] of the inputs (I,), float32
    samples: dict[str, Tensor]  # a sample of the inputs (tokens, I), float32

    @property
    def num_weights(self) -> int:
        """p_l."""
        return sum(W.numel() for W in self.weights.values())

    def score(self, name: str) -> Tensor:
        """Wanda's score |W_ij| sqrt(E[x_j^2]) (O, I), float32 (Sun et al. 2023, arXiv:2306.11695)."""
        return self.weights[name].abs().float() * self.squared_norms[name].sqrt()


class Allocation(ABC):
    """Decides the pattern of each linear."""

    looks_at: Literal["nothing", "weights", "inputs"] = "nothing"
    """What `measure` needs from a pass over the dense model before anything is pruned."""

    def check(self, pattern: SparsityPattern, shapes: Shapes) -> set[SparsityPattern]:
        """The patterns that a plan may contain, so that the pruner can validate them. Raises ValueError, before any weight is read,
        for whatever the shapes show to be wrong."""
        check_widths(pattern, shapes)
        return {pattern}

    def key(self, pattern: SparsityPattern) -> str:
        """Identifies what `measure` computes: equal keys are measured once."""
        options = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"

    def measure(self, layer: DenseLayer, pattern: SparsityPattern) -> float:
        """The number by which `plan` ranks a decoder layer."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Settings to replace in the fingerprint, such as a path by a hash of the file's content."""
        return {}

    def typical(self, pattern: SparsityPattern) -> SparsityPattern:
        """A pattern that takes as long to prune as the plan's."""
        return pattern

    def is_dense(self, pattern: SparsityPattern) -> bool:
        """Whether nothing is pruned."""
        return pattern == Unstructured(0.0)

    @abstractmethod
    def plan(self, pattern: SparsityPattern, shapes: Shapes, measured: Sequence[float] = ()) -> Plan:
        """The plan, with the mean sparsity of `pattern`, from the numbers that `measure` returned for the layers with linears."""


class LayerwiseAllocation(Allocation):
    """One sparsity for each decoder layer. Subclasses propose them in `sparsities`; this class applies the rules.

    For N:M every layer has the same M and its own n from 1 to M - 1. L counts the layers with linears.
    """

    looks_at: Literal["weights", "inputs"] = "inputs"

    @abstractmethod
    def sparsities(self, measured: Sequence[float], sizes: Sequence[int], sparsity: float) -> list[float]:
        """The proposed s_l (L,), of mean s; they may lie outside [0, 1). `sizes` are the p_l."""

    def check(self, pattern: SparsityPattern, shapes: Shapes) -> set[SparsityPattern]:
        check_widths(pattern, shapes)
        if isinstance(pattern, Unstructured):
            return {pattern}
        if pattern.m == 2:
            raise ValueError(
                f"sparsity={pattern}: {type(self).__name__} cannot vary it, 1:2 is the only N:2; use allocation=uniform or a larger M"
            )
        return {NM(n, pattern.m) for n in range(1, pattern.m)}

    def plan(self, pattern: SparsityPattern, shapes: Shapes, measured: Sequence[float] = ()) -> Plan:
        layers = [layer for layer in shapes if layer]
        sizes = [sum(num_outputs * num_inputs for num_outputs, num_inputs in layer.values()) for layer in layers]
        wanted = self.sparsities(measured, sizes, float(pattern.sparsity))
        patterns: Sequence[SparsityPattern]
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
        return {name: pattern for layer, pattern in zip(layers, patterns, strict=True) for name in layer}


def spread(importance: Sequence[float], sizes: Sequence[int], sparsity: float, strength: float) -> list[float]:
    """s_l = s + mean(d) - d_l with d_l = 2 strength (importance_l - min) / (max - min), the extra density of more important layers.

    The mean is weighted by p_l. OWL's mapping (Yin et al. 2023, arXiv:2310.05175, section 4.1). Equal importance gives s to all.
    """
    lowest, highest = min(importance), max(importance)
    if lowest == highest:
        return [sparsity] * len(importance)
    extra = [2 * strength * (one - lowest) / (highest - lowest) for one in importance]
    return [sparsity + mean(extra, sizes) - one for one in extra]


def mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """The mean of `values` (L,) weighted by `sizes` (L,)."""
    return math.fsum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def within(sparsities: Sequence[float], sizes: Sequence[int], target: float, lower: float, upper: float) -> list[float]:
    """`sparsities` (L,) clipped to [lower, upper] with the weighted mean `target`.

    The result is clip(s_l + c), with c found by bisection: the mean increases with c.
    """

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
    """n_l:M for each layer, 0 < n_l < M, near the proposed `sparsities` (L,), with a parameter-weighted mean of n_l equal to N.

    With d_l = M (1 - s_l), clipped to [1, M - 1] with the mean kept, each n_l is d_l rounded down or up. Of all roundings that give
    the mean exactly, this is the one of smallest sum p_l (n_l - d_l)^2: rounding by largest remainder if layers have equal sizes.
    Dynamic programming over the number of weights kept so far, which takes few values because sizes repeat.

    Raises ValueError if no such rounding was found, which happens only for layers of different sizes.
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
        found = dict(nsmallest(MAX_PARTIAL, longer.items(), key=lambda way: way[1][0]))
    if pattern.n * sum(sizes) not in found:
        raise ValueError(
            f"sparsity={pattern}: decoder layers of {min(sizes)} to {max(sizes)} weights were not given N:{m} with exactly "
            f"that mean; use allocation=uniform, or an unstructured sparsity such as sparsity={pattern.sparsity:g}"
        )
    return [NM(n, m) for n in found[pattern.n * sum(sizes)][1]]


def check_widths(pattern: SparsityPattern, shapes: Shapes) -> None:
    """Raise ValueError if there is no linear, or if the pattern does not fit the width of one."""
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
