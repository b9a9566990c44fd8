"""Tasks of lm-eval: found and checked before any data are read, identified, and loaded. lm-eval is imported where it is used."""

import hashlib
import io
import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nnprune.checks import check_count, one_of, quoted
from nnprune.files.digests import file_digest

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict, TaskManager

GENERATES = "generate_until"
"""lm-eval's name for requests that generate text."""

DEFINITIONS = (".yaml", ".yml", ".py")
"""Files that define tasks."""


@dataclass(frozen=True)
class LMEvalTask:
    """A task, group or tag of lm-eval, and how its requests are made.

    Args:
        name: as lm-eval knows it.
        num_fewshot: examples in the context; None: as the task says.
        limit: the first documents of each task, or a fraction of them below 1; None: all.
        include_path: folders of tasks in YAML files; they go before lm-eval's own.
        seed: of the draw of examples; None: lm-eval's own.
    """

    name: str
    num_fewshot: int | None = None
    limit: float | None = None
    include_path: tuple[str, ...] = ()
    seed: int | None = None

    def check(self) -> None:
        """Raise ValueError without lm-eval, for an unknown name and for a setting out of range."""
        for key, value, least in (("num_fewshot", self.num_fewshot, 0), ("seed", self.seed, 0)):
            if value is not None:
                check_count(f"evaluation.{key}", value, least)
        is_fraction = isinstance(self.limit, float) and 0 < self.limit < 1
        if self.limit is not None and not is_fraction:
            check_count("evaluation.limit", self.limit, 1)
        for folder in self.include_path:
            if not Path(folder).expanduser().is_dir():
                raise ValueError(f"evaluation.include_path={folder}: no such folder; name one that holds tasks as YAML files")
        known = self._manager().task_index
        if self.name not in known:
            near = get_close_matches(self.name, known)
            remedy = (
                f"did you mean {one_of(near)}?"
                if near
                else "lm_eval ls tasks lists lm-eval's; evaluation.include_path adds yours"
            )
            raise ValueError(f"evaluation.tasks={quoted(self.name)}: no such task; {remedy}")

    def generating(self) -> list[str]:
        """The names of those of its tasks that generate text, as far as their YAML files tell."""
        return [
            config["task"]
            for config in self._configs()
            if config.get("output_type", GENERATES) == GENERATES and "class" not in config
        ]

    def identity(self) -> dict[str, Any]:
        """What its figures depend on: settings, lm-eval's version, the versions of its tasks, the content of local files."""
        configs = self._configs()
        return {
            **vars(self),
            "include_path": self._files_digest(),
            "data_files": _digest([path for config in configs for path in _local_data(config)]),
            "lm-eval": version("lm-eval"),
            "versions": {config["task"]: (config.get("metadata") or {}).get("version") for config in configs},
        }

    def load(self) -> "TaskDict":
        """The tasks with their documents. Raises ValueError if they cannot be had, or are of a kind that is not measured here."""
        loaded = _load(self, self._files_digest())
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(self._seeds()[1])  # as if nothing had been drawn
        return loaded

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """lm-eval's global random generators, as `lm_eval run` seeds them; those of the run go on as if nothing had happened."""
        states, (seed, other) = (random.getstate(), np.random.get_state()), self._seeds()
        random.seed(seed)
        np.random.seed(other)
        try:
            with redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):  # progress bars that nothing turns off
                yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

    def _seeds(self) -> tuple[int, int]:
        """The seed of Python's generator, and that of NumPy's and of the examples."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        return (DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED) if self.seed is None else (self.seed, self.seed)

    def _manager(self) -> "TaskManager":
        """An index that holds the task, if there is such a task: the user's alone where it is enough, since lm-eval's takes seconds."""
        digest = self._files_digest()
        own = _manager(self.include_path, digest, False) if self.include_path else None
        return own if own and self.name in own.all_subtasks else _manager(self.include_path, digest, True)

    def _configs(self) -> list[dict[str, Any]]:
        """The settings of its tasks, as in their YAML files."""
        return list(_leaves(self._manager(), self.name))

    def _files_digest(self) -> str:
        """A hash of the tasks and their code in `include_path`, which may hold other files too."""
        folders = [Path(folder).expanduser() for folder in self.include_path]
        found = [(path, path.relative_to(folder).parts) for folder in folders for path in sorted(folder.rglob("*"))]
        hidden = (".", "__pycache__")
        kept = [path for path, parts in found if not any(part.startswith(hidden) for part in parts)]
        return _digest([path for path in kept if path.suffix in DEFINITIONS])


@cache
def _manager(include_path: tuple[str, ...], digest: str, include_defaults: bool) -> "TaskManager":
    try:
        from lm_eval.tasks.manager import TaskManager
    except ImportError as error:
        raise ValueError(f"evaluation.tasks: needs lm-eval 0.4.13 or newer ({error}); pip install 'nnprune[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults that it takes
    folders = [Path(folder).expanduser() for folder in include_path]
    return TaskManager(include_path=folders, include_defaults=include_defaults)


@cache  # the cells of a sweep in one process share them
def _load(one: LMEvalTask, digest: str) -> "TaskDict":
    where = f"evaluation.tasks={one.name}"
    try:
        with one.seeded():
            loaded = one._manager().load([one.name])
    except Exception as error:  # of `datasets`, of a task's own code, of a module that it needs
        reason = quoted(f"{type(error).__name__}: {error}")
        raise ValueError(f"{where}: cannot be loaded ({reason}); check its files, and that its dataset can be had") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
            kind = "shows images" if getattr(task, "MULTIMODAL", False) else "runs code that the model writes"
            raise ValueError(f"{where}: {name} {kind}, which is not measured here; leave it out")
        default = task.get_config("num_fewshot")
        if default is None or (one.num_fewshot is not None and default != 0):  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=one.num_fewshot or 0)
    return loaded


def _leaves(manager: "TaskManager", name: str) -> Iterator[dict[str, Any]]:
    """The settings of the tasks in a task, group or tag."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    config = entry.cfg or {"task": sorted(entry.tags)}  # a tag has none
    if isinstance(config.get("task"), str):
        yield config
        return
    for member in config["task"]:
        if isinstance(member, str):
            yield from _leaves(manager, member)
        elif isinstance(member.get("task"), str):  # a task with some settings changed
            found = list(_leaves(manager, member["task"]))
            yield from ([one | member | {"task": one["task"]} for one in found] if found else [member])
        else:
            yield from _leaves(manager, member.get("group", ""))


def _local_data(config: dict[str, Any]) -> list[Path]:
    """The files on this machine that a task's documents come from."""
    options = config.get("dataset_kwargs") or {}
    files = options.get("data_files") or []
    values = files.values() if isinstance(files, dict) else [files]
    names = [name for value in values for name in ([value] if isinstance(value, str) else value)]
    places = [*names, options.get("data_dir") or "", config.get("dataset_path") or ""]
    found = [Path(path) for place in places for path in sorted(glob(str(place)))]
    return [path for one in found for path in (sorted(one.rglob("*")) if one.is_dir() else [one])]


def _digest(paths: list[Path]) -> str:
    """A hash of the names and contents of those paths that are files."""
    sha = hashlib.sha256()
    for path in paths:
        if path.is_file():
            sha.update(f"{path.name} {file_digest(path)}\n".encode())
    return sha.hexdigest()[:16]
