"""A hash of what an object holds, the same in any process: of a user's code by its source and by what it refers to at run time."""

import functools
import hashlib
import inspect
import io
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnprune.experiment.user_code import (
    content_of,
    file_of,
    is_in_file,
    is_users,
    names_in,
    place_in_source,
    reachable,
    source_of,
)
from nnprune.files.digests import file_digest

ERRORS = (pickle.PicklingError, TypeError, AttributeError, RuntimeError, ValueError, SyntaxError, ImportError, OSError)
"""What an object that has no such hash raises."""

FUNCTIONS = (FunctionType, staticmethod, classmethod, property, functools.cached_property, type(functools.cache(len)))


def content_hash(one: Any, module: str = "") -> str:
    """16 hexadecimal digits. Code in `module` counts like a user's though it may be installed. One of ERRORS for what cannot be
    hashed, such as code in no file: it may have changed unseen."""
    return _hash(one, _Seen(module), is_inner=False)


def is_plain(value: Any) -> bool:
    """Whether an attribute of a pruner can be a setting: a number, text, or a list or dict of such."""
    if isinstance(value, list | tuple | dict):
        return all(map(is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or type(value) in (bool, int, float, str)


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # such as a name that is too long
        return False


@dataclass
class _Seen:
    """The modules, classes and functions that have been hashed, so that each is hashed once; `module` as in `content_hash`."""

    module: str
    known: dict[Any, Any] = field(default_factory=dict)

    def is_users(self, module: str) -> bool:
        return module in ("__main__", self.module) or is_users(module)

    def add(self, key: Any, one: Any) -> bool:
        """Whether it is new."""
        is_new = key not in self.known
        self.known[key] = one
        return is_new


def _hash(one: Any, seen: _Seen, is_inner: bool) -> str:
    file = io.BytesIO()
    _Pickler(file, seen, is_inner).dump(one)
    return hashlib.sha256(file.getvalue()).hexdigest()[:16]


class _Pickler(pickle.Pickler):
    """Replaces what has no bytes of its own by a text. `is_inner`: whether code refers to the object, rather than someone having handed
    it over; only then may it be in no file."""

    def __init__(self, file: io.BytesIO, seen: _Seen, is_inner: bool) -> None:
        super().__init__(file)
        self.seen, self.is_inner = seen, is_inner

    def persistent_id(self, one: Any) -> Any:
        if not isinstance(one, set | frozenset):  # no reducer is asked for these
            return None
        return "set", sorted(_hash(member, _Seen(self.seen.module), self.is_inner) for member in one)

    def reducer_override(self, one: Any) -> Any:
        if isinstance(one, Tensor):
            values = one.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return str, (f"{one.dtype} {tuple(one.shape)} {hashlib.sha256(values).hexdigest()}",)
        if isinstance(one, Path) and is_file(one):
            return str, (f"{one} {file_digest(one)}",)
        if isinstance(one, ModuleType):
            return str, (one.__name__,)
        if isinstance(one, FunctionType | type):
            return self._of_code(one)
        return NotImplemented

    def _of_code(self, one: FunctionType | type) -> Any:
        module = _module_of(one)
        if not self.seen.is_users(module):
            function = self._users_function(one)
            return NotImplemented if function is None else (list, ([function],))  # installed: its name
        name = f"{module}.{one.__qualname__}"
        if not self.seen.add(id(one), one):
            return str, (name,)
        if not self.is_inner and not (is_in_file(one) if isinstance(one, type) else _is_in_its_file(one)):
            raise pickle.PicklingError(f"{one.__qualname__} has no place in a file")
        held = self._of_class(one) if isinstance(one, type) else self._of_function(one)
        parts = [(key, _hash(value, self.seen, is_inner=True)) for key, value in held.items()]
        return str, (f"{name} {self._sources(module)} {parts}",)

    def _of_class(self, kind: type) -> dict[str, Any]:
        """Its bases, methods and plain attributes, which may have been set since its file was run."""
        held: dict[str, Any] = {"bases": kind.__bases__}
        for name, value in vars(kind).items():
            function = self._users_function(value)
            if function is not None and (
                not name.startswith("__") or _is_in_its_file(function)
            ):  # else a dataclass has made it
                held[f".{name}"] = function
            elif function is None and not name.startswith("__") and self._counts(value):
                held[f".{name}"] = value
        return dict(sorted(held.items()))

    def _of_function(self, function: FunctionType) -> dict[str, Any]:
        """Its place in its file, or its code where that is not in there, and the values of its closure, defaults and globals."""
        code, names = function.__code__, names_in(function.__code__)
        place = place_in_source(function, _module_of(function))
        held: dict[str, Any] = {"code": content_of(code) if place is None else place}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            held[f"closure.{name}"] = cell.cell_contents
        found = {"defaults": function.__defaults__, **(function.__kwdefaults__ or {})}
        found |= {f"global.{name}": value for name, value in function.__globals__.items() if name in names}
        for key, module in list(found.items()):
            if isinstance(module, ModuleType) and self.seen.is_users(module.__name__):
                found |= {f"{key}.{name}": value for name, value in vars(module).items() if name in names}
        return dict(sorted((held | {key: self._target(value) for key, value in found.items() if self._counts(value)}).items()))

    def _target(self, value: Any) -> Any:
        function = self._users_function(value)
        return value if function is None else function

    def _counts(self, value: Any) -> bool:
        """Whether what code refers to is hashed: values that are data, and a user's code and objects. The source stands for others, such
        as loggers."""
        if isinstance(value, list | tuple | dict):
            return all(map(self._counts, value.values() if isinstance(value, dict) else value))
        if isinstance(value, FUNCTIONS):
            return self._users_function(value) is not None
        data = (set, frozenset, Tensor, np.ndarray, Path, type, functools.partial)
        return is_plain(value) or isinstance(value, data) or self.seen.is_users(type(value).__module__)

    def _users_function(self, value: Any) -> FunctionType | None:
        """The function of a user's that an installed decorator wraps, or the value itself if it is one."""
        while isinstance(value, FUNCTIONS):
            if isinstance(value, FunctionType) and self.seen.is_users(_module_of(value)):
                return value
            value = next((getattr(value, key) for key in ("__wrapped__", "fget", "func") if hasattr(value, key)), None)
        return None

    def _sources(self, module: str) -> str:
        """A hash of the source of a module, and of those of its author's that it imports."""
        if not self.seen.add(module, module) or not file_of(module):
            return ""
        found = reachable({module}, is_users) | {module}  # though it may be installed
        packages = {name[:dot] for name in found for dot, sign in enumerate(name) if sign == "."}
        sources = [(name, source_of(name)) for name in sorted(found | reachable(packages, is_users))]
        return hashlib.sha256(repr(sources).encode()).hexdigest()


def _module_of(code: FunctionType | type) -> str:
    """The module that code is in: a decorated function has the name of another."""
    return (code.__globals__.get("__name__") if isinstance(code, FunctionType) else code.__module__) or ""


def _is_in_its_file(function: FunctionType) -> bool:
    file = getattr(sys.modules.get(_module_of(function)), "__file__", None)
    return bool(file) and Path(inspect.unwrap(function).__code__.co_filename).resolve() == Path(file).resolve()
