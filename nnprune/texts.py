"""Documents, conversations or token ids from a local file, from the embedded demo, or from a dataset on the hub. No model."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch import Tensor

from nnprune.checks import check_count, quoted
from nnprune.files.digests import file_digest
from nnprune.files.hub import Repository, find
from nnprune.files.text_files import (
    KINDS,
    NoSuchColumn,
    check_kind,
    holds_ids,
    read_conversations,
    read_documents,
    read_joined,
    read_rows,
    suffix,
)

T = TypeVar("T")

Conversation = list[dict[str, Any]]
"""Messages in order, with "role" and "content"."""

DEMO_FOLDER = Path(__file__).parent / "data" / "demo"


@dataclass(frozen=True)
class TextSource:
    """Where documents come from: either `path`, or `dataset` with `data_files`.

    Args:
        key: the config key of this source, for error messages.
        path: one or several local files (text, JSON, CSV, also compressed, or Parquet); "demo:NAME" is a file of the embedded demo.
        dataset: a dataset id on the hub, or a local folder with the hub's files in it.
        data_files: the file, or glob, to read within `dataset`.
        column: the column that holds the text, in all formats but .txt.
        revision: branch, tag or commit of `dataset`.
        separator: what joins documents when they are read as one text.
        max_documents: read no more than this many.
    """

    key: str
    path: str | Sequence[str] | None = None
    dataset: str | None = None
    data_files: str | None = None
    column: str = "text"
    revision: str | None = None
    separator: str = "\n\n"
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise ValueError(f"{self.key}: give either path= (local files) or dataset= (a hub id or a local copy of it)")
        if self.path in ([], ""):
            raise ValueError(f"{self.key}.path={self.path}: names no file; give one or several")
        for name in ("dataset", "column", "revision", "separator"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                raise ValueError(f"{self.key}.{name}={quoted(value)}: must be text; put a number in quotes")
        if self.dataset is not None and not (self.data_files and isinstance(self.data_files, str)):
            raise ValueError(
                f"{self.key}.data_files={quoted(self.data_files)}: must be the file, or a glob, to read within dataset"
            )
        if self.data_files is not None and (self.data_files.startswith("/") or ".." in PurePosixPath(self.data_files).parts):
            raise ValueError(f"{self.key}.data_files={self.data_files}: must lie within dataset; write it as on the hub")
        if self.max_documents is not None:
            check_count(f"{self.key}.max_documents", self.max_documents, 1)

    def documents(self) -> Sequence[str]:
        """The documents in order. Raises ValueError when they cannot be had or there are none."""
        return self._read(read_documents)

    def conversations(self) -> Sequence[Conversation]:
        """The conversations in order. Raises ValueError when they cannot be had or there are none."""
        return self._read(read_conversations)

    def rows(self) -> Sequence[list[int]]:
        """The rows of token ids in order. Raises ValueError when they cannot be had or there are none."""
        return self._read(read_rows)

    def token_ids(self, tokenizer: Callable[[str], Any]) -> Tensor:
        """All documents as one sequence of token ids (tokens,), int64: those in the files, or those of the joined text."""
        paths = self._files()
        if paths and all(self._read_file(path, holds_ids) for path in paths):
            return torch.tensor([index for row in self.rows() for index in row], dtype=torch.int64)
        return torch.tensor(tokenizer(self.joined()).input_ids, dtype=torch.int64)

    def _read(self, read: Callable[[Path, str], Sequence[T]]) -> Sequence[T]:
        parts = [self._read_file(path, read) for path in self._files()]
        found = parts[0] if len(parts) == 1 else [one for part in parts for one in part]
        if not found:
            raise ValueError(self._no_text)
        return found[: self.max_documents] if self.max_documents is not None else found

    def joined(self) -> str:
        """All documents as one text."""
        if self.max_documents is not None:
            return self.separator.join(self.documents())
        parts = [part for path in self._files() if (part := self._read_file(path, read_joined, self.separator))]
        if not parts:
            raise ValueError(self._no_text)
        return self.separator.join(parts)

    def check(self) -> None:
        """Raise ValueError when a local file is missing or of an unknown kind; reads nothing."""
        folder = self._dataset_folder()
        if folder and not find(folder, self.data_files):
            raise ValueError(f"{self.key}.dataset={self.dataset}: has no file {self.data_files}; copy it there as on the hub")
        for path in self._paths():
            if not path.is_file():
                raise ValueError(f"{self.key}.path={path}: no such file; give a {KINDS}")
            _check_kind(f"{self.key}.path={path}", path)

    def digest(self) -> str | None:
        """SHA-256 over the local files, so that a text is known by its content; None for a dataset of the hub, whose `commit`
        tells. Raises OSError when a file can't be read."""
        if self._repository():
            return None
        sha = hashlib.sha256()
        for path in self._files():
            sha.update(suffix(path).encode())  # the same bytes mean something else in another format
            sha.update(bytes.fromhex(file_digest(path)))
        return sha.hexdigest()[:16]

    @property
    def commit(self) -> str | None:
        """The commit of the dataset on the hub, asked for once a process; None for local files. Raises ValueError when it can't
        be had."""
        repository = self._repository()
        return repository.commit() if repository else None

    def _files(self) -> list[Path]:
        """The files to read, in order; those of the hub are fetched."""
        if folder := self._dataset_folder():
            return find(folder, self.data_files)
        if not (repository := self._repository()):
            return self._paths()
        key = f"{self.key}.data_files"
        if any(sign in self.data_files for sign in "*?["):
            return repository.matching(self.data_files, key)
        return [repository.file(self.data_files, key)]

    def _repository(self) -> Repository | None:
        """The dataset on the hub, when it is one."""
        if self.dataset is None or self._dataset_folder():
            return None
        return Repository(f"{self.key}.dataset", self.dataset, "dataset", self.revision, self.data_files)

    def identity(self) -> dict[str, Any]:
        """The settings that make this another text when they change: local files count by their content, those of the hub by
        their commit."""
        digest = self.digest()
        known = {"path": digest, "dataset": None} if digest else {"revision": self.commit}
        return {**vars(self), **known, "key": None}

    def _paths(self) -> list[Path]:
        if self.path is None:
            return []
        paths = map(str, self.path if isinstance(self.path, list | tuple) else [self.path])
        return [DEMO_FOLDER / path[5:] if path.startswith("demo:") else Path(path).expanduser() for path in paths]

    def _dataset_folder(self) -> Path | None:
        """The folder that `dataset` names, when it is no dataset of the hub."""
        folder = Path(self.dataset).expanduser() if self.dataset is not None else None
        return folder if folder and folder.is_dir() else None

    def _where(self) -> str:
        return f"{self.key}.path={self.path}" if self.dataset is None else f"{self.key}.dataset={self.dataset}"

    @property
    def _no_text(self) -> str:
        return f"{self._where()}: holds no text; name another file"

    def _read_file(self, path: Path, read: Callable[..., T], *options: str) -> T:
        """What `read(path, column, *options)` returns, its errors with the setting and the file."""
        named = f"{self.key}.path={path}" if self.dataset is None else f"{self._where()} {self.data_files}"
        _check_kind(f"{self.key}.data_files={self.data_files}" if self.dataset else named, path)
        try:
            return read(path, self.column, *options)
        except NoSuchColumn as found:
            what = "token ids" if read is read_rows else "messages" if read is read_conversations else "text"
            raise ValueError(f"{self.key}.column={self.column}: is no column of {what}; {path} has {found}") from None
        except ValueError as error:
            raise ValueError(f"{named}: {error}") from error


def check_ids(where: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a token id is none of a model's `vocab_size`. `where` names the setting."""
    for found in (int(ids.min()), int(ids.max())) if ids.numel() else ():
        if not 0 <= found < vocab_size:
            remedy = "tokenise the text with the tokenizer of this model"
            raise ValueError(f"{where}: has the token id {found}, the model's go from 0 to {vocab_size - 1}; {remedy}")


def _check_kind(where: str, path: Path) -> None:
    try:
        check_kind(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
