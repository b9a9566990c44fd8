"""How settings name linears: by full name, by a glob such as `*.mlp.*`, or by a regular expression after `re:`."""

import re
from collections.abc import Callable, Iterable
from fnmatch import translate

from nnprune.checks import quoted

REGEX = "re:"
SHOWN = 8
"""Names of linears that an error message shows at most."""


def matcher(key: str, pattern: str) -> Callable[[str], object]:
    """A function whether a full name, such as `model.layers.0.mlp.gate_proj`, fits `pattern` as a whole; upper and lower case differ.

    Raises ValueError that starts with `key`, such as "prune.include", if what follows `re:` is no regular expression.
    """
    if not pattern.startswith(REGEX):
        return re.compile(translate(pattern)).fullmatch if is_glob(pattern) else pattern.__eq__
    try:
        return re.compile(pattern.removeprefix(REGEX)).fullmatch
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key}={quoted(pattern)}: is no regular expression ({error}); correct what follows re:") from None


def is_glob(pattern: str) -> bool:
    """Whether a pattern may fit more than one name without being a regular expression."""
    return any(sign in pattern for sign in "*?[")


def examples(names: Iterable[str]) -> str:
    """A few of the names of linears for an error message: the first of each kind."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], name)
    return ", ".join(list(kinds.values())[:SHOWN])
