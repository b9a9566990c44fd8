"""Documents, token ids or conversations of one local file: .txt, or a table that the datasets library reads.

A path names the file of exactly that name.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nnprune.files.digests import cache_folder, file_digest

TEXT = ".txt"

TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Suffix -> what the datasets library calls the format. The documents are in one of several columns."""

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
"""Suffixes that may follow those of text, JSON and CSV."""

KINDS = ".txt, .jsonl, .json, .csv (also .gz, .xz, .bz2 or .zst) or .parquet file"
"""For error messages."""


class NoSuchColumn(ValueError):
    """The file has no such column of what is to be read; its columns of that are the message."""


def suffix(path: Path) -> str:
    """ ".json.gz" and the like as one suffix."""
    return "".join(path.suffixes[-2:]) if path.suffix in COMPRESSIONS else path.suffix


def kind(path: Path) -> str:
    """The suffix without that of a compression."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


def check_kind(path: Path) -> None:
    """Raise ValueError for a file that cannot be read, by its name."""
    if kind(path) not in (TEXT, *TABLES) or suffix(path).startswith(".parquet."):
        raise ValueError(f"must be a {KINDS}")
    if path.suffix == ".zst" and find_spec("zstandard") is None:
        raise ValueError("needs a package that is not installed; pip install 'nnprune[zstd]'")


def read_documents(path: Path, column: str) -> Sequence[str]:
    """The documents of a file in order: those of `column`, in all formats but .txt.

    Raises NoSuchColumn, or ValueError with the reason why the file cannot be read, in one line.
    """
    return _paragraphs(_read_text(path))[0] if kind(path) == TEXT else _read_table(path, column, _is_text)[column]


def read_joined(path: Path, column: str, separator: str) -> str:
    """The documents of a file as one text: a .txt with a document a line is taken as it is. Raises what `read_documents` raises."""
    if kind(path) != TEXT:
        return separator.join(read_documents(path, column))
    parts, are_lines = _paragraphs(_read_text(path))
    return ("\n" if are_lines else separator).join(parts)


def read_rows(path: Path, column: str) -> Sequence[list[int]]:
    """The rows of token ids in `column` of a table. Raises what `read_documents` raises."""
    if kind(path) == TEXT:
        raise ValueError("holds text and no token ids; give a table with a column of them")
    from pyarrow.compute import list_flatten

    table = _read_table(path, column, _is_ids)
    if list_flatten(table.data.column(column)).null_count:
        raise ValueError(f"has null among the token ids of {column}; leave it out")
    return table[column]


def holds_ids(path: Path, column: str) -> bool:
    """Whether `column` of a table holds rows of token ids. Raises what `read_documents` raises."""
    return kind(path) != TEXT and _is_ids(_types(_open_table(path, column)).get(column, ""))


def read_conversations(path: Path, column: str) -> list[list[dict[str, Any]]]:
    """The conversations of a file in order, each a list of messages with "role" and "content": those of `column`, or entries of a
    JSON file that are such lists. Raises what `read_documents` raises."""
    if kind(path) in (".json", ".jsonl"):
        text = _read_text(path)
        try:
            entries = (
                json.loads(text) if kind(path) == ".json" else [json.loads(one) for one in text.split("\n") if one.strip()]
            )
        except (ValueError, RecursionError) as error:
            raise ValueError(f"could not be read ({error}); check the file") from error
    elif kind(path) == ".parquet":
        entries = _read_table(path, column, lambda arrow_type: arrow_type.startswith(("list<", "large_list<")))[column]
    else:
        raise ValueError("holds no conversations; give a .jsonl, .json or .parquet file with a list of messages in each row")
    conversations = [entry.get(column) if isinstance(entry, dict) else entry for entry in entries]
    for number, messages in enumerate(conversations, 1):
        are_messages = isinstance(messages, list) and all(
            isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages
        )
        if not are_messages or not messages:
            raise ValueError(
                f'entry {number} is no conversation; write {{"{column}": [{{"role": "user", "content": "..."}}, ...]}}'
            )
    return conversations


def _read_text(path: Path) -> str:
    try:
        if path.suffix in COMPRESSIONS:
            from fsspec.implementations.local import LocalFileSystem  # which comes with datasets, and takes a while too

            with LocalFileSystem().open(str(path.absolute()), "rt", encoding="utf-8-sig", compression="infer") as file:
                return file.read()
        return path.read_text(encoding="utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text; convert it, or name another file") from None
    except Exception as error:  # each compression has errors of its own
        raise ValueError(f"could not be read ({getattr(error, 'strerror', None) or error}); check the file") from error


def _paragraphs(text: str) -> tuple[list[str], bool]:
    """Documents of a text file: parted by blank lines or, where it has none, one a line; and whether they are lines."""
    parts = re.split(r"\n\s*\n", text.strip())
    are_lines = len(parts) == 1
    return [part for part in (text.split("\n") if are_lines else parts) if part.strip()], are_lines


def _literal(path: Path) -> str:
    """A name for a file that the library takes literally, as a pattern and as an address. It is made of the content, where a link can
    be made, so that what the library has cached of other content under the same name is not used."""
    try:
        folder = cache_folder() / "texts"
        folder.mkdir(parents=True, exist_ok=True)
        alias = folder / f"{file_digest(path)}{suffix(path)}"
        unfinished = alias.with_name(f".{alias.name}.{os.getpid()}")
        unfinished.unlink(missing_ok=True)
        unfinished.symlink_to(path.absolute())
        unfinished.replace(alias)
        return str(alias)
    except (OSError, RuntimeError):  # no home, or no links there
        return glob.escape(str(path.absolute()))


def _is_text(arrow_type: str) -> bool:
    return arrow_type in ("string", "large_string")


def _is_ids(arrow_type: str) -> bool:
    return re.fullmatch(r"(large_|fixed_size_)?list<\w+: u?int\d+.*", arrow_type) is not None


def _types(table: Any) -> dict[str, str]:
    """Column -> the Arrow type of its entries."""
    return {field.name: str(field.type) for field in table.data.schema}


def _open_table(path: Path, column: str) -> Any:
    """The table of a file in the datasets library."""
    import datasets  # takes a second to import, and a text file needs none of it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # To pandas "NA" and "null" would be no text.
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if kind(path) == ".csv" else {}
    try:
        table = datasets.load_dataset(TABLES[kind(path)], data_files={"train": _literal(path)}, split="train", **options)
        if column in table.features:
            table.data.column(column).validate(full=True)  # or bytes that are no UTF-8 would be found out about late
        return table
    except Exception as error:  # the library raises a dozen kinds
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"could not be read ({reason}); check the file") from error


def _read_table(path: Path, column: str, is_wanted: Callable[[str], bool]) -> Any:
    """The table of a file in the datasets library, with a column whose type is wanted; rows in which that is null are left out."""
    table = _open_table(path, column)
    columns = [name for name, found in _types(table).items() if is_wanted(found)]
    if column not in columns:
        raise NoSuchColumn(", ".join(columns) or "none")
    if table.data.column(column).null_count:
        table = table.filter(lambda entry: entry is not None, input_columns=column)
    return table
