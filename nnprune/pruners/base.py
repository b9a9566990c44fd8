"""The contract between the layer-wise engine and a pruner.

A pruner does no I/O, registers no hooks and moves nothing between devices. The engine shows it the inputs of each linear, asks for
the pruned weight, and checks the result against the pattern.

Three base classes, from simple to general:
  ScorePruner                     a score for each weight; kept weights do not change
  Pruner                          a pruned weight from a weight, a statistic and a pattern
  BaseActAwareUnstructuredPruner  the interface of the nn-pruning toolkit; collects its own statistics

Letters: B batch, T tokens, O output features, I input features.
"""

from abc import ABC, abstractmethod
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import Tensor

from nnprune.checks import is_set
from nnprune.patterns import NM, ComparisonGroup, SparsityPattern, Unstructured, keep_where
from nnprune.solvers.quantization import Quantization
from nnprune.statistics import InputStatistic


class Pruner(ABC):
    """Prunes one linear at a time. Subclasses override `prune_linear` and name the `statistic` they need."""

    statistic: type[InputStatistic] | None = None
    """What the engine accumulates from each linear's inputs; None: the method needs weights only."""

    matrix_copies, weight_copies = 1, 4
    """float32 matrices (I, I) and weights (O, I) that it holds at its peak, besides statistics: for estimates of memory."""

    corrects_biases = False
    """Whether `update.bias=auto` corrects the biases of the linears that it prunes: where it optimises the weights that it keeps."""

    # Created on first use, so that a subclass need not call super().__init__().
    @cached_property
    def statistics(self) -> dict[str, InputStatistic]:
        """Linear name -> its statistic; linears that receive the same input share one object."""
        return {}

    @cached_property
    def notes(self) -> dict[str, dict[str, Any]]:
        """Linear name -> entries for its part of the record, such as a damping that had to be raised; a scalar may stay on the device."""
        return {}

    @property
    def quantization(self) -> Quantization | None:
        """The grid that all kept weights are rounded to, if they are."""
        return None

    @property
    def needs_calibration(self) -> bool:
        """Whether the method needs the inputs of linears."""
        return self.statistic is not None or not self.shares_statistics

    @property
    def shares_statistics(self) -> bool:
        """Whether one statistic serves all linears of one input; False for a subclass that collects its own."""
        return type(self).add_linear_activations is Pruner.add_linear_activations

    def validate(self, pattern: SparsityPattern) -> None:
        """Raise ValueError if the method does not support `pattern`. Called before the model is loaded."""

    def add_linear_activations(self, module_name: str, X: Tensor) -> None:
        """Accumulate the inputs X (B, T, I) of the linear `module_name`."""
        if self.statistic is not None:
            self.statistics.setdefault(module_name, self.statistic()).add(X)

    def clear_linear_activations(self, module_name: str) -> None:
        """Forget the statistics of the linear `module_name`."""
        self.statistics.pop(module_name, None)

    @abstractmethod
    def prune_linear(self, W: Tensor, module_name: str, pattern: SparsityPattern) -> Tensor:
        """The pruned weight (O, I), dtype and device of `W` (O, I), which stays unmodified."""

    def prune_group(self, weights: dict[str, Tensor], patterns: dict[str, SparsityPattern]) -> dict[str, Tensor]:
        """The pruned weights (O, I), by name, of linears that receive the same input: what the engine calls.

        By default one linear after the other; override it to share work between linears, without modifying `weights`.
        """
        return {name: self.prune_linear(W.clone(), name, patterns[name]) for name, W in weights.items()}  # some work in place

    def prune_linear_unstruct(self, W: Tensor, module_name: str, k: int) -> Tensor:
        """The pruned weight (O, I) with at least `k` zeros."""
        return self.prune_linear(W, module_name, Unstructured(Fraction(k, W.numel())))

    def prune_linear_nm(self, W: Tensor, module_name: str, n: int, m: int) -> Tensor:
        """The pruned weight (O, I) with at most `n` nonzeros in every `m` consecutive inputs."""
        return self.prune_linear(W, module_name, NM(n, m))


class ScorePruner(Pruner):
    """Keeps the weights of the largest scores and does not change them."""

    comparison_group: ComparisonGroup = "row"
    """The weights that an unstructured pattern compares with each other."""

    @abstractmethod
    def score(self, W: Tensor, module_name: str) -> Tensor:
        """Scores (O, I), float32, larger = more important, without NaN."""

    def prune_linear(self, W: Tensor, module_name: str, pattern: SparsityPattern) -> Tensor:
        score = self.score(W, module_name)
        if score.shape != W.shape or is_set(score.max().isnan()):
            found = f"NaN, or {tuple(score.shape)} for {tuple(W.shape)}"
            raise ValueError(f"{module_name}: {type(self).__name__}.score returned {found}")
        return keep_where(pattern.mask(score, per=self.comparison_group), W)


class BaseActAwareUnstructuredPruner(Pruner):
    """The interface of the nn-pruning toolkit, whose classes run unchanged: a pruner that keeps its own statistics.

    For each linear the engine calls `add_linear_activations` once for each batch, then `prune_linear_unstruct` or
    `prune_linear_nm`, then `clear_linear_activations`.
    """

    @abstractmethod
    def add_linear_activations(self, module_name: str, X: Tensor) -> None:
        """Accumulate what the method needs from the inputs X (B, T, I)."""

    @abstractmethod
    def clear_linear_activations(self, module_name: str) -> None:
        """Forget what was accumulated for `module_name`."""

    @abstractmethod
    def prune_linear_unstruct(self, W: Tensor, module_name: str, k: int) -> Tensor:
        """A weight (O, I) with at least `k` zeros, 0 < k < O x I."""

    @abstractmethod
    def prune_linear_nm(self, W: Tensor, module_name: str, n: int, m: int) -> Tensor:
        """A weight (O, I) with at most `n` nonzeros in every `m` consecutive inputs."""

    def prune_linear(self, W: Tensor, module_name: str, pattern: SparsityPattern) -> Tensor:
        if isinstance(pattern, NM):
            return self.prune_linear_nm(W, module_name, pattern.n, pattern.m)
        return self.prune_linear_unstruct(W, module_name, pattern.num_zeros(W.numel()))
