"""Files of the hub's repositories: one commit a process, each file fetched once, and what is cached serves without the hub.

Everything that can go wrong there becomes one line with the config key, its value and the remedy for just that.
"""

import glob
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnprune.files.hub_errors import BUSY, explain, is_offline, is_transient, line, status_of

log = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds that a hub that does not answer is waited for."""

PAUSES = (1.0, 2.0)
"""Seconds between the attempts to reach a hub that answers that it is busy."""

REST = 300.0
"""Seconds for which a hub that could not be reached is not asked again."""

FRESH = 30.0
"""Seconds for which a hub that answered counts as there."""

_commits: dict[tuple[str, str, str | None], str] = {}  # kind, name and revision -> commit: a branch does not move within a run
_names: dict[tuple[str, str, str | None], list[str]] = {}  # the same -> the files of a model
_remembered: set[Path] = set()  # files of the hub's cache that name a branch's commit
_down_until = 0.0
_answered = -REST  # when the hub last did


@dataclass(frozen=True)
class Repository:
    """A model or a dataset on the hub.

    Args:
        key: the config key that names it, such as calibration.dataset, for error messages.
        name: its id.
        kind: model or dataset.
        revision: branch, tag or commit; None: main.
        wanted: what is to be read of it, for error messages.
    """

    key: str
    name: str
    kind: str
    revision: str | None = None
    wanted: str = "its files"

    def commit(self) -> str:
        """The commit that the revision stands for: the hub's, or, where that can't be asked, that of the last download."""
        if self._asked not in _commits:
            with self._explained():
                self._resolve()
        return _commits[self._asked]

    def names(self) -> list[str]:
        """The names of all files of a model: the hub's list, or, where that can't be asked, what the cache knows."""
        self.commit()
        if self._asked not in _names:  # a commit that needed no question, or a hub that is down
            with self._explained():
                try:
                    _names[self._asked] = self._cached() if _is_closed() else [one.rfilename for one in self._ask().siblings]
                except Exception as failure:
                    if not is_transient(failure) or not self._cached():
                        raise
                    _close()
                    _names[self._asked] = self._cached()
        return _names[self._asked]

    def check_open(self) -> None:
        """Raise ValueError, as for a file that is not cached, if the hub can't be asked what it has."""
        with self._explained():
            if _is_closed():
                raise LookupError("not cached")

    def file(self, path: str, key: str) -> Path:
        """A file of the repository, from the cache or else fetched; `key` is the config key that names it."""
        from huggingface_hub import hf_hub_download

        commit = self.commit()
        with self._explained(f"{key}={path}"):
            self._reach(path)
            return self._kept(Path(hf_hub_download(self.name, path, revision=commit, **self._how())))

    def files(self, names: Sequence[str]) -> Path:
        """The local folder of the repository's commit, with the files `names`, all of which exist, in it."""
        from huggingface_hub import snapshot_download

        commit = self.commit()
        with self._explained():
            missing = [name for name in names if not self._is_cached(name)]
            if not missing:
                return self._folder
            self._reach(missing[0])
            exact = [glob.escape(name) for name in names]
            return self._kept(Path(snapshot_download(self.name, revision=commit, allow_patterns=exact, **self._how())))

    def matching(self, pattern: str, key: str) -> list[Path]:
        """The file of that name, or the files that a pattern fits, sorted: without the hub, if the cache is known to have all of them."""
        from huggingface_hub import get_cached_repo_tree, snapshot_download

        commit = self.commit()
        with self._explained(f"{key}={pattern}"):
            both = [pattern, glob.escape(pattern)]
            if _is_closed():  # without that list, what is cached would pass for all that there is
                get_cached_repo_tree(self.name, repo_type=self.kind, revision=commit)
            folder = Path(snapshot_download(self.name, revision=commit, allow_patterns=both, **self._how()))
        if not (found := find(folder, pattern)):
            raise ValueError(f"{key}={pattern}: {self._what} has no such file{self._at}; look at its list of files")
        self._kept(folder)
        return found

    @property
    def label(self) -> str:
        """Key and value."""
        return f"{self.key}={self.name}"

    @property
    def _asked(self) -> tuple[str, str, str | None]:
        return self.kind, self.name, self.revision

    @property
    def _what(self) -> str:
        return f"the {self.kind} {self.name}"

    @property
    def _at(self) -> str:
        return f" at {self.revision}" if self.revision else ""

    @property
    def _place(self) -> Path:
        """Where the hub's library keeps this repository, in the layout that it documents."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE).expanduser() / "--".join([f"{self.kind}s", *self.name.split("/")])

    @property
    def _folder(self) -> Path:
        return self._place / "snapshots" / self.commit()

    @property
    def _ref(self) -> Path:
        return self._place / "refs" / (self.revision or "main")

    def _how(self) -> dict[str, Any]:
        return {"repo_type": self.kind, "local_files_only": _is_closed()}

    def _resolve(self) -> None:
        """Ask the hub for the commit; where it can't be asked, its cache remembers that of the last download."""
        if self.revision and len(self.revision) == 40 and set(self.revision) <= set("0123456789abcdef"):
            _commits[self._asked] = self.revision
            return
        known = self._ref.read_text(encoding="utf-8").strip() if self._ref.is_file() else ""
        error: Exception | None = None
        if not _is_closed():
            try:
                info = self._ask()
                _commits[self._asked] = info.sha
                if self.kind == "model":
                    _names[self._asked] = [file.rfilename for file in info.siblings]
                return
            except Exception as failure:
                if not is_transient(failure):
                    raise
                _close()
                error = failure
        if not known:
            raise error or LookupError("not cached")
        if error:
            log.warning("warning: the hub does not answer (%s); %s is read from the cache", line(error), self.name)
        _commits[self._asked] = known
        _remembered.add(self._ref)

    def _ask(self) -> Any:
        """The hub's description: of a model with its list of files, of a dataset, which may have very many, without."""
        from huggingface_hub import HfApi

        some = {} if self.kind == "model" else {"expand": ["sha"]}
        how: dict[str, Any] = {"repo_type": self.kind, "revision": self.revision, "timeout": PATIENCE, **some}
        return _patiently(lambda: HfApi().repo_info(self.name, **how))

    def _reach(self, name: str) -> None:
        """Wait a bounded time for the hub to tell of a file that isn't cached: the library would try again for minutes."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        if self._is_cached(name) or _is_closed() or time.monotonic() - _answered < FRESH:
            return
        url = hf_hub_url(self.name, name, repo_type=self.kind, revision=self.commit())
        _patiently(lambda: get_hf_file_metadata(url, timeout=PATIENCE))

    def _is_cached(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def _cached(self) -> list[str]:
        """The names of all files, if the cache remembers them, or else of those that are in it."""
        from huggingface_hub import errors, get_cached_repo_tree

        folder = self._folder
        try:
            return [file.path for file in get_cached_repo_tree(self.name, repo_type=self.kind, revision=folder.name)]
        except errors.CachedRepoTreeNotFoundError:
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def _kept(self, path: Path) -> Path:
        """Let the cache remember the branch's commit, now that something of it is there: without the hub it is asked for."""
        commit = self.commit()
        if self._ref not in _remembered and self.revision != commit:
            with suppress(OSError):
                self._ref.parent.mkdir(parents=True, exist_ok=True)
                temporary = self._ref.with_name(f".{self._ref.name}.{os.getpid()}")
                temporary.write_text(commit, encoding="utf-8")
                temporary.replace(self._ref)
            _remembered.add(self._ref)
        return path

    @contextmanager
    def _explained(self, file: str | None = None) -> Iterator[None]:
        """Turn what the hub's library raises into one line. `file`: key and value of what is asked for within it."""
        try:
            yield
        except Exception as error:
            raise ValueError(explain(error, self, file)) from error


def find(folder: Path, pattern: str) -> list[Path]:
    """The file of exactly that name in a folder, or else the files that a glob fits, sorted."""
    literal = folder / pattern
    return [literal] if literal.is_file() else sorted(path for path in folder.glob(pattern) if path.is_file())


def _is_closed() -> bool:
    """Whether the hub is not to be asked: the user forbids it, or it did not answer a moment ago."""
    return is_offline() or time.monotonic() < _down_until


def _close() -> None:
    """Do not wait again for a hub that did not answer."""
    global _down_until
    _down_until = time.monotonic() + REST


def _patiently(ask: Callable[[], Any]) -> Any:
    """What `ask` returns, tried again a few times where the hub says that it is busy."""
    global _answered
    for pause in PAUSES:
        try:
            answer = ask()
            _answered = time.monotonic()
            return answer
        except Exception as error:
            if status_of(error) not in BUSY:
                raise
        time.sleep(pause)
    return ask()
