"""Tables in a Markdown file: where they stand and what their markers ask for. What is in them is for tables.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nnprune.report.labels import normal_sparsity

START = re.compile(r"<!--\s*nnprune:table\b(.*?)-->\s*")
END = re.compile(r"<!--\s*/nnprune:table\s*-->\s*")
EXAMPLE = "<!-- nnprune:table metric=NAME --> and, on a later line, <!-- /nnprune:table -->"
LISTS = ("models", "pruners", "sparsities")
CHOICES = {"layout": ["models", "methods"], "costs": ["true", "false"]}


class MarkerError(ValueError):
    """One line that names the file, the line, what is wrong there and the remedy."""


@dataclass
class Block:
    """A marked table: lines[start] is its first marker, lines[end] its second."""

    start: int
    end: int
    metric: str
    filters: dict[str, list[str]]
    layout: str
    costs: bool
    relative: str | None


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
            opened = Block(i, i, **parse_options(start[1], f"{name}:{i + 1}"))
        elif END.fullmatch(line) and opened is not None:
            opened.end = i
            blocks.append(opened)
            opened = None
        elif start or END.fullmatch(line):
            raise MarkerError(f"{name}:{i + 1}: marker without its partner; a table needs {EXAMPLE}")
    if opened is not None:
        raise MarkerError(f"{name}:{opened.start + 1}: table without an end; add <!-- /nnprune:table --> below it")
    return blocks


def parse_options(text: str, where: str) -> dict[str, Any]:
    """What a marker asks for: the fields of `Block` but for its lines."""
    given = dict(item.partition("=")[::2] for item in text.split())
    for key, value in given.items():
        if key not in ("metric", "relative", *LISTS, *CHOICES) or not value or value not in CHOICES.get(key, [value]):
            known = ["metric=NAME", *(f"{name}=A,B" for name in LISTS), *(f"{k}={'|'.join(v)}" for k, v in CHOICES.items())]
            known += ["relative=PRUNER"]
            raise MarkerError(f"{where}: '{key}={value}' is not understood; use {', '.join(known)}")
    if "metric" not in given:
        raise MarkerError(f"{where}: the marker names no metric; write <!-- nnprune:table metric=NAME -->")
    filters = {key: list(dict.fromkeys(given[key].split(","))) for key in LISTS if key in given}
    if "sparsities" in filters:
        filters["sparsities"] = [normal_sparsity(value) for value in filters["sparsities"]]
    layout, costs, relative = given.get("layout", "models"), given.get("costs") == "true", given.get("relative")
    if layout == "methods" and len(filters.get("models", [])) != 1:
        raise MarkerError(f"{where}: layout=methods shows one model; name it with models=NAME")
    if layout != "methods" and costs:
        raise MarkerError(f"{where}: costs=true adds columns to layout=methods; add that, or leave it out")
    if layout != "methods" and relative:
        raise MarkerError(f"{where}: relative={relative} is for layout=methods; add that, or leave it out")
    if relative and not given["metric"].endswith("perplexity"):
        raise MarkerError(f"{where}: relative={relative} compares logarithms of perplexities; {given['metric']} is none")
    return {"metric": given["metric"], "filters": filters, "layout": layout, "costs": costs, "relative": relative}
