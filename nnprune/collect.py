"""The collector: turns the records of runs into the README's tables, CSV, JSON, LaTeX or a plot. It computes no metric.

All arithmetic is the mean and standard deviation over records that differ in nothing but the seed, their mean seconds and
peak memory, and, where a table asks for it, ln(perplexity / dense perplexity) relative to that of one pruner.

Records are read from outputs/ in the current folder. Records that cannot be used are skipped, each with a line on stderr.

    python scripts/collect.py                               rewrite every marked table of README.md and docs/methods.md
    python scripts/collect.py --check                       write nothing; exit 1 if a table is out of date
    python scripts/collect.py --metric demo_perplexity      print one table over all models
    python scripts/collect.py --format csv > runs.csv       print all records (csv, json) or tables (latex, markdown)
    python scripts/collect.py --plot sparsity.png           perplexity against sparsity

A table in a Markdown file is marked by two lines, and what is between them is replaced:

    <!-- nnprune:table metric=demo_perplexity models=demo,opt-125m pruners=wanda sparsities=0.5,2:4 -->
    <!-- /nnprune:table -->

Only `metric` is required. `models`, `pruners` and `sparsities` are comma-separated filters; `models` also orders the columns.
`layout=methods` makes a table of one model, as in `models=demo`, with sparsities as columns. There `costs=true` adds seconds
and peak memory, and `relative=sparsegpt` shows ln(perplexity / dense perplexity) divided by that of SparseGPT with the same
seed.
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

import pandas as pd

from nnprune import records
from nnprune.report import exports, plots, tables
from nnprune.report.documents import DOCUMENTS, check, check_known, render_all, rewrite
from nnprune.report.escaping import visible
from nnprune.report.frame import to_frame
from nnprune.report.messages import NoRecordsError, UsageError, print_table, warn


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # one line, without argparse's usage block
        raise UsageError(f"{message} (see --help)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line, `sys.argv` for None. Raises UsageError for those that do not go together."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--records", type=Path, metavar="DIR", help="folder of records (default: outputs/ here)")
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
    """The usable records as one long frame (`frame.to_frame`); the others are named on stderr.

    Raises UsageError when the folder named does not exist, NoRecordsError when there is no usable record.
    """
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


def print_format(frame: pd.DataFrame, style: str, metrics: list[str]) -> None:
    """Print a long-form row for each record and metric (csv, json), or a table for each metric (markdown, latex)."""
    if style in exports.FORMATS:
        print(exports.FORMATS[style](frame[frame["metric"].isin(metrics)]), end="")
    else:
        built = [tables.build_table(frame, metric) for metric in metrics]
        warn([line for table in built for line in table.warnings])
        for table in built:
            print_table(table) if style == "markdown" else print(tables.to_latex(table))


def plot(frame: pd.DataFrame, path: Path, metric: str | None) -> None:
    """Write the plot of one metric, by default the only perplexity. Raises UsageError when that is impossible."""
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
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot be written ({error.strerror}); name another file") from error
    except ModuleNotFoundError as error:
        raise UsageError(f"--plot {path}: {error.name} is missing; pip install nnprune[dev]") from error
    print(f"{path}: {candidates[0]} against sparsity")


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 for stale tables or no records, 2 for wrong use."""
    with suppress(AttributeError):  # names from records must not stop a terminal of another encoding
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        args = parse_args(argv)
        frame = load(args.records)
        if args.metric:
            check_known(frame, "metric", args.metric, "--metric ")
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
    except (UsageError, NoRecordsError) as error:
        print(f"collect.py: {visible(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, NoRecordsError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
