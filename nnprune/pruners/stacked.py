"""A base for methods that prune all linears of one input together, their outputs side by side in one weight.

Letters: O output features, I input features.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from nnprune.patterns import SparsityPattern
from nnprune.pruners.base import Pruner
from nnprune.statistics import Hessian


class StackedPruner(Pruner):
    """Prunes from the hessian. Subclasses override `prune_stack`, which sees linears that share an input and a pattern as one."""

    statistic = Hessian
    corrects_biases = True
    matrix_copies, weight_copies = 3, 8

    @abstractmethod
    def prune_stack(self, weight_IO: Tensor, sizes: list[int], pattern: SparsityPattern, names: list[str]) -> Tensor:
        """The pruned weight (I, O).

        Args:
            weight_IO: float32, contiguous, may be overwritten; transposed, so that an input feature is one row.
            sizes: output features of each linear; their sum is O.
            pattern: each linear has to fulfil it by itself.
            names: of the linears; they share the statistic of the first.
        """

    def prune_linear(self, W: Tensor, module_name: str, pattern: SparsityPattern) -> Tensor:
        return self.prune_group({module_name: W}, {module_name: pattern})[module_name]

    def prune_group(self, weights: dict[str, Tensor], patterns: dict[str, SparsityPattern]) -> dict[str, Tensor]:
        stacks: dict[SparsityPattern, list[str]] = {}
        for name, pattern in patterns.items():
            stacks.setdefault(pattern, []).append(name)
        pruned: dict[str, Tensor] = {}
        for pattern, names in stacks.items():
            sizes = [len(weights[name]) for name in names]
            weight_IO = torch.cat([weights[name].float().t() for name in names], dim=1)
            pieces = self.prune_stack(weight_IO, sizes, pattern, names).split(sizes, dim=1)
            pruned |= {name: piece.t().to(weights[name].dtype).contiguous() for name, piece in zip(names, pieces, strict=True)}
        return pruned
