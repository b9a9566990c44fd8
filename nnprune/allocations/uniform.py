"""The same pattern for every linear."""

from collections.abc import Sequence

from nnprune.allocations.base import Allocation, Plan, Shapes
from nnprune.patterns import SparsityPattern


class Uniform(Allocation):
    """The same pattern for every linear, as in SparseGPT, Wanda and most other methods."""

    def plan(self, pattern: SparsityPattern, shapes: Shapes, measured: Sequence[float] = ()) -> Plan:
        return {name: pattern for layer in shapes for name in layer}
