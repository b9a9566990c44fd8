"""Markdown files whose marked tables are compared with the records or rewritten from them."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nnprune import records
from nnprune.report import tables
from nnprune.report.markdown import EXAMPLE, Block, find_blocks
from nnprune.report.messages import UsageError, print_table, warn
from nnprune.report.rendering import to_markdown
from nnprune.report.task_tables import build_tasks_table

README = "README.md"
DOCUMENTS = [README, "docs/methods.md"]  # all but the first may be missing or without a table


def check_known(frame: pd.DataFrame, column: str, name: str, where: str) -> None:
    """Raise UsageError, prefixed by `where`, unless the frame's `column`, "metric" or "pruner", has the value `name`."""
    names = sorted(frame[column].unique())
    if name not in names:
        raise UsageError(f"{where}{name}: no record has this {column}; known: {', '.join(names)}")


def build_block(frame: pd.DataFrame, block: Block, name: str) -> tables.Table:
    """The table that a block of the file `name` asks for. Raises UsageError for a metric or pruner without a record."""
    where = f"{name}:{block.start + 1}: "
    metrics = block.metric.split(",") if block.layout == "tasks" else [block.metric]
    for metric in metrics:
        check_known(frame, "metric", metric, f"{where}metric=")
    if block.layout == "tasks":
        filters = {**block.filters}
        [model] = filters.pop("models")
        return build_tasks_table(frame, metrics, model, **filters)
    if block.layout == "methods":
        if block.relative:
            check_known(frame, "pruner", block.relative, f"{where}relative=")
        filters = {**block.filters}
        [model] = filters.pop("models")
        return tables.build_methods_table(frame, block.metric, model, block.costs, block.relative, **filters)
    return tables.build_table(frame, block.metric, **block.filters)


@dataclass
class Document:
    """A Markdown file: its text as it is, and as it is with tables from the records."""

    path: Path
    name: str
    old: str
    new: str
    tables: list[tables.Table]


def render(frame: pd.DataFrame, path: Path, name: str) -> Document:
    """The Markdown file at `path`, called `name` in messages. Raises UsageError for what is wrong in it."""
    try:
        with path.open(encoding="utf-8", newline="") as file:  # newline="": line ends stay as they are
            old = file.read()
    except OSError as error:
        reason = f"{error.strerror}; name a Markdown file, or print a table with --metric NAME"
        raise UsageError(f"--readme {path}: {reason}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--readme {path}: is no UTF-8 text; name a Markdown file") from error
    end_of_line = "\r\n" if "\r\n" in old else "\n"
    lines = old.splitlines(keepends=True)
    blocks = find_blocks(lines, name)
    built = [build_block(frame, block, name) for block in blocks]
    for block, table in reversed(list(zip(blocks, built, strict=True))):  # from below, so that line numbers stay valid
        body = to_markdown(table)
        lines[block.start + 1 : block.end] = [end_of_line.join(["", *body.split("\n"), ""])]
    return Document(path, name, old, "".join(lines), built)


def have_tables() -> bool:
    """Whether any of the default files is here and speaks of a marked table."""
    here = [Path(name) for name in DOCUMENTS if Path(name).is_file()]
    try:
        return any(b"nnprune:table" in path.read_bytes() for path in here)
    except OSError:
        return True  # `render` says what is wrong


def render_all(frame: pd.DataFrame, readme: Path | None) -> list[Document]:
    """The file named, or the default ones. All are rendered before any is written, so that an error leaves all alone."""
    if readme is None:
        documents = [render(frame, Path(name), name) for name in DOCUMENTS if name == README or Path(name).is_file()]
    else:
        documents = [render(frame, readme, readme.name)]
    if not documents[0].tables:
        raise UsageError(f"{documents[0].name}: no marked table; add {EXAMPLE}")
    documents = [document for document in documents if document.tables]
    warn([line for document in documents for table in document.tables for line in table.warnings])
    return documents


def check(documents: list[Document]) -> int:
    """Print a diff of each document whose tables are out of date. Returns 1 if there is one, else 0."""
    stale = [document for document in documents if document.old != document.new]
    for document in stale:
        old, new = document.old.splitlines(), document.new.splitlines()
        print("\n".join(difflib.unified_diff(old, new, document.name, "records", n=1, lineterm="")))
    if not stale:
        print(f"{summary(documents)} match the records")
    return int(bool(stale))


def rewrite(documents: list[Document]) -> None:
    """Print all tables, and write the documents that have changed. Raises UsageError when one cannot be written."""
    for table in [table for document in documents for table in document.tables]:
        print_table(table)
    stale = [document for document in documents if document.old != document.new]
    for document in stale:
        try:
            records.write_atomically(document.path.resolve(), document.new)  # resolved, so that a link stays a link
        except OSError as error:
            reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error.strerror
            raise UsageError(f"{document.path}: cannot be written ({reason}); make it writable, or make room") from error
    if stale:
        print(f"{summary(stale)} rewritten")
    if current := [document for document in documents if document not in stale]:
        print(f"{summary(current)} already up to date")


def summary(documents: list[Document]) -> str:
    return f"{', '.join(d.name for d in documents)}: {sum(len(d.tables) for d in documents)} table(s)"
