"""A plan from a file: written by hand, by another program, or the plan of an earlier run."""

import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml  # comes with omegaconf

from nnprune.allocations.base import Allocation, Plan, Shapes, check_widths, mean
from nnprune.checks import quoted
from nnprune.patterns import NM, SparsityPattern, parse_pattern

TOLERANCE = 0.0005  # between the plan's mean sparsity and the sparsity it is listed under: tables have three digits
MAX_JSON_BYTES = 64 << 20  # a record of 100,000 linears takes 25 MB
MAX_YAML_BYTES = 4 << 20  # which is slow to parse


class _Loader(yaml.SafeLoader):
    """YAML without anchors and aliases, by which a few bytes can stand for billions of entries."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            line = event.start_mark.line + 1
            raise ValueError(f"line {line} has the anchor or alias {quoted(event.anchor)}; write its value out")
        return super().compose_node(parent, index)


class FromFile(Allocation):
    """The patterns in a JSON or YAML file.

    Either a mapping from linear names, numbers of decoder layers or glob patterns for linear names to sparsities, N:M or dense, in
    which the last key that matches a linear counts:

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

    def __init__(self, path: str) -> None:
        self.path = str(path)
        self._where = f"allocation.path={quoted(self.path)}"
        self.entries = {key: self._pattern(key, value) for key, value in _entries(self._read()).items()}
        if not self.entries:
            raise self._error("tells of no linear; give a mapping or the record of a completed run")
        self._globs = [key for key in self.entries if any(letter in key for letter in "*?[")]

    def identity(self) -> dict[str, Any]:
        """A hash of the patterns: neither the path nor anything else in the file counts."""
        said = json.dumps({key: str(pattern) for key, pattern in self.entries.items()})
        return {"path": hashlib.sha256(said.encode()).hexdigest()[:16]}

    def check(self, pattern: SparsityPattern, shapes: Shapes) -> set[SparsityPattern]:
        check_widths(pattern, shapes)
        return set(self.plan(pattern, shapes).values())

    def plan(self, pattern: SparsityPattern, shapes: Shapes, measured: Sequence[float] = ()) -> Plan:
        plan: Plan = {}
        order = {key: place for place, key in enumerate(self.entries)}
        unused = set(self.entries)
        for index, layer in enumerate(shapes):
            for name, (_, num_inputs) in layer.items():
                keys = {name, str(index)} & self.entries.keys() | {key for key in self._globs if fnmatchcase(name, key)}
                if not keys:
                    raise self._error(f'no key fits {name}; add one, or a first line for all others such as "*": 0.5')
                last = max(keys, key=order.__getitem__)
                plan[name] = self.entries[last]
                unused.discard(last)
                self._check_linear(name, num_inputs, plan[name], pattern)
        if unused:
            first = min(unused, key=order.__getitem__)
            raise self._error(
                f"{quoted(first)} decides nothing: it fits no linear of the model, or later keys fit all of its linears; correct it "
                "or take it out"
            )
        sizes = [num_outputs * num_inputs for layer in shapes for num_outputs, num_inputs in layer.values()]
        found = mean([float(one.sparsity) for one in plan.values()], sizes)
        if abs(found - pattern.sparsity) > (1e-9 if isinstance(pattern, NM) else TOLERANCE):
            raise ValueError(
                f"sparsity={pattern}: the plan of {self._where} has the mean sparsity {found:.6g}; set sparsity={found:.6g} or "
                "change the plan"
            )
        return plan

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self._where}: {problem}")

    def _check_linear(self, name: str, num_inputs: int, own: SparsityPattern, pattern: SparsityPattern) -> None:
        if isinstance(pattern, NM) and not (isinstance(own, NM) and own.m == pattern.m):
            raise ValueError(
                f"sparsity={pattern}: {self._where} gives {name} {own}, which is no N:{pattern.m}; set sparsity to the plan's mean "
                "as a fraction"
            )
        try:
            own.check_width(num_inputs)
        except ValueError as error:
            raise self._error(f"{own} for {name}, which {error}") from None

    def _read(self) -> Any:
        path = Path(self.path).expanduser()
        is_json = path.suffix == ".json"
        most = MAX_JSON_BYTES if is_json else MAX_YAML_BYTES
        try:
            if path.exists() and not path.is_file():
                raise self._error("is no regular file; give a JSON or YAML file")
            with path.open("rb") as file:
                content = file.read(most + 1)
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror}); give a JSON or YAML file") from None
        if len(content) > most:
            raise self._error(f"is larger than {most >> 20} MiB; give a file with one entry for each linear")
        try:
            text = content.decode()
            return json.loads(text) if is_json else yaml.load(text, _Loader)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise self._error(f"is no JSON or YAML ({quoted(str(error))}); see conf/allocation/file.yaml") from None

    def _pattern(self, key: str, value: Any) -> SparsityPattern:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError(f"{quoted(value)}: not a pattern; use a fraction such as 0.5, N:M such as 2:4, or dense")
            return parse_pattern(value)
        except ValueError as error:
            raise self._error(f"{quoted(key)}: {error}") from None


def _entries(content: Any) -> dict[str, Any]:
    """Key -> value of a mapping, a record or a record's list; empty for anything else."""
    if isinstance(content, dict) and "per_linear" in content:
        content = content["per_linear"]
    if isinstance(content, list) and all(isinstance(entry, dict) and {"name", "pattern"} <= entry.keys() for entry in content):
        pairs = [(entry["name"], entry["pattern"]) for entry in content]
    else:
        pairs = list(content.items()) if isinstance(content, dict) else []
    return {key if isinstance(key, str) else quoted(key): value for key, value in pairs}
