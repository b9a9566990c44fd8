"""The code of a user's own classes: the modules that it is in or imports, and their source."""

import ast
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator, Set
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

INSTALLED = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib"))
"""Folders of code that changes with its version only."""


def is_users(name: str) -> bool:
    """Whether a module, loaded or not, is its user's: in a file that is not nnprune's nor installed."""
    if name.split(".")[0] == "nnprune":
        return False
    file = file_of(name)
    return bool(file) and not file.startswith(INSTALLED) and Path(file).is_file()


def file_of(name: str) -> str | None:
    """The file of a module, which need not be loaded; None if it has none."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None)
    spec = _spec(name)
    return spec.origin if spec and spec.has_location else None


def _spec(name: str) -> ModuleSpec | None:
    """Where a module would be loaded from; `find_spec` alone would load the packages that it is in."""
    package, _, _ = name.rpartition(".")
    try:
        if not package:
            return importlib.util.find_spec(name)
        place = sys.modules[package].__spec__ if package in sys.modules else _spec(package)
        found = place and place.submodule_search_locations
        return PathFinder.find_spec(name, found) if found else None
    except (ImportError, ValueError):
        return None


def reachable(first: Set[str], is_wanted: Callable[[str], bool]) -> set[str]:
    """The wanted ones of the modules `first`, and of those that wanted ones import from, and so on."""
    found: set[str] = set()
    todo = first
    while todo := {name for name in todo if is_wanted(name)} - found:
        found |= todo
        todo = {imported for name in todo for imported in _imports(name)}
    return found


def _imports(name: str) -> Iterator[str]:
    """The names in a module's import statements that may be modules, wherever the statements are."""
    file = file_of(name)
    if not file.endswith(".py"):
        return
    package = name if Path(file).name == "__init__.py" else name.rpartition(".")[0]
    package = getattr(sys.modules.get(name), "__package__", None) or package  # that of a script
    for node in ast.walk(ast.parse(Path(file).read_bytes())):
        if isinstance(node, ast.ImportFrom):
            parent = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (parent, *(f"{parent}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


_sources: dict[str, tuple[Any, bytes]] = {}


def source_of(name: str) -> bytes:
    """The bytes of a module's file, as they were when they were first asked for: a process goes on to run what it has imported though
    the file is edited, until the module is loaded again. An edit before that shows in `place_in_source`. A module that is not yet
    loaded will be by the run that asks."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    known, source = _sources.get(name, (None, None))
    if name not in sys.modules or source is None or (known is not None and known is not spec):
        source = Path(file_of(name)).read_bytes()
    _sources[name] = spec, source
    return source


def place_in_source(function: FunctionType, module: str) -> int | None:
    """Where the code of a function is among all code in its module's file; None if the file holds other code, such as after an edit."""
    try:
        found = _codes(source_of(module))
    except (KeyError, TypeError, OSError, SyntaxError, ValueError):
        return None
    content = content_of(function.__code__)
    return found.index(content) if content in found else None


@cache
def _codes(source: bytes) -> list[tuple[Any, ...]]:
    """The content of all code in the source of a module."""
    found = [compile(source, "", "exec", dont_inherit=True)]
    for code in found:
        found += [one for one in code.co_consts if isinstance(one, CodeType)]
    return list(map(content_of, found))


def content_of(code: CodeType) -> tuple[Any, ...]:
    """What code does, wherever it is."""
    constants = [content_of(one) if isinstance(one, CodeType) else (type(one).__name__, one) for one in code.co_consts]
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return (code.co_qualname, code.co_code, code.co_exceptiontable, *counts, *names, *constants)


def names_in(code: CodeType) -> set[str]:
    """The names of globals and attributes that code uses."""
    inner = [names_in(one) for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*inner)


def is_in_file(kind: type) -> bool:
    """Whether the file of a class's module holds its methods: those of a notebook or of `exec` come from elsewhere. Generated ones, as
    of dataclasses, do not count."""
    try:
        file = Path(inspect.getfile(kind)).resolve()
        methods = [inspect.unwrap(value) for name, value in vars(kind).items() if not name.startswith("__")]
        places = {Path(one.__code__.co_filename).resolve() for one in methods if inspect.isfunction(one)}
        return file.is_file() and places <= {file}
    except (OSError, TypeError):
        return False
