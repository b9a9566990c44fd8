"""A plan from a file: written by hand, by another program, or the one of an earlier run."""

import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml  # comes with omegaconf

from nnprune.allocations.base import Allocation, Plan, Shapes, check_widths, mean
from nnprune.patterns import NM, SparsityPattern, parse_pattern

TOLERANCE = 0.0005
"""Sparsities of a table have three digits: a plan must not be further from the one that it is listed under."""


class FromFile(Allocation):
    """The patterns that a JSON or YAML file tells of.

    Either a mapping, whose keys are linear names, decoder layers by number, or glob patterns for linear names, and whose
    values are sparsities, N:M or dense:

        "*": 0.5
        0: 0.4
        "model.layers.3.mlp.*": "2:4"

    The last key that fits a linear counts. Or a record of nnprune, or its list `per_linear`: the plan of that run.

    Args:
        path: the file.

    Raises:
        ValueError: a file that is neither. From `check`: linears that no key fits, keys that decide nothing, and a mean of
            the linears' sparsities, weighted by parameters, that is not `sparsity`.
    """

    def __init__(self, path: str) -> None:
        self.path = str(path)
        self.entries = {key: self._pattern(key, value) for key, value in _entries(self._read()).items()}
        if not self.entries:
            raise ValueError(
                f"allocation.path={self.path}: tells of no linear; give a mapping or the record of a completed run"
            )

    def identity(self) -> dict[str, Any]:
        """A hash of what the file says, whatever else is in it and wherever it lies."""
        said = json.dumps({key: str(pattern) for key, pattern in self.entries.items()})
        return {"path": hashlib.sha256(said.encode()).hexdigest()[:16]}

    def check(self, pattern: SparsityPattern, shapes: Shapes) -> set[SparsityPattern]:
        check_widths(pattern, shapes)
        return set(self.plan(pattern, shapes).values())

    def plan(self, pattern: SparsityPattern, shapes: Shapes, measured: Sequence[float] = ()) -> Plan:
        plan: Plan = {}
        unused = set(self.entries)
        for index, layer in enumerate(shapes):
            for name, (_, num_inputs) in layer.items():
                key = self._key_of(name, index)
                plan[name] = self.entries[key]
                unused.discard(key)
                self._check_linear(name, num_inputs, plan[name], pattern)
        if unused:
            key = next(key for key in self.entries if key in unused)
            raise ValueError(
                f"allocation.path={self.path}: {key} decides nothing: it fits no linear of the model, or later keys fit all of "
                "its linears; correct it or take it out"
            )
        sizes = [num_outputs * num_inputs for layer in shapes for num_outputs, num_inputs in layer.values()]
        found = mean([float(one.sparsity) for one in plan.values()], sizes)
        if abs(found - pattern.sparsity) > (1e-9 if isinstance(pattern, NM) else TOLERANCE):
            raise ValueError(
                f"sparsity={pattern}: the plan of allocation.path={self.path} has the mean sparsity {found:.6g}; "
                f"set sparsity={found:.6g} or change the plan"
            )
        return plan

    def _key_of(self, name: str, index: int) -> str:
        for key in reversed(self.entries):
            if key in (name, str(index)) or fnmatchcase(name, key):
                return key
        raise ValueError(
            f'allocation.path={self.path}: no key fits {name}; add one, or a first line for all others such as "*": 0.5'
        )

    def _check_linear(self, name: str, num_inputs: int, own: SparsityPattern, pattern: SparsityPattern) -> None:
        if isinstance(pattern, NM) and not (isinstance(own, NM) and own.m == pattern.m):
            raise ValueError(
                f"sparsity={pattern}: allocation.path={self.path} gives {name} {own}, which is no N:{pattern.m}; set sparsity to "
                "the plan's mean as a fraction"
            )
        try:
            own.check_width(num_inputs)
        except ValueError as error:
            raise ValueError(f"allocation.path={self.path}: {own} for {name}, which {error}") from None

    def _read(self) -> Any:
        path = Path(self.path).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
            return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except OSError as error:
            raise ValueError(
                f"allocation.path={self.path}: cannot be read ({error.strerror}); give a JSON or YAML file"
            ) from None
        except (ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"allocation.path={self.path}: is no JSON or YAML ({reason}); see conf/allocation/file.yaml"
            ) from None

    def _pattern(self, key: str, value: Any) -> SparsityPattern:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError(f"{value}: not a pattern; use a fraction such as 0.5, N:M such as 2:4, or dense")
            return parse_pattern(value)
        except ValueError as error:
            raise ValueError(f"allocation.path={self.path}: {key}: {error}") from None


def _entries(content: Any) -> dict[str, Any]:
    """Key -> value, of a mapping, a record or a record's list. ValueError for anything else."""
    if isinstance(content, dict) and "per_linear" in content:
        content = content["per_linear"]
    if isinstance(content, list) and all(isinstance(entry, dict) and {"name", "pattern"} <= entry.keys() for entry in content):
        return {entry["name"]: entry["pattern"] for entry in content}
    if isinstance(content, dict):
        return {str(key): value for key, value in content.items()}
    return {}
