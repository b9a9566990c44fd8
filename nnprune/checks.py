"""Checks of settings, shared by all parts, and how error messages quote what a user or a file gave."""

import math
import reprlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)

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


def finite(tensor: Tensor) -> Tensor:
    """Whether a tensor is free of NaN and infinity: bool (), on its device. One pass, where `isfinite` takes several and a mask."""
    return tensor.abs().max() < math.inf


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity. The host waits for it."""
    return bool(finite(tensor))


def read_together(scalars: Mapping[K, Tensor]) -> dict[K, float]:
    """The numbers that scalars on a device hold, by the same keys, in one copy for which the host waits. Some may be on the CPU."""
    tensors = list(scalars.values())
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))
    numbers = torch.stack([tensor.to(device, torch.float64) for tensor in tensors]).tolist() if tensors else []
    whole = (not tensor.is_floating_point() for tensor in tensors)
    return {key: int(number) if is_whole else number for key, number, is_whole in zip(scalars, numbers, whole, strict=True)}


_deferred: list[Tensor] | None = None


@contextmanager
def deferring() -> Iterator[list[Tensor]]:
    """Inside, `is_set` lets the host not wait: it says False, and adds the flag to the list that this yields.

    Who reads the flags afterwards, together with what else there is, and finds one set must do the work again outside.
    """
    global _deferred
    before, _deferred = _deferred, []
    try:
        yield _deferred
    finally:
        _deferred = before


def is_set(flag: Tensor) -> bool:
    """Whether a flag () on a device is set, such as a failure that is rare: False inside `deferring`."""
    if _deferred is None:
        return bool(flag)
    _deferred.append(flag)
    return False
