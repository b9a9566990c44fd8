"""`prune`: which linears are pruned. The others are left as they are, but for what `recover` tunes, and no
pruner sees them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nnprune.allocations.base import Shapes
from nnprune.allocations.names import examples, matcher
from nnprune.checks import quoted


@dataclass
class Selection:
    """The linears that fit one of `include`, or all for None, and none of `exclude`.

    Args:
        include, exclude: one or several names, globs or regular expressions, as in `matcher`.

    Raises:
        ValueError: neither text nor a list of it, or no regular expression. From `cut`: a pattern that fits no linear of the model, or
            no linear that is left.
    """

    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        self._matchers = {
            key: {pattern: matcher(f"prune.{key}", pattern) for pattern in _patterns(f"prune.{key}", patterns)}
            for key, patterns in (("include", self.include), ("exclude", self.exclude))
        }

    @property
    def settings(self) -> dict[str, list[str]]:
        """What `include` and `exclude` are, in one spelling; empty if all linears are pruned."""
        return {key: list(matchers) for key, matchers in self._matchers.items() if matchers}

    def cut(self, shapes: Shapes) -> Shapes:
        """The shapes without the linears that are left alone; a decoder layer may have none left."""
        if not self.settings:
            return shapes
        names = [name for layer in shapes for name in layer]
        fitting = {key: set().union(*self._fitting(key, names).values()) for key in self._matchers}
        chosen = (fitting["include"] if self._matchers["include"] else set(names)) - fitting["exclude"]
        if not chosen:
            raise ValueError(
                f"prune.exclude={quoted(self.settings.get('exclude'))}: leaves no linear to prune; take a pattern out"
            )
        return [{name: shape for name, shape in layer.items() if name in chosen} for layer in shapes]

    def counts(self, shapes: Shapes) -> dict[str, Any]:
        """What a record tells: `linears`, those that are pruned; `all_linears`; `include` and `exclude`, pattern -> how many fit it. Empty
        if all linears are pruned."""
        if not self.settings:
            return {}
        names = [name for layer in shapes for name in layer]
        fitting = {key: {one: len(found) for one, found in self._fitting(key, names).items()} for key in self._matchers}
        return {"linears": sum(map(len, self.cut(shapes))), "all_linears": len(names), **fitting}

    def _fitting(self, key: str, names: Iterable[str]) -> dict[str, set[str]]:
        """Pattern -> the names that fit it. Raises ValueError if it fits none."""
        found = {pattern: set(filter(fits, names)) for pattern, fits in self._matchers[key].items()}
        for pattern, fitting in found.items():
            if not fitting:
                raise ValueError(f"prune.{key}={quoted(pattern)}: fits no linear of the model; there are {examples(names)}")
        return found


def _patterns(key: str, patterns: Any) -> list[str]:
    """The patterns of a setting, in order, each once."""
    found = [patterns] if isinstance(patterns, str) else [] if patterns is None else patterns
    is_usable = isinstance(found, list | tuple) and all(isinstance(one, str) and one for one in found)
    if not is_usable or (patterns is not None and not found):
        raise ValueError(
            f"{key}={quoted(patterns)}: must be names, globs such as *.mlp.* or regular expressions such as re:.*_proj, or null"
        )
    return sorted(set(found))
