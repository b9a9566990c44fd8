"""Documents of one local file: .txt, .jsonl, .json, .parquet. A path names the file of exactly that name."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

TABLES = (".jsonl", ".json", ".json.gz", ".jsonl.gz", ".parquet")
"""Suffixes of files whose documents are in one of several columns."""

CHUNK = 10_000
"""Rows of JSON that are converted at a time."""


class Column(Sequence[str]):
    """A column of text without its empty rows, kept as Arrow keeps it: in UTF-8, which takes less memory than str.

    Args:
        data: a pyarrow.ChunkedArray of strings.
    """

    def __init__(self, data: Any) -> None:
        data.validate(full=True)  # or text that is no UTF-8 would be found out about late
        self._data = data.drop_null()

    def __len__(self) -> int:
        return len(self._data)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = self._data[index]
        return found.to_pylist() if isinstance(index, slice) else found.as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self._data.iterchunks():
            for start in range(0, len(chunk), CHUNK):
                yield from chunk[start : start + CHUNK].to_pylist()


class NoSuchColumn(ValueError):
    """The file has no column of text of that name; its columns of text are the message."""


def suffix(path: Path) -> str:
    """ ".json.gz" and the like as one suffix."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def read_documents(path: Path, column: str) -> Sequence[str]:
    """The documents of a file in order: those of `column`, in all formats but .txt.

    Raises NoSuchColumn, or ValueError with the reason why it can't be read in one line.
    """
    try:
        if path.suffix == ".txt":
            return paragraphs(path.read_text(encoding="utf-8-sig"))  # a byte-order mark is no text
        return _parquet(path, column) if path.suffix == ".parquet" else _json(path, column)
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text; convert it, or name another file") from None
    except (OSError, EOFError, RecursionError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"could not be read ({reason}); check the file") from error


def paragraphs(text: str) -> list[str]:
    """Documents of a text file: parted by blank lines or, where it has none, one a line."""
    parts = re.split(r"\n\s*\n", text.strip())
    parts = parts if len(parts) > 1 else text.splitlines()
    return [part for part in parts if part.strip()]


def _parquet(path: Path, column: str) -> Column:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            kinds = (pa.string(), pa.large_string())
            names = [field.name for field in file.schema_arrow if field.type in kinds]
            if column not in names:
                raise NoSuchColumn(", ".join(names) or "none")
            return Column(file.read([column]).column(column))
    except pa.ArrowException as error:
        raise ValueError(f"could not be read ({' '.join(str(error).split())}); check the file") from error


def _json(path: Path, column: str) -> Column:
    import pyarrow as pa

    texts, names, found = [], {}, False
    rows = _rows(path)
    done = 0
    while batch := list(islice(rows, CHUNK)):
        values = []
        for number, row in enumerate(batch, done + 1):
            if not isinstance(row, dict):
                raise ValueError(f"could not be read (row {number} is no object with columns); check the file")
            names |= {name: None for name, value in row.items() if isinstance(value, str)} if not found else {}
            value = row.get(column)
            if value is not None and not isinstance(value, str):
                raise NoSuchColumn(", ".join(name for name in names if name != column) or "none")
            found = found or value is not None
            values.append(value)
        done += len(batch)
        try:
            texts.append(pa.array(values, pa.string()))
        except UnicodeEncodeError as error:  # half of a pair of code units, as in "\ud800"
            raise ValueError(f"could not be read (a row up to {done}: {error.reason}); check the file") from error
    if done and not found:
        raise NoSuchColumn(", ".join(names) or "none")
    return Column(pa.chunked_array(texts, pa.string()))


def _rows(path: Path) -> Iterator[Any]:
    """The rows of a JSON file: one a line, or those of one list."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
        number = 0
        try:
            for line in file:
                number += 1
                if line.lstrip()[:1] == "[":  # one list over all lines
                    yield from json.loads(line + file.read())
                elif line.strip():
                    yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"could not be read (JSON parse error in line {number}: {error.msg}); check the file") from error
