"""Published figures set beside those of the records, with the difference in per cent."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nnprune.report.dense import dense_values
from nnprune.report.frame import is_dense
from nnprune.report.labels import DENSE, UNKNOWN, model_key, normal_sparsity, pretty_pruner, pretty_sparsity, sparsity_key
from nnprune.report.messages import UsageError
from nnprune.report.metrics import describe
from nnprune.report.numbers import format_mean, format_value
from nnprune.report.tables import MISSING, Row, Table, filtered, select
from nnprune.report.variants import method_key, parts_of, pretty_method

REQUIRED = ("model", "method", "sparsity", "metric", "value")


@dataclass(frozen=True)
class Figure:
    """A published figure. `method` is a pruner's label in lower case; `source` is "" where the file has none."""

    model: str
    method: str
    sparsity: str
    metric: str
    value: float
    source: str


def read_published(path: Path) -> list[Figure]:
    """The figures of a CSV file with the columns of REQUIRED and perhaps `source`. Raises UsageError for what is wrong in it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in REQUIRED if name not in (reader.fieldnames or [])]:
                raise UsageError(
                    f"--beside {path}: has no column {missing[0]}; its first line is {','.join(REQUIRED)}[,source]"
                )
            return [_figure(row, f"--beside {path}:{reader.line_num}: ") for row in reader]
    except OSError as error:
        raise UsageError(f"--beside {path}: {error.strerror}; name a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--beside {path}: is no CSV file in UTF-8 ({error}); name another") from error


def _figure(row: dict[str, str | None], where: str) -> Figure:
    if None in row or None in (row[name] for name in REQUIRED):
        raise UsageError(f"{where}has more or fewer values than the first line has names; quote what contains a comma")
    model, method, sparsity, metric, value = (row[name].strip() for name in REQUIRED)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where}value={value}: is no number; write one, or leave the line out")
    sparsity = normal_sparsity(sparsity)
    if sparsity_key(sparsity)[0] == UNKNOWN:
        raise UsageError(f"{where}sparsity={sparsity}: is neither dense, a fraction below 1, nor N:M")
    return Figure(model, method.lower(), sparsity, metric, number, (row.get("source") or "").strip())


def build_published_table(frame: pd.DataFrame, metric: str, figures: list[Figure], **filters: list[str] | None) -> Table:
    """A row for each published figure of the metric, with ours and the difference; blocks are models.

    A method is one of ours if the published name is its label or its name in tables, in upper or lower case. Several of our rows
    may stand beside one figure. Filters are as in tables.py, and choose among the published figures too.
    """
    rows, warnings = select(frame, metric, filters)
    cells = rows.drop_duplicates(["model", "method", "sparsity"], keep="last")
    dense = dense_values(rows)[0]
    used: set[str] = set()
    blocks: dict[str, list[Row]] = {}
    has_source = any(figure.source for figure in figures)
    for one in sorted(_wanted(figures, metric, filters), key=_order):
        if one.sparsity == DENSE:
            ours = [(pretty_pruner(DENSE), dense.get(one.model, math.nan), math.nan)]
        else:
            found = cells[(cells["model"] == one.model) & (cells["sparsity"] == one.sparsity) & ~is_dense(cells)]
            is_this = [one.method in _names(method) for method in found["method"]]
            found = found[pd.Series(is_this, found.index, dtype=bool)].sort_values("method", key=_keys)
            used |= set(found["path"])
            ours = list(zip(map(pretty_method, found["method"]), found["mean"], found["std"], strict=True))
        for name, mean, std in ours or [(pretty_pruner(one.method), math.nan, math.nan)]:
            known = not math.isnan(mean)
            difference = f"{100 * (mean / one.value - 1):+.1f}%" if known and one.value else MISSING
            values = [format_mean(mean, std) if known else MISSING, format_value(one.value), difference]
            head = [
                one.model,
                name,
                "0%" if one.sparsity == DENSE else pretty_sparsity(one.sparsity),
                *[one.source] * has_source,
            ]
            blocks.setdefault(one.model, []).append(Row(head, values, [False] * 3))
    head, columns = ["Model", "Method", "Sparsity", *["Source"] * has_source], ["Ours", "Published", "Difference"]
    title = f"{describe(metric)}: ours and published figures"
    return Table(f"{metric}, published", title, head, columns, list(blocks.values()), len(used), warnings)


def _wanted(figures: list[Figure], metric: str, filters: dict[str, list[str] | None]) -> list[Figure]:
    table = pd.DataFrame([(f.model, f.method, f.sparsity, f) for f in figures if f.metric == metric],
                         columns=["model", "pruner", "sparsity", "figure"])  # fmt: skip
    return list(filtered(table, metric, filters)[0]["figure"])


def _order(figure: Figure) -> tuple:
    return model_key(figure.model), sparsity_key(figure.sparsity), figure.sparsity, _pruner_order(figure.method), figure.source


def _pruner_order(label: str) -> tuple:
    return method_key(f"{len(label)}:{label}")


def _keys(methods: pd.Series) -> pd.Series:
    order = sorted(methods, key=method_key)
    return methods.map(order.index)


def _names(method: str) -> set[str]:
    """What a published method may be called to be this one."""
    pruner = parts_of(method)[0]
    return {pruner.lower(), pretty_pruner(pruner).lower(), pretty_method(method).lower()}
