"""One HTML page of records that needs no network: page.html with page.css, page.js and the data as JSON.

The script sets text and never markup, so names from records need no other escape than that of `<` in the JSON.
"""

import base64
import io
import json
import math
from importlib.resources import files
from typing import Any

import pandas as pd

from nnprune.report import plots, tables
from nnprune.report.escaping import distinct_names, visible
from nnprune.report.frame import is_dense
from nnprune.report.labels import DENSE, model_key, pretty_pruner, pretty_sparsity, sparsity_key
from nnprune.report.messages import UsageError
from nnprune.report.metrics import pretty_metric
from nnprune.report.numbers import format_value
from nnprune.report.panels import COLOURS
from nnprune.report.rendering import WHOLE_MODEL
from nnprune.report.tables import GIB, MISSING, method_names
from nnprune.report.variants import method_key, with_methods

NUM_CHOSEN = 4  # runs that are compared at first
FACTS = (
    "config",
    "dtype",
    "versions",
    "machine",
    "commit",
    "command",
    "calibration_hash",
    "fingerprint",
    "finished",
    "notes",
    "path",
)
"""What of a record is shown and compared, beside its metrics."""


def build_page(frame: pd.DataFrame, metrics: list[str], filters: dict[str, list[str] | None]) -> tuple[str, list[str]]:
    """The page's text, and warnings. Filters are those of tables.py. Raises UsageError when no record passes them."""
    rows, warnings = tables.filtered(frame, "any metric", filters)
    if rows.empty:
        raise UsageError("--html: no record passes --models, --pruners and --sparsities; leave one out")
    built = [tables.build_table(frame, metric, **filters) for metric in metrics]
    warnings += [line for table in built for line in table.warnings]
    images, no_plots = _plots(frame, metrics, filters, warnings)
    runs = _runs(rows)
    linears: list[list[str]] = []
    details = [_detail(record, name, linears) for record, name in zip(runs.records, runs.names, strict=True)]
    pruned = [index for index, dense in enumerate(runs.dense) if not dense]
    data = {
        "summary": f"{len(details)} run(s) of {rows['model'].nunique()} model(s); newest: {visible(max(rows['finished'])) or '--'}",
        "tables": [part for table in built for part in _parts(table)],
        "plots": images,
        "noplots": no_plots,
        "runs": {"head": runs.head, "rows": runs.rows},
        "details": details,
        "linears": linears,
        "chosen": pruned[:NUM_CHOSEN],
        "colours": COLOURS,
    }
    text = _resource("page.html").replace("@style@", _resource("page.css")).replace("@script@", _resource("page.js"))
    content = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return text.replace("@data@", content), warnings  # last, so that nothing is looked for in the data


def _parts(table: tables.Table) -> list[dict[str, Any]]:
    """A table, and one of its own for the methods that tune the whole model, since rows can be sorted."""
    blocks, whole = table.blocks, table.whole_model
    parts = (
        {table.title: blocks}
        if whole is None
        else {
            table.title: blocks[:whole],
            f"{table.title}: {WHOLE_MODEL.lower()} methods": blocks[whole:],
        }
    )
    return [
        {
            "title": title,
            "head": [*table.head, *table.columns],
            "rows": [[*row.head, *row.cells] for block in part for row in block],
            "best": [[False] * len(row.head) + row.best for block in part for row in block],
        }
        for title, part in parts.items()
    ]


class _Runs:
    """The table of runs: `head`, `rows`, and for each row its record, its name, and whether it is the dense model's."""

    def __init__(self, head: list[str]) -> None:
        self.head = head
        self.rows: list[list[Any]] = []
        self.records: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.dense: list[bool] = []


def _runs(rows: pd.DataFrame) -> _Runs:
    """A row for each record. A cell is text, or text and the number that it sorts by."""
    rows = with_methods(rows)
    dense = is_dense(rows)
    methods = method_names(rows[~dense]) | dict.fromkeys(rows["method"][dense], pretty_pruner(DENSE))
    models = distinct_names(sorted(rows["model"].unique(), key=model_key), str)
    metrics = sorted(rows["metric"].unique())
    runs = _Runs(["Model", "Method", "Sparsity", "Seed", *map(pretty_metric, metrics), "Zeros", "Seconds", "GiB", "Finished"])
    groups = [group for _, group in rows.groupby("path")]
    for group in sorted(groups, key=lambda group: _order(group.iloc[0])):
        first, values = group.iloc[0], group.set_index("metric")["value"]
        pattern = pretty_sparsity(first["sparsity"]) if first["sparsity"] != DENSE else "0%"
        name = [models[first["model"]], methods[first["method"]], pattern]
        seed = visible(first["seed"])
        gib = float(first["peak_host_bytes"]) / GIB if pd.notna(first["peak_host_bytes"]) else math.nan
        figures = [_cell(values.get(metric, math.nan), format_value) for metric in metrics]
        costs = [
            _cell(first["linear_sparsity"], "{:.3f}".format),
            _cell(first["seconds"], "{:.1f}".format),
            _cell(gib, "{:.2f}".format),
        ]
        runs.rows.append([*name, seed, *figures, *costs, visible(first["finished"])])
        runs.records.append(first["record"])
        runs.names.append(", ".join([*name, *([f"seed {seed}"] if seed else [])]))
        runs.dense.append(bool(is_dense(group).iloc[0]))
    return runs


def _order(row: pd.Series) -> tuple:
    name = model_key(row["model"]), row["whole_model"], sparsity_key(row["sparsity"]), method_key(row["method"])
    return *name, row["seed"], row["path"]


def _cell(value: float, form: Any) -> Any:
    return [form(value), value] if math.isfinite(value) else MISSING


def _detail(record: dict[str, Any], name: str, linears: list[list[str]]) -> dict[str, Any]:
    """What is shown of one run. `linears` collects the lists of names: runs of one model share one."""
    names = [visible(str(entry.get("name"))) for entry in record["per_linear"]]
    if names not in linears:
        linears.append(names)
    facts = {"metrics": record["metrics"], "dense_metrics": record["dense_metrics"], "seconds": record["seconds"]}
    return {
        "name": name,
        "linears": linears.index(names),
        "errors": [_number(entry.get("relative_error")) for entry in record["per_linear"]],
        "sparsities": [_number(entry.get("sparsity")) for entry in record["per_linear"]],
        "record": facts | {key: record[key] for key in FACTS if key in record},
    }


def _number(value: Any) -> float | None:
    return float(f"{value:.4g}") if isinstance(value, int | float) and math.isfinite(value) else None


def _plots(
    frame: pd.DataFrame, metrics: list[str], filters: dict[str, list[str] | None], warnings: list[str]
) -> tuple[list[dict[str, str]], str]:
    """Plots of all kinds as images, and why there are none."""
    images = []
    for metric in metrics:
        for kind in plots.KINDS:
            try:
                image = io.BytesIO()
                figure, lines = plots.plot(frame, metric, kind, None, **filters)
                figure.savefig(image, format="svg")
            except ModuleNotFoundError as error:
                reason = f"Plots are left out: {error.name} is missing; pip install 'nnprune[plot]'."
                warnings.append(f"--html: {reason}")
                return [], reason
            except ValueError:  # nothing to draw
                continue
            warnings += lines
            encoded = base64.b64encode(image.getvalue()).decode()
            images.append({"title": f"{pretty_metric(metric)}, {kind}", "image": f"data:image/svg+xml;base64,{encoded}"})
    return images, "" if images else "No record has figures that can be drawn."


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _resource(name: str) -> str:
    return files("nnprune.report").joinpath(name).read_text(encoding="utf-8")
