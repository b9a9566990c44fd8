"""Run records -> the README's tables, CSV, JSON, LaTeX, a plot. Formats what runs measured; computes no metric.

All arithmetic is the mean and standard deviation of records that differ in nothing but the seed, the mean and the most of
what they took, and, where a table asks for it, ln(perplexity / dense perplexity) beside that of one method.

    python scripts/collect.py                               rewrite every marked table of README.md and docs/methods.md
    python scripts/collect.py --check                       write nothing; exit 1 if a table is out of date
    python scripts/collect.py --metric demo_perplexity      print one table over all models
    python scripts/collect.py --format csv > runs.csv       print all records (csv, json) or tables (latex, markdown)
    python scripts/collect.py --plot sparsity.png           perplexity against sparsity

A table stands between two lines, and is rewritten from the records each time:

    <!-- nnprune:table metric=demo_perplexity models=demo,opt-125m pruners=wanda sparsities=0.5,2:4 -->
    <!-- /nnprune:table -->

Only `metric` is needed. The next three are comma lists that filter; `models` gives the order of the columns as well.
`layout=methods` is a table of one model, `models=demo`, with sparsities as columns; `costs=true` adds what its runs took:
seconds, and memory; with `relative=sparsegpt` cells are ln(perplexity / dense perplexity), SparseGPT's of the same seed as 1.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nnprune import records
from nnprune.report import plots, tables
from nnprune.report.frame import to_frame
from nnprune.report.markers import EXAMPLE, Block, MarkerError, find_blocks

README = "README.md"
DOCUMENTS = [README, "docs/methods.md"]  # those behind the first may be missing, or have no table


class UsageError(Exception):
    """One line that names what is wrong and the remedy. Exit status 2."""


class NoRecordsError(Exception):
    """There is nothing to format. Exit status 1."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # one line, without argparse's usage block
        raise UsageError(f"{message} (see --help)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--records", type=Path, metavar="DIR", help="folder of records (default: outputs/)")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help=f"file with marked tables (default: {', '.join(DOCUMENTS)})"
    )
    parser.add_argument("--metric", metavar="NAME", help="this metric only; prints, and leaves files alone")
    parser.add_argument("--format", choices=["markdown", "csv", "latex", "json"], help="print; leave files alone")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 when a table is out of date")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a figure; leave files alone")
    args = parser.parse_args(argv)
    if args.check and (args.metric or args.format or args.plot):
        parser.error("--check compares whole files: leave out --metric, --format and --plot")
    if args.format and args.plot:
        parser.error("--format and --plot do not go together: run them one after the other")
    if args.readme and (args.metric or args.format or args.plot):
        parser.error("--readme is for rewriting or --check: leave it out with --metric, --format and --plot")
    return args


def load(folder: Path | None) -> pd.DataFrame:
    """The usable records as one long frame; the others are named on stderr."""
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--records {folder}: no such folder; name one that holds result.json files")
    folder = folder or Path("outputs")
    found, broken = records.read_all(folder) if folder.is_dir() else ([], [])
    frame, problems = to_frame(found)
    warn([f"{path}: skipped, {reason}" for path, reason in broken] + problems)
    if frame.empty:
        skipped = f" ({len(broken) + len(problems)} skipped)" if broken or problems else ""
        raise NoRecordsError(f"no completed records under {folder}{skipped}; run an experiment or name --records DIR")
    return frame


def warn(lines: list[str]) -> None:
    for line in dict.fromkeys(lines):  # two tables may share a cell
        print(f"warning: {line}", file=sys.stderr)


def known(frame: pd.DataFrame, column: str, name: str, where: str) -> str:
    """`name`, a value of the frame's `column`: "metric" or "pruner"."""
    names = sorted(frame[column].unique())
    if name not in names:
        raise UsageError(f"{where}{name}: no record has this {column}; known: {', '.join(names)}")
    return name


def render_block(frame: pd.DataFrame, block: Block, name: str) -> tables.Table:
    where = f"{name}:{block.start + 1}: "
    metric = known(frame, "metric", block.metric, f"{where}metric=")
    if block.layout == "methods":
        if block.relative:
            known(frame, "pruner", block.relative, f"{where}relative=")
        options = {**block.filters, "model": block.filters["models"][0], "costs": block.costs, "relative": block.relative}
        del options["models"]
        return tables.build_methods_table(frame, metric, **options)
    return tables.build_table(frame, metric, **block.filters)


@dataclass
class Document:
    """A Markdown file as it is and as the records want it."""

    path: Path
    name: str
    old: str
    new: str
    tables: list[tables.Table]


def render(frame: pd.DataFrame, path: Path, name: str) -> Document:
    try:
        with path.open(encoding="utf-8", newline="") as file:  # newline="": line ends stay as they are
            old = file.read()
    except OSError as error:
        raise UsageError(f"--readme {path}: {error.strerror}; name a Markdown file") from error
    end_of_line = "\r\n" if "\r\n" in old else "\n"
    lines = old.splitlines(keepends=True)
    blocks = find_blocks(lines, name)
    rendered = [render_block(frame, block, name) for block in blocks]
    for block, table in reversed(list(zip(blocks, rendered, strict=True))):  # from below: line numbers stay valid
        body = tables.to_markdown(table)
        lines[block.start + 1 : block.end] = [end_of_line.join(["", *body.split("\n"), ""])]
    return Document(path, name, old, "".join(lines), rendered)


def render_all(frame: pd.DataFrame, readme: Path | None) -> list[Document]:
    """The file named, or the default ones. Nothing is written before all of them are understood."""
    if readme is None:
        paths = {name: Path(name) for name in DOCUMENTS}
        documents = [render(frame, path, name) for name, path in paths.items() if name == README or path.is_file()]
    else:
        documents = [render(frame, readme, readme.name)]
    if not documents[0].tables:
        raise UsageError(f"{documents[0].name}: no marked table; add {EXAMPLE}")
    documents = [document for document in documents if document.tables]
    warn([line for document in documents for table in document.tables for line in table.warnings])
    return documents


def check(documents: list[Document]) -> int:
    stale = [document for document in documents if document.old != document.new]
    for document in stale:
        old, new = document.old.splitlines(), document.new.splitlines()
        print("\n".join(difflib.unified_diff(old, new, document.name, "records", n=1, lineterm="")))
    if not stale:
        print(f"{count(documents)} match the records")
    return int(bool(stale))


def rewrite(documents: list[Document]) -> None:
    for table in [table for document in documents for table in document.tables]:
        print_table(table)
    stale = [document for document in documents if document.old != document.new]
    for document in stale:
        records.write_atomically(document.path.resolve(), document.new)  # resolved: a link stays a link
    if stale:
        print(f"{count(stale)} rewritten")
    if current := [document for document in documents if document not in stale]:
        print(f"{count(current)} already up to date")


def count(documents: list[Document]) -> str:
    return f"{', '.join(d.name for d in documents)}: {sum(len(d.tables) for d in documents)} table(s)"


def print_table(table: tables.Table) -> None:
    print(tables.to_markdown(table), f"\n{table.caption}: {table.num_records} record(s) used\n", sep="")


def print_format(frame: pd.DataFrame, style: str, metrics: list[str]) -> None:
    """csv, json: a long-form row per record and metric. markdown, latex: a table per metric."""
    rows = frame[frame["metric"].isin(metrics)]
    if style == "csv":
        print(rows.to_csv(index=False), end="")
    elif style == "json":  # not DataFrame.to_json, which rounds to 10 digits; JSON itself knows no nan and no inf
        plain = rows.astype(object).where(rows.notna(), None).to_dict("records")
        lost = (float, int)
        plain = [{k: v if not isinstance(v, lost) or math.isfinite(v) else None for k, v in r.items()} for r in plain]
        print(json.dumps(plain, indent=2))
    else:
        made = [tables.build_table(frame, metric) for metric in metrics]
        warn([line for table in made for line in table.warnings])
        for table in made:
            print_table(table) if style == "markdown" else print(tables.to_latex(table))


def plot(frame: pd.DataFrame, path: Path, metric: str | None) -> None:
    if path.suffix.lower() not in plots.SUFFIXES:
        raise UsageError(f"--plot {path}: unknown suffix '{path.suffix}'; use one of {', '.join(plots.SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: the folder {path.parent} does not exist; make it first")
    candidates = [metric] if metric else sorted(m for m in frame["metric"].unique() if m.endswith("perplexity"))
    if len(candidates) != 1:
        raise UsageError(f"--plot {path}: which metric? add --metric NAME, one of {sorted(frame['metric'].unique())}")
    try:
        warn(plots.plot_sparsity(frame, candidates[0], path))
    except ValueError as error:
        raise UsageError(f"--plot {path}: {error}") from error
    except ModuleNotFoundError as error:
        raise UsageError(f"--plot {path}: {error.name} is missing; pip install nnprune[dev]") from error
    print(f"{path}: {candidates[0]} against sparsity")


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse_args(argv)
        frame = load(args.records)
        if args.metric:
            known(frame, "metric", args.metric, "--metric ")
        metrics = [args.metric] if args.metric else sorted(frame["metric"].unique())
        if args.plot:
            plot(frame, args.plot, args.metric)
        elif args.format or args.metric:
            print_format(frame, args.format or "markdown", metrics)
        else:
            documents = render_all(frame, args.readme)
            if args.check:
                return check(documents)
            rewrite(documents)
    except (UsageError, MarkerError, NoRecordsError) as error:
        print(f"collect.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, NoRecordsError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
