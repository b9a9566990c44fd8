"""What a user's own object adds to a fingerprint: its settings, a hash of the rest, and its code."""

import logging
import uuid
from typing import Any

from nnprune.experiment.content_hash import ERRORS, content_hash, is_plain
from nnprune.experiment.user_code import is_in_file

log = logging.getLogger(__name__)

NO_SETTINGS = ("statistics", "notes")
"""Attributes of every pruner that its run fills in."""


def settings_of(pruner: Any) -> dict[str, Any]:
    """The attributes of a pruner that can be settings, without empty containers."""
    return {key: value for key, value in _attributes(pruner).items() if is_plain(value) and value not in ({}, [], ())}


def state_of(pruner: Any) -> str | None:
    """A hash of what a pruner holds that is no setting, such as tensors or functions; None if there is nothing."""
    held = {key: value for key, value in _attributes(pruner).items() if not is_plain(value) and key not in NO_SETTINGS}
    return state_hash(held, type(pruner).__name__) if held else None


def state_hash(held: dict[str, Any], owner: str) -> str:
    """A hash of what an object of class `owner` holds. It is new each time, with a warning, where it cannot be computed."""
    try:
        return content_hash(held)
    except ERRORS as error:
        reason = f"{', '.join(held)} of {owner} cannot be hashed ({error})"
        log.warning("warning: %s, so this run will not be reused, nor averaged over seeds; use numbers and text", reason)
        return uuid.uuid4().hex[:16]


def code_of(method: type) -> str | None:
    """A hash of the source files of a method's classes from outside this package, of the modules of their author's that they use, and of
    what was set in them at run time: an edited method is another method. None for nnprune's own.

    Code without a file, such as a notebook's, may have changed unseen: its hash is new each time, so nothing of it is reused.
    """
    outside = [kind for kind in method.__mro__ if kind.__module__.split(".")[0] not in ("nnprune", "builtins", "abc", "typing")]
    if not outside:
        return None
    reason = next((f"the code of {kind.__name__} is in no file" for kind in outside if not is_in_file(kind)), None)
    try:
        if not reason:
            return content_hash(method, method.__module__)
    except ERRORS as error:
        reason = f"what the code of {method.__name__} refers to cannot be hashed ({error})"
    log.warning("warning: %s, so this run will not be reused, nor averaged over seeds; put it in a module", reason)
    return uuid.uuid4().hex[:16]


def _attributes(pruner: Any) -> dict[str, Any]:
    """All of an object's attributes, those in slots too."""
    slots = [name for kind in type(pruner).__mro__ for name in _names(vars(kind).get("__slots__", ()))]
    in_slots = {name: getattr(pruner, name) for name in slots if not name.startswith("__") and hasattr(pruner, name)}
    return in_slots | getattr(pruner, "__dict__", {})


def _names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)
