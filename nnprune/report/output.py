"""What the collector's options write: tables, exports, plots, the page and the bibliography, to a file or to stdout."""

import argparse
from pathlib import Path

import pandas as pd

from nnprune import records
from nnprune.report import bibliography, exports, page, plots, published, rendering, tables
from nnprune.report.documents import check_known
from nnprune.report.frame import MEAN_ACCURACY
from nnprune.report.labels import model_key
from nnprune.report.messages import UsageError, print_table, warn
from nnprune.report.tables import Table
from nnprune.report.task_tables import build_tasks_table
from nnprune.report.variants import differing_settings, setting_text, settings_of, with_methods

SUFFIXES = {".md": "markdown", ".tex": "latex", ".csv": "csv", ".json": "json"}

Filters = dict[str, list[str] | None]


def write_tables(frame: pd.DataFrame, args: argparse.Namespace, metrics: list[str], filters: Filters) -> None:
    """A row for each record and metric (csv, json), or a table for each metric, and model where it is of one (markdown, latex)."""
    style = _format(args)
    if args.by:
        _check_setting(frame, args.by)
    if style in exports.FORMATS:
        if args.layout:
            raise UsageError(f"--layout {args.layout}: csv and json have a row for each record; leave --layout out")
        rows = _all_filtered(frame[frame["metric"].isin(metrics)], filters)
        rows = with_methods(rows).drop(columns="method")
        if args.by:
            settings = [settings_of(record) for record in rows["record"]]
            rows[args.by] = [setting_text(one[args.by]) if args.by in one else None for one in settings]
        return _emit(exports.FORMATS[style](rows), args.output)
    if args.layout == "tasks":
        built = _task_tables(
            frame, args.metric or [one for one in metrics if one.endswith("_acc") and one != MEAN_ACCURACY], filters
        )
    else:
        built = [table for metric in metrics for table in _tables(frame, args, metric, filters)]
    return _emit_tables(built, style, args.output)


def _task_tables(frame: pd.DataFrame, metrics: list[str], filters: Filters) -> list[Table]:
    """A table for each model, of the metrics named or of all accuracies of tasks, one a task."""
    if not metrics:
        raise UsageError("--layout tasks: no record has the accuracy of a task; name metrics with --metric")
    others = {name: values for name, values in filters.items() if name != "models"}
    models = filters["models"] or sorted(frame[frame["metric"].isin(metrics)]["model"].unique(), key=model_key)
    return [build_tasks_table(frame, metrics, model, **others) for model in models]


def _tables(frame: pd.DataFrame, args: argparse.Namespace, metric: str, filters: Filters) -> list[Table]:
    if args.relative:
        check_known(frame, "pruner", args.relative, "--relative ")
        if not metric.endswith("perplexity"):
            raise UsageError(
                f"--relative {args.relative}: compares logarithms of perplexities, and {metric} is none; add --metric"
            )
    if not args.by and args.layout != "methods":
        return [tables.build_table(frame, metric, **filters)]
    found = frame[frame["metric"] == metric]["model"].unique()
    models = filters["models"] or sorted(found, key=model_key)
    others = {name: values for name, values in filters.items() if name != "models"}
    if args.by:
        return [tables.build_setting_table(frame, metric, model, args.by, **others) for model in models]
    return [tables.build_methods_table(frame, metric, model, args.costs, args.relative, **others) for model in models]


def write_published(frame: pd.DataFrame, args: argparse.Namespace, metrics: list[str] | None, filters: Filters) -> None:
    """Published figures beside ours, a table for each metric that both have. Raises UsageError when there is none."""
    figures = published.read_published(args.beside)
    both = [metric for metric in sorted({f.metric for f in figures}) if metric in (metrics or set(frame["metric"]))]
    if not both:
        theirs, ours = (sorted(names) for names in ({f.metric for f in figures}, metrics or set(frame["metric"])))
        raise UsageError(
            f"--beside {args.beside}: has figures of {', '.join(theirs) or 'nothing'}, and ours are {', '.join(ours)}"
        )
    built = [published.build_published_table(frame, metric, figures, **filters) for metric in both]
    _emit_tables(built, _format(args), args.output)


def write_bibliography(frame: pd.DataFrame, path: Path | None, filters: Filters) -> None:
    rows = _all_filtered(frame, filters)
    text, lines = bibliography.bibliography(list(rows.drop_duplicates("path")["record"]))
    warn(lines)
    _emit(text, path)


def write_plot(frame: pd.DataFrame, path: Path, metrics: list[str] | None, kind: str, by: str | None, filters: Filters) -> None:
    """The plot of one metric, by default the only perplexity. Raises UsageError when that is impossible."""
    if path.suffix.lower() not in plots.SUFFIXES:
        raise UsageError(f"--plot {path}: unknown suffix '{path.suffix}'; use one of {', '.join(plots.SUFFIXES)}")
    _check_folder(path, "--plot")
    if by:
        _check_setting(frame, by)
    candidates = metrics or sorted(m for m in frame["metric"].unique() if m.endswith("perplexity"))
    if len(candidates) != 1:
        raise UsageError(f"--plot {path}: which metric? add --metric NAME, one of {sorted(frame['metric'].unique())}")
    try:
        figure, lines = plots.plot(frame, candidates[0], kind, by, **filters)
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UsageError(f"--plot {path}: {error}") from error
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot be written ({error.strerror}); name another file") from error
    except ModuleNotFoundError as error:
        raise UsageError(f"--plot {path}: {error.name} is missing; pip install 'nnprune[plot]'") from error
    warn(lines)
    print(f"{path}: {candidates[0]} {'by ' + by if by else 'against seconds' if kind == 'pareto' else 'against sparsity'}")


def write_page(frame: pd.DataFrame, path: Path, metrics: list[str], filters: Filters) -> None:
    _check_folder(path, "--html")
    text, lines = page.build_page(frame[frame["metric"].isin(metrics)], metrics, filters)
    warn(lines)
    _emit(text, path, "--html")


def _all_filtered(frame: pd.DataFrame, filters: Filters) -> pd.DataFrame:
    rows, lines = tables.filtered(frame, "any metric", filters)
    warn(lines)
    if rows.empty:
        raise UsageError("no record passes --models, --pruners and --sparsities; leave one out")
    return rows


def _check_setting(frame: pd.DataFrame, key: str) -> None:
    if key in ("seed", "calibration.seed"):
        raise UsageError(f"--by {key}: runs that differ in it alone are averaged; --format csv has a row for each")
    if not any(key in settings_of(record) for record in frame["record"]):
        known = ", ".join(differing_settings(frame)) or "none"
        raise UsageError(f"--by {key}: no record has this setting; those in which records differ: {known}")


def _format(args: argparse.Namespace) -> str:
    """The format asked for. Raises UsageError for a suffix that names none."""
    if args.format or args.output is None:
        return args.format or "markdown"
    if style := SUFFIXES.get(args.output.suffix.lower()):
        return style
    raise UsageError(
        f"-o {args.output}: unknown suffix '{args.output.suffix}'; use one of {', '.join(SUFFIXES)}, or add --format"
    )


def _emit_tables(built: list[Table], style: str, path: Path | None) -> None:
    warn([line for table in built for line in table.warnings])
    if path is None and style == "markdown":
        for table in built:
            print_table(table)
        return
    texts = [rendering.FORMATS[style](table) for table in built]
    if style == "markdown" and len(built) > 1:
        texts = [f"{rendering.escape_markdown(table.title)}\n\n{text}" for table, text in zip(built, texts, strict=True)]
    if style in exports.FORMATS and len(built) > 1:
        raise UsageError(f"--format {style}: holds one table, and there are {len(built)}; choose one with --metric NAME")
    _emit("\n".join(texts), path)


def _check_folder(path: Path, option: str) -> None:
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: the folder {path.parent} does not exist; make it first")


def _emit(text: str, path: Path | None, option: str = "-o") -> None:
    """Print `text`, or write it to `path`. Raises UsageError when that cannot be written."""
    if path is None:
        print(text, end="")
        return
    _check_folder(path, option)
    try:
        records.write_atomically(path.resolve(), text)
    except OSError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error.strerror
        raise UsageError(f"{option} {path}: cannot be written ({reason}); name another file") from error
    print(f"{path}: written")
