"""Tables in a Markdown file: where they stand and what their markers ask for. What is in them is for tables.py."""

from __future__ import annotations

import re
from dataclasses import dataclass

START = re.compile(r"<!--\s*nnprune:table\b(.*?)-->\s*")
END = re.compile(r"<!--\s*/nnprune:table\s*-->\s*")
EXAMPLE = "<!-- nnprune:table metric=NAME --> and, on a later line, <!-- /nnprune:table -->"
LISTS = ("models", "pruners", "sparsities")


class MarkerError(ValueError):
    """One line that names the file, the line, what is wrong there and the remedy."""


@dataclass
class Block:
    """A marked table: lines[start] is its first marker, lines[end] its second."""

    start: int
    end: int
    attributes: dict[str, str]


def find_blocks(lines: list[str], name: str) -> list[Block]:
    """The marked tables. Markers inside a code fence are an example, not a table."""
    blocks, fence, opened = [], "", None
    for i, line in enumerate(lines):
        mark = re.match(r"\s{0,3}(```+|~~~+)", line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        if fence:
            continue
        start = START.fullmatch(line)
        if start and opened is None:
            opened = Block(i, i, parse_attributes(start[1], f"{name}:{i + 1}"))
        elif END.fullmatch(line) and opened is not None:
            opened.end = i
            blocks.append(opened)
            opened = None
        elif start or END.fullmatch(line):
            raise MarkerError(f"{name}:{i + 1}: marker without its partner; a table needs {EXAMPLE}")
    if opened is not None:
        raise MarkerError(f"{name}:{opened.start + 1}: table without an end; add <!-- /nnprune:table --> below it")
    if not blocks:
        raise MarkerError(f"{name}: no marked table; add {EXAMPLE}")
    return blocks


def parse_attributes(text: str, where: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in text.split()]
    attributes = {key: value for key, _, value in pairs}
    for key, _, value in pairs:
        if key not in ("metric", *LISTS) or not value:
            raise MarkerError(f"{where}: '{key}={value}' is not understood; use metric=NAME, {'=A,B, '.join(LISTS)}=A,B")
    if "metric" not in attributes:
        raise MarkerError(f"{where}: the marker names no metric; write <!-- nnprune:table metric=NAME -->")
    return attributes
