"""Patterns by the names of linears, from a JSON or YAML file or the command line: what `file` and `by_name` have in common."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # comes with omegaconf

from nnprune.allocations.base import Allocation, Shapes
from nnprune.allocations.names import REGEX, examples, is_glob, matcher
from nnprune.checks import quoted
from nnprune.patterns import SparsityPattern, parse_pattern

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


class NamedPatterns(Allocation):
    """Maps linears to patterns by keys: full names, numbers of decoder layers, globs, or regular expressions after `re:`.

    Args:
        where: the setting that the keys come from and its value, for error messages.
        content: key -> sparsity, N:M or dense; or a record of nnprune or its list `per_linear`.

    Raises:
        ValueError: a value that is no pattern, or no keys at all.
    """

    later_first = False
    """Whether later keys go before earlier ones."""

    def __init__(self, where: str, content: Any) -> None:
        self._where = where
        self.entries = {key: self._pattern(key, value) for key, value in _entries(content).items()}
        if not self.entries:
            raise self._error("tells of no linear; give a mapping or the record of a completed run")
        matched = [key for key in self.entries if is_glob(key) or key.startswith(REGEX)]
        self._matchers = {key: matcher(where, key) for key in matched}

    @property
    def digest(self) -> str:
        """A hash of the patterns and their order: where they come from does not count."""
        said = json.dumps({key: str(pattern) for key, pattern in self.entries.items()})
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def decide(self, shapes: Shapes) -> Iterator[tuple[str, int, SparsityPattern | None]]:
        """(name, I, pattern) of each linear; None where no key fits. Raises ValueError at the end if a key decides nothing."""
        order = {key: -place if self.later_first else place for place, key in enumerate(self.entries)}
        unused = set(self.entries)
        for index, layer in enumerate(shapes):
            for name, (_, num_inputs) in layer.items():
                keys = {name, str(index)} & self.entries.keys() | {key for key, fits in self._matchers.items() if fits(name)}
                if keys:
                    first = min(keys, key=order.__getitem__)
                    unused.discard(first)
                    self._check_width(name, num_inputs, self.entries[first])
                yield name, num_inputs, self.entries[first] if keys else None
        if unused:
            key, others = next(key for key in self.entries if key in unused), "later" if self.later_first else "earlier"
            names = examples(name for layer in shapes for name in layer)
            raise self._error(
                f"{quoted(key)} decides nothing: it fits no linear of the model, or {others} keys fit all of its linears; correct it "
                f"or take it out (there are {names})"
            )

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self._where}: {problem}")

    def _check_width(self, name: str, num_inputs: int, own: SparsityPattern) -> None:
        try:
            own.check_width(num_inputs)
        except ValueError as error:
            raise self._error(f"{own} for {name}, which {error}") from None

    def _pattern(self, key: str, value: Any) -> SparsityPattern:
        try:
            if isinstance(value, bool) or not isinstance(value, int | float | str):
                raise ValueError(f"{quoted(value)}: not a pattern; use a fraction such as 0.5, N:M such as 2:4, or dense")
            return parse_pattern(value)
        except ValueError as error:
            raise self._error(f"{quoted(key)}: {error}") from None


def read_patterns(where: str, name: str, example: str) -> Any:
    """The content of a JSON or YAML file. Raises ValueError, naming `where` and the YAML with an `example`, if there is none."""
    path = Path(name).expanduser()
    is_json = path.suffix == ".json"
    most = MAX_JSON_BYTES if is_json else MAX_YAML_BYTES
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{where}: is no regular file; give a JSON or YAML file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror}); give a JSON or YAML file") from None
    if len(content) > most:
        raise ValueError(f"{where}: is larger than {most >> 20} MiB; give a file with one entry for each linear")
    try:
        text = content.decode()
        return json.loads(text) if is_json else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where}: is no JSON or YAML ({quoted(str(error))}); see {example}") from None


def _entries(content: Any) -> dict[str, Any]:
    """Key -> value of a mapping, a record or a record's list; empty for anything else."""
    if isinstance(content, Mapping) and "per_linear" in content:
        content = content["per_linear"]
    if isinstance(content, list) and all(isinstance(entry, dict) and {"name", "pattern"} <= entry.keys() for entry in content):
        pairs = [(entry["name"], entry["pattern"]) for entry in content]
    else:
        pairs = list(content.items()) if isinstance(content, Mapping) else []
    return {key if isinstance(key, str) else quoted(key): value for key, value in pairs}
