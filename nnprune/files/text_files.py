"""Documents of one local file: .txt, or a table that the datasets library reads. A path names the file of exactly that name."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from nnprune.files.digests import cache_folder, file_digest

FORMATS = {".jsonl": "json", ".json": "json", ".json.gz": "json", ".jsonl.gz": "json", ".parquet": "parquet"}
"""Suffix -> what the datasets library calls the format. The documents are in one of several columns."""


class NoSuchColumn(ValueError):
    """The file has no column of text of that name; its columns of text are the message."""


def suffix(path: Path) -> str:
    """ ".json.gz" and the like as one suffix."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def read_documents(path: Path, column: str) -> Sequence[str]:
    """The documents of a file in order: those of `column`, in all formats but .txt.

    Raises NoSuchColumn, or ValueError with the reason why the file cannot be read, in one line.
    """
    return _paragraphs(_read_text(path))[0] if path.suffix == ".txt" else _read_table(path, column)


def read_joined(path: Path, column: str, separator: str) -> str:
    """The documents of a file as one text: a .txt with a document a line is taken as it is. Raises what `read_documents` raises."""
    if path.suffix != ".txt":
        return separator.join(read_documents(path, column))
    parts, are_lines = _paragraphs(_read_text(path))
    return ("\n" if are_lines else separator).join(parts)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text; convert it, or name another file") from None
    except OSError as error:
        raise ValueError(f"could not be read ({error.strerror}); check the file") from error


def _paragraphs(text: str) -> tuple[list[str], bool]:
    """Documents of a text file: parted by blank lines or, where it has none, one a line; and whether they are lines."""
    parts = re.split(r"\n\s*\n", text.strip())
    are_lines = len(parts) == 1
    return [part for part in (text.splitlines() if are_lines else parts) if part.strip()], are_lines


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


def _read_table(path: Path, column: str) -> Sequence[str]:
    import datasets  # takes a second to import, and a text file needs none of it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        table = datasets.load_dataset(FORMATS[suffix(path)], data_files={"train": _literal(path)}, split="train")
        if column in table.features:
            table.data.column(column).validate(full=True)  # or bytes that are no UTF-8 would be found out about late
    except Exception as error:  # the library raises a dozen kinds
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"could not be read ({reason}); check the file") from error
    columns = [name for name, kind in table.features.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
    if column not in columns:
        raise NoSuchColumn(", ".join(columns) or "none")
    if table.data.column(column).null_count:
        table = table.filter(lambda text: text is not None, input_columns=column)
    return table[column]
