"""What is given to `nnprune.prune`: the settings of an object, a hash of the rest of it, and which overrides go with it."""

import hashlib
import inspect
import io
import logging
import pickle
import re
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from nnprune.checks import quoted
from nnprune.experiment.identity import is_in_file, is_users, source_of

log = logging.getLogger(__name__)

NO_SETTINGS = ("statistics", "notes")
"""Attributes of every pruner that its run fills in."""

REMEDIES = {
    "pruner": "give the pruner object its options, such as MyPruner(alpha=0.7)",
    "sparsity": 'write prune(..., sparsity="2:4")',
    "grid": "call prune once for each pruner and sparsity",
    "plan": "only the command nnprune estimates the cost of a run",
    "experiment": "give its settings one by one, or start it with the command nnprune",
}
"""Settings that are no overrides of `nnprune.prune`, with what to do instead."""


def check_overrides(overrides: Sequence[str], has_model: bool) -> None:
    """Raise ValueError for an override that would not count beside the arguments of `nnprune.prune`; `has_model` says whether
    they name a model."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].strip()
        remedy = REMEDIES.get(re.split("[.@]", key)[0])
        if has_model and key in ("model", "model.path"):
            remedy = "leave out this override or model_name, which both name a model"
        if remedy:
            raise ValueError(f"{quoted(override)}: is no override of nnprune.prune; {remedy}")


def settings_of(pruner: Any) -> dict[str, Any]:
    """The attributes of a pruner that can be settings, without empty containers."""
    return {key: value for key, value in _attributes(pruner).items() if is_plain(value) and value not in ({}, [], ())}


def state_of(pruner: Any) -> str | None:
    """A hash of what a pruner holds that is no setting, such as tensors or functions; None if there is nothing.

    It is new each time, with a warning, where it cannot be computed.
    """
    held = {key: value for key, value in _attributes(pruner).items() if not is_plain(value) and key not in NO_SETTINGS}
    if not held:
        return None
    try:
        file = io.BytesIO()
        _Pickler(file).dump(held)
        return hashlib.sha256(file.getvalue()).hexdigest()[:16]
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        reason = f"{', '.join(held)} of {type(pruner).__name__} cannot be hashed ({error})"
        log.warning("warning: %s, so this run will not be reused; use numbers and text", reason)
        return uuid.uuid4().hex[:16]


def is_plain(value: Any) -> bool:
    """Whether an attribute of a pruner can be a setting: a number, text, or a list or dict of such."""
    if isinstance(value, list | tuple | dict):
        return all(map(is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or type(value) in (bool, int, float, str)


def _attributes(pruner: Any) -> dict[str, Any]:
    """All of an object's attributes, those in slots too."""
    slots = [name for kind in type(pruner).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    in_slots = {name: getattr(pruner, name) for name in slots if not name.startswith("__") and hasattr(pruner, name)}
    return in_slots | getattr(pruner, "__dict__", {})


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)


class _Pickler(pickle.Pickler):
    """Makes the same bytes of the same content in any process: of tensors by their values, of a user's functions and classes by their
    file. Those that are in no file may have changed unseen: PicklingError."""

    def reducer_override(self, one: Any) -> Any:
        if isinstance(one, Tensor):
            values = one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return str, (f"{one.dtype} {tuple(one.shape)} {hashlib.sha256(values).hexdigest()}",)
        if isinstance(one, FunctionType | type):
            return self._of_code(one)
        return NotImplemented

    def _of_code(self, one: FunctionType | type) -> Any:
        module = one.__module__ or ""
        if module != "__main__" and not is_users(module):
            return NotImplemented  # installed: its name
        if "<" in one.__qualname__ or not (is_in_file(one) if isinstance(one, type) else _is_in_its_file(one)):
            raise pickle.PicklingError(f"{one.__qualname__} has no place in a file")
        return str, (f"{module}.{one.__qualname__} {hashlib.sha256(source_of(module)).hexdigest()}",)


def _is_in_its_file(function: FunctionType) -> bool:
    file = getattr(sys.modules[function.__module__], "__file__", None)
    return bool(file) and Path(inspect.unwrap(function).__code__.co_filename).resolve() == Path(file).resolve()
