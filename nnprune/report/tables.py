"""Tables from the collector's frame; rendering.py makes text of them. No metric is computed and no file is read or written.

Means and standard deviations over seeds come from frame.py; here costs are averaged, and values formatted.

Three layouts, all with the dense model on top and the best value of each block and column in bold. Models: rows are method x
sparsity, columns are models, one block for each sparsity. Methods: rows are methods, columns are sparsities, for one model. By a
setting: rows are method x sparsity, columns are the setting's values, for one model. Methods that tune the whole model stand below
all others, in blocks of their own.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from nnprune.report.dense import dense_disagreements, dense_values, without_other_evaluations
from nnprune.report.escaping import distinct_names, visible
from nnprune.report.frame import (
    PEAKS,
    is_dense,
    mixed_models,
    newest_experiments,
    shown,
    with_setting,
)
from nnprune.report.labels import DENSE, model_key, natural_key, pretty_pruner, pretty_sparsity, sparsity_key
from nnprune.report.metrics import describe, higher_is_better
from nnprune.report.numbers import format_mean
from nnprune.report.relative import other_tokens, relative_to
from nnprune.report.variants import method_key, plain_method, pretty_method

MISSING = "--"
GIB = 2**30


@dataclass
class Row:
    """A line of a table. Names and values are plain text, escaped only when they are rendered."""

    head: list[str]  # the pruner, and its sparsity where columns are models
    cells: list[str]
    best: list[bool]  # whether a cell is the best of its block and column


@dataclass
class Table:
    """A table before it is rendered. `num_records` counts the records whose figures it shows; `caption` is its name in messages,
    `title` what it shows in words."""

    caption: str
    title: str
    head: list[str]
    columns: list[str]
    blocks: list[list[Row]]  # the first block is the dense row
    num_records: int
    warnings: list[str] = field(default_factory=list)
    whole_model: int | None = None  # index of the first block of methods that tune the whole model


def build_table(frame: pd.DataFrame, metric: str, **filters: list[str] | None) -> Table:
    """The table of one metric over models.

    Filters are `models`, in the order of the columns, `pruners` and `sparsities`. They never hide the dense row. A filter's
    value that matches no record gives a warning; a model still gets its column.
    """
    rows, warnings = select(frame, metric, filters)
    models = filters.get("models") or sorted(rows["model"].unique(), key=model_key)
    dense, sources = dense_values(rows)
    pruned = rows[~is_dense(rows)]
    top = dense_row(["0%"], [dense.get(model) for model in models])
    blocks, whole = all_blocks(top, pruned, "model", models, metric, method_names(pruned))
    columns = list(distinct_names(models, str).values())
    num_records = len(set(pruned["path"]) | sources)
    return Table(metric, describe(metric), ["Method", "Sparsity"], columns, blocks, num_records, warnings, whole)


def build_setting_table(frame: pd.DataFrame, metric: str, model: str, key: str, **filters: list[str] | None) -> Table:
    """The table of one metric and model over the values of a setting such as `pruner.alpha`. Filters are as in `build_table`.

    The dense figure is repeated in each column.
    """
    rows, left_out = with_setting(frame[frame["metric"] == metric], key)
    rows, warnings = select(rows, metric, {**filters, "models": [model]}, key)
    dense, sources = dense_values(rows)
    pruned = rows[~is_dense(rows)]
    values = sorted(pruned["by"].unique(), key=natural_key)
    top = dense_row(["0%"], [dense.get(model)] * len(values))
    blocks, whole = all_blocks(top, pruned, "by", values, metric, method_names(pruned))
    columns = list(distinct_names(values, lambda value: f"{key.rpartition('.')[2]}={value}").values())
    title, num_records = f"{describe(metric)}: {model} by {key}", len(set(pruned["path"]) | sources)
    caption, warnings = f"{metric}, {model}, by {key}", left_out + warnings
    return Table(caption, title, ["Method", "Sparsity"], columns, blocks, num_records, warnings, whole)


def build_methods_table(
    frame: pd.DataFrame,
    metric: str,
    model: str,
    costs: bool = False,
    relative: str | None = None,
    **filters: list[str] | None,
) -> Table:
    """The table of one metric and model over pruners. Filters are `pruners` and `sparsities`, as in `build_table`.

    The dense figure is repeated in each column. `costs` adds columns: mean seconds of the runs in a row, evaluation of the pruned model
    included, and their peak memory in GiB, that of a device only where one was used. `relative` names a pruner: values are then
    ln(perplexity / dense perplexity) relative to that pruner's (`relative.relative_to`), whose row is there whatever `pruners` says.
    """
    if relative and filters.get("pruners"):
        filters["pruners"] = [*filters["pruners"], relative]
    rows, warnings = select(frame, metric, {**filters, "models": [model]})
    names = method_names(rows[~is_dense(rows)])
    caption, title = f"{metric}, {model}", f"{describe(metric)}: {model}"
    if relative:
        warnings += other_tokens(rows, relative)
        rows = relative_to(rows, relative)
        reference = f", ln(value / dense) relative to {visible(pretty_pruner(relative))}'s"
        caption, title = caption + reference, title + reference
    dense, sources = dense_values(rows)
    pruned = rows[~is_dense(rows)]
    sparsities = sparsity_names(pruned)
    top = dense_row([], [dense.get(model)] * len(sparsities))
    blocks, whole = all_blocks(top, pruned, "sparsity", list(sparsities), metric, names, by_sparsity=False)
    columns = list(sparsities.values())
    if costs:
        columns += _append_costs(blocks, pruned, warnings)
    return Table(caption, title, ["Method"], columns, blocks, len(set(pruned["path"]) | sources), warnings, whole)


def select(
    frame: pd.DataFrame, metric: str, filters: dict[str, list[str] | None], by: str | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """The rows of one metric that pass the filters and are newest in their cell, and the warnings about them."""
    rows, warnings = filtered(frame[frame["metric"] == metric], metric, filters)
    rows, contested = newest_experiments(without_other_evaluations(rows, metric), by)
    return shown(rows), warnings + contested + mixed_models(rows) + dense_disagreements(rows, metric)


def filtered(rows: pd.DataFrame, metric: str, filters: dict[str, list[str] | None]) -> tuple[pd.DataFrame, list[str]]:
    """The rows that pass the filters, and a line for each value of a filter that none has. Runs of the dense model pass all but
    that of models."""
    warnings = []
    for column, option in (("model", "models"), ("pruner", "pruners"), ("sparsity", "sparsities")):
        wanted = filters.get(option)
        if wanted is None:
            continue
        unmatched = sorted(set(wanted) - set(rows[column]) - {DENSE})
        warnings += [f"{option}={value}: no record with {metric} has it" for value in unmatched]
        rows = rows[rows[column].isin(wanted) | (is_dense(rows) & (column != "model"))]
    return rows, warnings


def method_names(pruned: pd.DataFrame) -> dict[str, str]:
    """Method -> name of its row, unlike that of any other row and of the dense one."""
    return distinct_names(pruned["method"].unique(), pretty_method, plain_method, reserved=[pretty_pruner(DENSE)])


def sparsity_names(pruned: pd.DataFrame) -> dict[str, str]:
    """Sparsity -> unique name, in the order of blocks or columns."""
    sparsities = sorted(pruned["sparsity"].unique(), key=lambda label: (sparsity_key(label), label))
    return distinct_names(sparsities, pretty_sparsity)


def _speed_class(machine: dict[str, Any]) -> str:
    """What of a record's machine its seconds depend on: all but the size of the memory, which differs a little from boot to boot."""
    return json.dumps({key: value for key, value in machine.items() if key != "host_bytes"}, sort_keys=True)


def _append_costs(blocks: list[list[Row]], pruned: pd.DataFrame, warnings: list[str]) -> list[str]:
    """Add the seconds and GiB of its runs to each row, and a warning where they do not compare; returns the names of the new columns."""
    machines = {_speed_class(record.get("machine") or {}) for record in pruned["record"]}
    if len(machines) > 1:
        warnings.append(
            f"costs: the runs are of {len(machines)} different machines, so their seconds and memory do not compare"
        )
    groups = pruned.groupby(["whole_model", "method"])
    peaks = groups[PEAKS].max().astype(float).replace(0, math.nan) / GIB  # a run on a CPU uses no device memory
    costs = pd.DataFrame({"Seconds": groups["seconds"].mean(), "GiB": peaks["peak_host_bytes"]})
    if peaks["peak_device_bytes"].notna().any():
        costs["GiB of device"] = peaks["peak_device_bytes"]
    costs = costs.loc[sorted(costs.index, key=lambda one: (one[0], method_key(one[1])))]  # as the rows
    of_dense = [math.nan] * len(costs.columns)  # a dense run prunes nothing
    for row, values in zip([row for block in blocks for row in block], [of_dense, *costs.to_numpy()], strict=True):
        row.cells += [MISSING if math.isnan(value) else f"{value:.{0 if value >= 10 else 1}f}" for value in values]
        row.best += [False] * len(values)
    return list(costs.columns)


def dense_row(extra_head: list[str], values: list[float | None]) -> Row:
    return Row([pretty_pruner(DENSE), *extra_head], [_cell_text(value) for value in values], [False] * len(values))


def all_blocks(
    top: Row,
    pruned: pd.DataFrame,
    across: str,
    columns: list[str],
    metric: str,
    names: dict[str, str],
    by_sparsity: bool = True,
) -> tuple[list[list[Row]], int | None]:
    """The block of `top` and those of `pruned`, one for each sparsity or one for all: first of one-shot methods, then of methods that
    tune the whole model. Also the index of the first of the latter, None without. The others are those of `_block`."""
    blocks, first_whole = [[top]], None
    for is_whole in (False, True):
        part = pruned[pruned["whole_model"] == is_whole]
        if is_whole and len(part):
            first_whole = len(blocks)
        for sparsity, name in sparsity_names(pruned).items():
            if len(rows := part[part["sparsity"] == sparsity]) and by_sparsity:
                blocks.append(_block(rows, across, columns, metric, [name], names))
        if len(part) and not by_sparsity:
            blocks.append(_block(part, across, columns, metric, [], names))
    return blocks, first_whole


def _block(
    rows: pd.DataFrame, across: str, columns: list[str], metric: str, extra_head: list[str], names: dict[str, str]
) -> list[Row]:
    """A row for each method, called as `names` says. Columns are values of the frame's column `across`."""
    # A pivot each: columns of both at once would be a MultiIndex, in which an empty name means something else.
    cells = rows.drop_duplicates(["method", across], keep="last")  # `mean` and `std` are those over all seeds
    means, stds = (cells.pivot(index="method", columns=across, values=v).reindex(columns=columns) for v in ("mean", "std"))
    is_higher = higher_is_better(metric)
    best = means.max() if is_higher else means.min()
    contested = (means.notna().sum() > 1) & (is_higher is not None)  # a value alone in its column is not worth a mark
    block = []
    for method in sorted(means.index, key=method_key):
        texts = [_cell_text(means.at[method, c], stds.at[method, c]) for c in columns]
        bold = [bool(contested[c]) and _cell_text(means.at[method, c]) == _cell_text(best[c]) for c in columns]
        block.append(Row([names[method], *extra_head], texts, bold))
    return block


def _cell_text(mean: float | None, std: float = math.nan) -> str:
    return MISSING if mean is None or math.isnan(mean) else format_mean(mean, std)
