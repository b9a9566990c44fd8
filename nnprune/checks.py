"""Checks of settings, shared by all parts, and how error messages quote what a user or a file gave."""

import math
import reprlib
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor

QUOTED = 200
"""Characters of a value or a reason that an error message quotes at most."""

_SHORT = reprlib.Repr()  # stops early, whatever the depth: aliases of YAML make trees that cannot be written out
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, QUOTED, QUOTED, QUOTED
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 8


MAX_NUMBER = 1e30
"""Upper bound of numbers that are no counts: products of larger ones leave float32."""


def quoted(value: Any) -> str:
    """`value` for an error message: one line of at most `QUOTED` characters."""
    try:
        text = value[: 2 * QUOTED] if isinstance(value, str) else _SHORT.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        text = "a number too long to show"
    text = " ".join(text.split())
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def one_of(names: Sequence[str]) -> str:
    """ "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def nearest(name: str, names: Sequence[str]) -> str:
    """Which of `names` was probably meant, or all of them."""
    near = get_close_matches(name, names)
    return f"did you mean {one_of(near)}?" if near else f"there are {', '.join(names) or 'none'}"


def check_count(key: str, value: Any, least: int, most: int = 2**63 - 1, why_most: str = "") -> int:
    """The setting `key`, such as "runtime.threads". Raises ValueError unless it is an integer, `least` <= value <= `most`.

    `why_most` says what `most` stands for, for the error message.
    """
    if type(value) is not int or not least <= value <= most:
        upper = f" and at most {most}" if most < 2**63 - 1 or (type(value) is int and value > most) else ""
        reason = f" ({why_most})" if upper and why_most else ""
        raise ValueError(f"{key}={quoted(value)}: must be a whole number, at least {least}{upper}{reason}")
    return value


def check_number(key: str, value: Any, least: float) -> float:
    """The setting `key`. Raises ValueError unless it is a number, `least` <= value <= MAX_NUMBER."""
    if type(value) not in (int, float) or not least <= value <= MAX_NUMBER:
        raise ValueError(f"{key}={quoted(value)}: must be a number, at least {least} and at most {MAX_NUMBER:g}")
    return value


def check_positive(key: str, value: Any, below: float = MAX_NUMBER) -> float:
    """The setting `key` as a float. Raises ValueError unless it is a number, 0 < value < below."""
    if type(value) not in (int, float) or not 0 < value < below:
        raise ValueError(f"{key}={quoted(value)}: must be a number greater than 0 and less than {below:g}")
    return float(value)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity. One pass, where `isfinite` takes several and a mask."""
    return bool(tensor.abs().max() < math.inf)
