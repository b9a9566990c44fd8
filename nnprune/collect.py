"""The collector: turns the records of runs into tables, plots, a report and a bibliography. It computes no metric.

All arithmetic is the mean and standard deviation over records that differ in nothing but the seed, their mean seconds and
peak memory, differences to published figures in per cent, and, where a table asks for it, ln(perplexity / dense perplexity)
relative to that of one pruner.

Records are read from outputs/ in the current folder. Records that cannot be used are skipped, each with a line on stderr. Runs
that differ in a setting have rows of their own, named by that setting.

    nnprune-collect                                         rewrite the marked tables of README.md and docs/methods.md, or,
                                                            in a folder without any, print a table for each metric
    nnprune-collect --check                                 write nothing; exit 1 if one of them is out of date
    nnprune-collect --metric demo_perplexity                print one table over all models
    nnprune-collect --models demo -o table.tex              write tables: .md, .tex, .csv or .json
    nnprune-collect --layout methods --models demo          rows are methods, columns are sparsities
    nnprune-collect --layout tasks                          columns are accuracies of tasks, and their mean
    nnprune-collect --by pruner.alpha                       columns are the values of a setting
    nnprune-collect --plot sparsity.png                     lines over fractions of zeros, bars for N:M patterns
    nnprune-collect --plot pareto.pdf --kind pareto         perplexity against seconds
    nnprune-collect --html report.html                      one page with tables, plots, layers, settings; needs no network
    nnprune-collect --beside published.csv                  published figures, with the difference in per cent
    nnprune-collect --bibtex -o methods.bib                 references of the methods shown

A table in a Markdown file is marked by two lines, and what is between them is replaced:

    <!-- nnprune:table metric=demo_perplexity models=demo,opt-125m pruners=wanda sparsities=0.5,2:4 -->
    <!-- /nnprune:table -->

Only `metric` is required. `models`, `pruners` and `sparsities` are comma-separated filters; `models` also orders the columns.
`layout=methods` makes a table of one model, as in `models=demo`, with sparsities as columns. There `costs=true` adds seconds
and peak memory, and `relative=sparsegpt` shows ln(perplexity / dense perplexity) divided by that of SparseGPT with the same
seed. More: docs/report.md.
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

import pandas as pd

from nnprune import records
from nnprune.report import output
from nnprune.report.documents import DOCUMENTS, check, check_known, have_tables, render_all, rewrite
from nnprune.report.escaping import visible
from nnprune.report.frame import to_frame
from nnprune.report.labels import normal_sparsity
from nnprune.report.messages import NoRecordsError, UsageError, warn

MODES = {"check": "--check", "plot": "--plot", "html": "--html", "bibtex": "--bibtex", "beside": "--beside"}
FILTERS = ("models", "pruners", "sparsities")
FOR_DOCUMENTS = {"records", "readme", "check"}
"""Options that leave it at rewriting or checking marked tables."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # one line, without argparse's usage block
        raise UsageError(f"{message} (see --help)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line, `sys.argv` for None. Raises UsageError for those that do not go together."""
    parser = Parser(
        prog="nnprune-collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--records", type=Path, metavar="DIR", help="folder of records (default: outputs/ here)")
    add("--readme", type=Path, metavar="FILE", help=f"file with marked tables (default: {', '.join(DOCUMENTS)})")
    add("--check", action="store_true", help="write nothing, exit 1 when a marked table is out of date")
    add("--metric", type=_list, metavar="A,B", help="these metrics only; as all options below, leaves files with tables alone")
    for name in FILTERS:
        add(f"--{name}", type=_list, metavar="A,B", help=f"these {name} only")
    add("--layout", choices=["models", "methods", "tasks"], help="columns: models (default); of one model sparsities, or tasks")
    add("--costs", action="store_true", help="with --layout methods: add seconds and peak memory")
    add("--relative", metavar="PRUNER", help="with --layout methods: ln(perplexity / dense perplexity) relative to PRUNER's")
    add("--by", metavar="KEY", help="columns, or the x axis of a plot, are the values of a setting such as pruner.alpha")
    add("--format", choices=sorted(output.SUFFIXES.values()), help="of what is printed (default: markdown) or written")
    add("-o", "--output", type=Path, metavar="FILE", help="write to a file; its suffix names the format")
    add("--plot", type=Path, metavar="FILE.png", help="write a figure")
    add("--kind", choices=["sparsity", "pareto"], help="with --plot: metric over sparsity (default), or against seconds")
    add("--html", type=Path, metavar="FILE.html", help="write one self-contained page")
    add(
        "--beside", type=Path, metavar="FILE.csv", help="set published figures beside ours (model,method,sparsity,metric,value)"
    )
    add("--bibtex", action="store_true", help="BibTeX entries of the methods")
    args = parser.parse_args(argv)
    if args.sparsities:
        args.sparsities = [normal_sparsity(value) for value in args.sparsities]
    _check_together(args, parser)
    return args


def _given(args: argparse.Namespace) -> set[str]:
    return {name for name, value in vars(args).items() if value}


def _list(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def _check_together(args: argparse.Namespace, parser: Parser) -> None:
    """Raise UsageError for an option that another one leaves without meaning."""
    given = _given(args)
    modes = sorted(given & MODES.keys())
    if len(modes) > 1:
        parser.error(f"{MODES[modes[0]]} and {MODES[modes[1]]} do not go together: run them one after the other")
    printing = sorted(given - FOR_DOCUMENTS)
    if args.check and printing:
        parser.error(f"--check compares whole files: leave out --{printing[0]}")
    if args.readme and printing:
        parser.error(f"--readme is for rewriting or --check: leave it out with --{printing[0]}")
    mode = modes[0] if modes else "table"
    allowed = {
        "layout": ["table"],
        "by": ["table", "plot"],
        "costs": ["table"],
        "relative": ["table"],
        "format": ["table", "beside"],
        "output": ["table", "beside", "bibtex"],
        "kind": ["plot"],
    }
    for name, where in allowed.items():
        if name in given and mode not in where:
            parser.error(f"--{name} and {MODES.get(mode, 'tables')} do not go together: leave --{name} out")
    if args.by and (args.layout or args.kind):
        parser.error(f"--by and --{'layout' if args.layout else 'kind'} do not go together: leave one out")
    for name in ("costs", "relative"):
        if name in given and args.layout != "methods":
            parser.error(f"--{name} is for --layout methods: add that, or leave it out")


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


def run(args: argparse.Namespace) -> int:
    """Do what the options ask for and return the exit status. Raises UsageError, NoRecordsError."""
    frame = load(args.records)
    for metric in args.metric or []:
        check_known(frame, "metric", metric, "--metric ")
    metrics = args.metric or sorted(frame["metric"].unique())
    filters = {name: getattr(args, name) for name in FILTERS}
    if args.plot:
        output.write_plot(frame, args.plot, args.metric, args.kind or "sparsity", args.by, filters)
    elif args.html:
        output.write_page(frame, args.html, metrics, filters)
    elif args.bibtex:
        output.write_bibliography(frame[frame["metric"].isin(metrics)], args.output, filters)
    elif args.beside:
        output.write_published(frame, args, args.metric, filters)
    elif _given(args) - FOR_DOCUMENTS or not (args.readme or args.check or have_tables()):
        output.write_tables(frame, args, metrics, filters)
    else:
        documents = render_all(frame, args.readme)
        if args.check:
            return check(documents)
        rewrite(documents)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 1 for stale tables or no records, 2 for wrong use."""
    with suppress(AttributeError):  # names from records must not stop a terminal of another encoding
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return run(parse_args(argv))
    except (UsageError, NoRecordsError) as error:
        print(f"nnprune-collect: {visible(str(error))}", file=sys.stderr)
        return 1 if isinstance(error, NoRecordsError) else 2


if __name__ == "__main__":
    sys.exit(main())
