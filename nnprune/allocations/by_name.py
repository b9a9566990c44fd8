"""Different patterns by the names of linears, and the one asked for in the others."""

from collections.abc import Mapping, Sequence
from typing import Any

from nnprune.allocations.base import Plan, Shapes, check_widths
from nnprune.allocations.named_patterns import NamedPatterns, read_patterns
from nnprune.checks import quoted
from nnprune.patterns import SparsityPattern


class ByName(NamedPatterns):
    """The pattern of the first key that fits a linear, and `sparsity` where none fits:

        "model.layers.0.*": dense
        "*.mlp.*": "2:4"
        "*.self_attn.*": 0.5

    Nothing is said of the mean: `linear_sparsity` in the record is what comes of it.

    Args:
        patterns: such a mapping, of full names, numbers of decoder layers, globs, or regular expressions after `re:` to fractions of
            zeros, N:M or dense.
        path: a YAML or JSON file with one, in place of `patterns`.

    Raises:
        ValueError: neither or both of them, or values that are no patterns. From `check`: keys without effect, and an N:M that does not
            fit the width of a linear.
    """

    def __init__(self, patterns: Mapping[str, float | str] | None = None, path: str | None = None) -> None:
        if bool(patterns) == (path is not None):
            value = quoted(patterns if patterns else path)
            reason = 'give either patterns, such as {*.mlp.*: "2:4"}, or path=FILE with such a mapping'
            raise ValueError(f"allocation.{'patterns' if patterns else 'path'}={value}: {reason}")
        where = f"allocation.patterns={quoted(patterns)}" if patterns else f"allocation.path={quoted(str(path))}"
        super().__init__(where, patterns or read_patterns(where, str(path), "conf/allocation/by_name.yaml"))

    def identity(self) -> dict[str, Any]:
        """The patterns in order, wherever they come from."""
        return {"path": None, "patterns": self.digest}

    def is_dense(self, pattern: SparsityPattern) -> bool:
        return not pattern.sparsity and not any(own.sparsity for own in self.entries.values())

    def typical(self, pattern: SparsityPattern) -> SparsityPattern:
        return max(pattern, *self.entries.values(), key=lambda one: one.sparsity)

    def check(self, pattern: SparsityPattern, shapes: Shapes) -> set[SparsityPattern]:
        others = {name: (1, num_inputs) for name, num_inputs, own in self.decide(shapes) if own is None}
        if others:
            check_widths(pattern, [others])
        return set(self.plan(pattern, shapes).values())

    def plan(self, pattern: SparsityPattern, shapes: Shapes, measured: Sequence[float] = ()) -> Plan:
        return {name: own or pattern for name, _, own in self.decide(shapes)}
