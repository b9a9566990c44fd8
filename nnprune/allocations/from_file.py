"""A plan from a file: written by hand, by another program, or the plan of an earlier run."""

from collections.abc import Sequence
from typing import Any

from nnprune.allocations.base import Plan, Shapes, check_widths, mean
from nnprune.allocations.named_patterns import NamedPatterns, read_patterns
from nnprune.checks import quoted
from nnprune.patterns import NM, SparsityPattern

TOLERANCE = 0.0005  # between the plan's mean sparsity and the sparsity it is listed under: tables have three digits


class FromFile(NamedPatterns):
    """The patterns in a JSON or YAML file.

    Either a mapping from linear names, numbers of decoder layers, or patterns of linear names to sparsities, N:M or dense, in which the
    last key that matches a linear counts:

        "*": 0.5
        0: 0.4
        "model.layers.3.mlp.*": "2:4"

    Or a record of nnprune, or its list `per_linear`: the plan of that run.

    Args:
        path: the file.

    Raises:
        ValueError: a file that is neither. From `check`: linears that no key matches, keys without effect, and a mean of the
            linears' sparsities, weighted by parameters, that differs from `sparsity`.
    """

    later_first = True

    def __init__(self, path: str) -> None:
        where = f"allocation.path={quoted(str(path))}"
        super().__init__(where, read_patterns(where, str(path), "conf/allocation/file.yaml"))

    def identity(self) -> dict[str, Any]:
        """A hash of the patterns: neither the path nor anything else in the file counts."""
        return {"path": self.digest}

    def check(self, pattern: SparsityPattern, shapes: Shapes) -> set[SparsityPattern]:
        check_widths(pattern, shapes)
        return set(self.plan(pattern, shapes).values())

    def plan(self, pattern: SparsityPattern, shapes: Shapes, measured: Sequence[float] = ()) -> Plan:
        plan: Plan = {}
        for name, _, own in self.decide(shapes):
            if own is None:
                raise self._error(f'no key fits {name}; add one, or a first line for all others such as "*": 0.5')
            if isinstance(pattern, NM) and not (isinstance(own, NM) and own.m == pattern.m):
                raise ValueError(
                    f"sparsity={pattern}: {self._where} gives {name} {own}, which is no N:{pattern.m}; set sparsity to the plan's "
                    "mean as a fraction"
                )
            plan[name] = own
        sizes = [num_outputs * num_inputs for layer in shapes for num_outputs, num_inputs in layer.values()]
        found = mean([float(one.sparsity) for one in plan.values()], sizes)
        if abs(found - pattern.sparsity) > (1e-9 if isinstance(pattern, NM) else TOLERANCE):
            raise ValueError(
                f"sparsity={pattern}: the plan of {self._where} has the mean sparsity {found:.6g}; set sparsity={found:.6g} or "
                "change the plan"
            )
        return plan
