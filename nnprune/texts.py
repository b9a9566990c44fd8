"""Documents from a local file, from the embedded demo, or from a dataset on the hub. No tokens, no model."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnprune.checks import check_count

DEMO_FOLDER = Path(__file__).parent / "data" / "demo"
TABLE_FORMATS = {".jsonl": "json", ".json": "json", ".json.gz": "json", ".jsonl.gz": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextSource:
    """Where documents come from: either `path`, or `dataset` with `data_files`.

    Args:
        key: the config key of this source, for error messages.
        path: one or several local files (.txt, .jsonl, .json.gz, .parquet); "demo:NAME" is a file of the embedded demo.
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
        if self.dataset is not None and not (self.data_files and isinstance(self.data_files, str)):
            raise ValueError(f"{self.key}.data_files={self.data_files}: must be the file, or a glob, to read within dataset")
        if self.max_documents is not None:
            check_count(f"{self.key}.max_documents", self.max_documents, 1)

    def documents(self) -> Sequence[str]:
        """The documents in order. Raises ValueError when they cannot be had or there are none."""
        if self.dataset is not None:
            documents = self._read_dataset()
        else:
            documents = [document for path in self._paths() for document in self._read_file(path)]
        if not documents:
            raise ValueError(f"{self._where()}: holds no text; name another file")
        return documents[: self.max_documents] if self.max_documents is not None else documents

    def joined(self) -> str:
        """All documents as one text."""
        return self.separator.join(self.documents())

    def check(self) -> None:
        """Raise ValueError when a local file is missing or of an unknown kind; reads nothing."""
        folder = self._dataset_folder()
        if folder and not any(folder.glob(self.data_files)):
            raise ValueError(f"{self.key}.dataset={self.dataset}: has no file {self.data_files}; copy it there as on the hub")
        for path in self._paths():
            if not path.is_file():
                raise ValueError(f"{self.key}.path={path}: no such file; give a .txt, .jsonl, .json.gz or .parquet file")
            if path.suffix != ".txt" and _suffix(path) not in TABLE_FORMATS:
                raise ValueError(f"{self.key}.path={path}: must be a .txt, .jsonl, .json.gz or .parquet file")

    def digest(self) -> str | None:
        """SHA-256 over the local files, so that a text is known by its content; None for a dataset of the hub."""
        folder = self._dataset_folder()
        files = sorted(folder.glob(self.data_files)) if folder else self._paths()
        sha = hashlib.sha256()
        for path in files:
            sha.update(_suffix(path).encode())  # the same bytes mean something else in another format
            with path.open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        return sha.hexdigest()[:16] if files else None

    def identity(self) -> dict[str, Any]:
        """The settings that make this another text when they change: local files count by their content."""
        digest = self.digest()
        known = {"path": digest, "dataset": None} if digest else {}
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

    def _read_file(self, path: Path) -> Sequence[str]:
        if path.suffix == ".txt":
            try:
                return _paragraphs(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                raise ValueError(f"{self.key}.path={path}: is not UTF-8 text; convert it, or name another file") from None
        return self._load(TABLE_FORMATS[_suffix(path)], str(path))

    def _read_dataset(self) -> Sequence[str]:
        return self._load(str(self._dataset_folder() or self.dataset), self.data_files, revision=self.revision)

    def _load(self, builder: str, data_files: str, **options: str | None) -> Sequence[str]:
        import datasets  # takes a second to import, and a text file needs none of it

        datasets.disable_progress_bars()
        try:
            table = datasets.load_dataset(builder, data_files={"train": data_files}, split="train", **options)
        except Exception as error:  # the library raises a dozen kinds for "not reachable" and "not readable"
            where, advice = f"{self.key}.path={data_files}", "check the file"
            if self.dataset is not None:
                where = self._where()
                group = self.key.split(".")[0]
                advice = (
                    f"without a hub, point {self.key}.dataset at a local folder that holds {self.data_files}, "
                    f"or use {group}=text {group}.path=FILE"
                )
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            raise ValueError(f"{where}: could not be read ({reason}); {advice}") from error
        columns = [name for name, kind in table.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
        if self.column not in columns:
            found = ", ".join(columns) or "none"
            raise ValueError(f"{self.key}.column={self.column}: is no column of text; {data_files} has {found}")
        if table.data.column(self.column).null_count:
            table = table.filter(lambda text: text is not None, input_columns=self.column)
        return table[self.column]


def _paragraphs(text: str) -> list[str]:
    """Documents of a text file: parted by blank lines or, where it has none, one a line."""
    parts = re.split(r"\n\s*\n", text.strip())
    parts = parts if len(parts) > 1 else text.splitlines()
    return [part for part in parts if part.strip()]


def _suffix(path: Path) -> str:
    """ ".json.gz" and the like as one suffix."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
