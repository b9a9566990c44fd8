"""Checks that several parts share."""

import math

from torch import Tensor


def check_count(key: str, value: object, least: int) -> None:
    """Raise ValueError when `value` of a config's `key` is no whole number, or below `least`."""
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{key}={value}: must be a whole number, at least {least}")


def check_number(key: str, value: object, least: float) -> None:
    """Raise ValueError when `value` of a config's `key` is no finite number, or below `least`."""
    if type(value) not in (int, float) or not math.isfinite(value) or value < least:
        raise ValueError(f"{key}={value}: must be a number, at least {least}")


def check_positive(key: str, value: object, below: float = math.inf) -> float:
    """`value` of a config's `key` as a float. Raises ValueError unless it is a number, 0 < value < below."""
    if type(value) not in (int, float) or not 0 < value < below:
        limit = "" if below == math.inf else f" and less than {below:g}"
        raise ValueError(f"{key}={value}: must be a number greater than 0{limit}")
    return float(value)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity: one pass, where `isfinite` takes several and a mask."""
    return bool(tensor.abs().max() < math.inf)
