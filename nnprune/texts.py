"""Documents from a local file, from the embedded demo, or from a dataset on the hub. No tokens, no model."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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

    def documents(self) -> Sequence[str]:
        """The documents in order. Raises ValueError when they cannot be had or there are none."""
        if self.dataset is not None:
            documents = self._read_dataset()
        else:
            documents = [document for path in self._paths() for document in self._read_file(path)]
        if not len(documents):
            raise ValueError(f"{self.key}: {self._where()} holds no text; name another file")
        return documents[: self.max_documents] if self.max_documents else documents

    def joined(self) -> str:
        """All documents as one text."""
        return self.separator.join(self.documents())

    def check(self) -> None:
        """Raise ValueError when a local file is missing or of an unknown kind; reads nothing."""
        for path in self._paths():
            if not path.is_file():
                raise ValueError(f"{self.key}.path={path}: no such file; give a .txt, .jsonl, .json.gz or .parquet file")
            if path.suffix != ".txt" and _suffix(path) not in TABLE_FORMATS:
                raise ValueError(f"{self.key}.path={path}: must be a .txt, .jsonl, .json.gz or .parquet file")

    def digest(self) -> str | None:
        """SHA-256 over the local files, so that a text is known by its content; None for a dataset."""
        if self.path is None:
            return None
        sha = hashlib.sha256()
        for path in self._paths():
            with path.open("rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
        return sha.hexdigest()[:16]

    def _paths(self) -> list[Path]:
        if self.path is None:
            return []
        paths = [self.path] if isinstance(self.path, str) else list(self.path)
        return [DEMO_FOLDER / path[5:] if path.startswith("demo:") else Path(path).expanduser() for path in paths]

    def _where(self) -> str:
        return str(self.path or f"{self.dataset}/{self.data_files}")

    def _read_file(self, path: Path) -> Sequence[str]:
        if path.suffix == ".txt":
            try:
                return _paragraphs(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                raise ValueError(f"{self.key}.path={path}: is not UTF-8 text; convert it, or name another file") from None
        return self._load(TABLE_FORMATS[_suffix(path)], str(path))

    def _read_dataset(self) -> Sequence[str]:
        folder = Path(self.dataset).expanduser()
        if folder.is_dir() and not any(folder.glob(self.data_files)):
            raise ValueError(f"{self.key}.dataset={self.dataset}: has no file {self.data_files}; copy it there as on the hub")
        return self._load(str(folder) if folder.is_dir() else self.dataset, self.data_files, revision=self.revision)

    def _load(self, builder: str, data_files: str, **options: str | None) -> Sequence[str]:
        import datasets  # takes a second to import, and a text file needs none of it

        datasets.disable_progress_bars()
        try:
            table = datasets.load_dataset(builder, data_files={"train": data_files}, split="train", **options)
        except Exception as error:  # the library raises a dozen kinds for "not reachable" and "not readable"
            advice = "check the file"
            if self.dataset is not None:
                group = self.key.split(".")[0]
                advice = (
                    f"without a hub, point {self.key}.dataset at a local folder that holds {self.data_files}, "
                    f"or use {group}=text {group}.path=FILE"
                )
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{self.key}: {self._where()} could not be read ({reason}); {advice}") from error
        if self.column not in table.column_names:
            raise ValueError(f"{self.key}.column={self.column}: {self._where()} has the columns {table.column_names}")
        return table[self.column]


def _paragraphs(text: str) -> list[str]:
    """Documents of a text file: parted by blank lines or, where it has none, one a line."""
    parts = re.split(r"\n\s*\n", text.strip())
    parts = parts if len(parts) > 1 else text.splitlines()
    return [part for part in parts if part.strip()]


def _suffix(path: Path) -> str:
    """".json.gz" and the like as one suffix."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
