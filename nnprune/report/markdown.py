"""Marked tables in a Markdown file: where they are and what their markers ask for. tables.py builds and renders them."""

import re
from dataclasses import dataclass
from typing import Any

from nnprune.report.labels import normal_sparsity
from nnprune.report.messages import UsageError

START = re.compile(r"<!--\s*nnprune:table\b(.*?)-->\s*")
END = re.compile(r"<!--\s*/nnprune:table\s*-->\s*")
EXAMPLE = "<!-- nnprune:table metric=NAME --> and, on a later line, <!-- /nnprune:table -->"
LISTS = ("models", "pruners", "sparsities")
CHOICES = {"layout": ["models", "methods", "tasks"], "costs": ["true", "false"]}


@dataclass
class Block:
    """A marked table between `lines[start]` and `lines[end]`, and the options of its first marker."""

    start: int
    end: int
    metric: str
    filters: dict[str, list[str]]
    layout: str
    costs: bool
    relative: str | None


def find_blocks(lines: list[str], name: str) -> list[Block]:
    """The marked tables of the file `name`. Markers inside a code fence are an example, not a table.

    Raises UsageError for a marker without its partner, or with options that are not understood.
    """
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
            raise UsageError(f"{name}:{i + 1}: marker without its partner; a table needs {EXAMPLE}")
    if opened is not None:
        raise UsageError(f"{name}:{opened.start + 1}: table without an end; add <!-- /nnprune:table --> below it")
    return blocks


def parse_options(text: str, where: str) -> dict[str, Any]:
    """The options of a marker, as the fields of `Block` other than its lines. Raises UsageError, prefixed by `where`."""
    given = dict(item.partition("=")[::2] for item in text.split())
    for key, value in given.items():
        if key not in ("metric", "relative", *LISTS, *CHOICES) or not value or value not in CHOICES.get(key, [value]):
            choices = [f"{option}={'|'.join(values)}" for option, values in CHOICES.items()]
            usage = ", ".join(["metric=NAME", *(f"{option}=A,B" for option in LISTS), *choices, "relative=PRUNER"])
            raise UsageError(f"{where}: '{key}={value}' is not understood; use {usage}")
    if "metric" not in given:
        raise UsageError(f"{where}: the marker names no metric; write <!-- nnprune:table metric=NAME -->")
    filters = {key: list(dict.fromkeys(given[key].split(","))) for key in LISTS if key in given}
    if "sparsities" in filters:
        filters["sparsities"] = [normal_sparsity(value) for value in filters["sparsities"]]
    layout, costs, relative = given.get("layout", "models"), given.get("costs") == "true", given.get("relative")
    if layout != "models" and len(filters.get("models", [])) != 1:
        raise UsageError(f"{where}: layout={layout} shows one model; name it with models=NAME")
    if layout != "methods" and costs:
        raise UsageError(f"{where}: costs=true adds columns to layout=methods; add that, or leave it out")
    if layout != "methods" and relative:
        raise UsageError(f"{where}: relative={relative} is for layout=methods; add that, or leave it out")
    if relative and not given["metric"].endswith("perplexity"):
        raise UsageError(f"{where}: relative={relative} compares logarithms of perplexities; {given['metric']} is none")
    return {"metric": given["metric"], "filters": filters, "layout": layout, "costs": costs, "relative": relative}
