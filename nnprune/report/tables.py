"""The collector's frame -> tables. Pure formatting with pandas; no metric is computed and no file is read or written.

All arithmetic is in cells.py, a mean and a spread over seeds, but for the mean and the most of what runs took.

Two layouts, dense on top in both and the best of a block and column in bold. Models: rows are method x sparsity, columns
are models, one block a sparsity. Methods: rows are methods, columns are sparsities, for one model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import pandas as pd

from nnprune.report.frame import PEAKS, dense_disagreements, dense_values, one_per_cell, relative_to, shown
from nnprune.report.labels import DENSE, model_key, pretty_pruner, pretty_sparsity, pruner_key, sparsity_key

MISSING = "--"


def higher_is_better(metric: str) -> bool:
    return metric.endswith(("accuracy", "acc", "acc_norm"))


def format_value(value: float) -> str:
    """Two decimals; 1.6e3 from a thousand up."""
    if math.isfinite(value) and abs(round(value, 2)) >= 1000:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.2f}"


def format_mean(mean: float, std: float) -> str:
    """`46.8 ± 0.4`, with the decimals that the spread leaves meaningful; without a spread, as any value."""
    if not (math.isfinite(mean) and math.isfinite(std)):
        return format_value(mean)
    text = format_value(mean)
    if "e" in text:
        exponent = int(text.split("e")[1])
        if std >= 0.05 * 10**exponent:
            return f"{text} ± {std / 10**exponent:.1f}e{exponent}"
        return f"{text} ± {std:.0f}" if std >= 1 else f"{text} ± {std:.1g}"  # what the mean's decimals would not show
    decimals = 2 if std < 0.1 else 1 if std < 10 else 0
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


@dataclass
class Row:
    head: list[str]  # the method, and its sparsity where columns are models
    cells: list[str]
    best: list[bool]  # a cell of this row is the best of its block and column


@dataclass
class Table:
    caption: str
    head: list[str]
    columns: list[str]
    blocks: list[list[Row]]  # the first block is the dense row
    num_records: int
    warnings: list[str] = field(default_factory=list)


def build_table(frame: pd.DataFrame, metric: str, **filters: list[str] | None) -> Table:
    """The table of one metric over models. Filters: `models` (gives their order too), `pruners`, `sparsities`.

    Filters never hide the dense row. A value that matches no record is warned of; a model still gets its column.
    """
    rows, warnings = _select(frame, metric, filters)
    models = filters.get("models") or sorted(rows["model"].unique(), key=model_key)
    dense, sources = dense_values(rows)
    blocks = [[_dense_row(["0%"], [dense.get(model) for model in models])]]
    pruned = rows[rows["pruner"] != DENSE]
    for sparsity in _sparsities(pruned):
        of_block = pruned[pruned["sparsity"] == sparsity]
        blocks.append(_block(of_block, "model", models, metric, [pretty_sparsity(sparsity)]))
    return Table(metric, ["Method", "Sparsity"], models, blocks, len(set(pruned["path"]) | sources), warnings)


def build_methods_table(
    frame: pd.DataFrame,
    metric: str,
    model: str,
    costs: bool = False,
    relative: str | None = None,
    **filters: list[str] | None,
) -> Table:
    """The table of one metric and model over methods. Filters: `pruners`, `sparsities`, as in `build_table`.

    The dense figure stands in each column. `costs` adds what a row's runs took: the mean of their seconds, evaluation
    included, and the most memory that any of them held at a time, that of a device only where one was used. `relative`
    names a pruner: a cell is then ln(perplexity / dense perplexity) relative to that pruner's (`cells.relative_to`), whose
    row is there whatever `pruners` says.
    """
    if relative and filters.get("pruners"):
        filters["pruners"] = [*filters["pruners"], relative]
    rows, warnings = _select(frame, metric, {**filters, "models": [model]})
    caption = f"{metric}, {model}"
    if relative:
        rows, caption = relative_to(rows, relative), f"{caption}, ln(value / dense) relative to {pretty_pruner(relative)}'s"
    dense, sources = dense_values(rows)
    pruned = rows[rows["pruner"] != DENSE]
    sparsities = _sparsities(pruned)
    blocks = [[_dense_row([], [dense.get(model)] * len(sparsities))]]
    if sparsities:
        blocks.append(_block(pruned, "sparsity", sparsities, metric, []))
    columns = [pretty_sparsity(sparsity) for sparsity in sparsities]
    if costs:
        taken = _costs(pruned)
        columns += list(taken.columns)
        dense_costs = [math.nan] * len(taken.columns)  # a dense run prunes nothing
        for row, values in zip([row for block in blocks for row in block], [dense_costs, *taken.to_numpy()], strict=True):
            row.cells += [MISSING if math.isnan(value) else f"{value:.{0 if value >= 10 else 1}f}" for value in values]
            row.best += [False] * len(values)
    return Table(caption, ["Method"], columns, blocks, len(set(pruned["path"]) | sources), warnings)


def _select(frame: pd.DataFrame, metric: str, filters: dict[str, list[str] | None]) -> tuple[pd.DataFrame, list[str]]:
    """The rows that a table shows, and the warnings about them."""
    rows, warnings = frame[frame["metric"] == metric], []
    for column, option in (("model", "models"), ("pruner", "pruners"), ("sparsity", "sparsities")):
        wanted = filters.get(option)
        if wanted is None:
            continue
        unmatched = sorted(set(wanted) - set(rows[column]) - {DENSE})
        warnings += [f"{option}={value}: no record with {metric} has it" for value in unmatched]
        rows = rows[rows[column].isin(wanted) | ((rows["pruner"] == DENSE) & (column != "model"))]
    rows, competing = shown(rows)
    return rows, warnings + competing + dense_disagreements(rows, metric)


def _sparsities(rows: pd.DataFrame) -> list[str]:
    return sorted(rows["sparsity"].unique(), key=lambda label: (sparsity_key(label), label))


def _costs(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a pruner, in the order of a block's; columns are what its runs took."""
    groups = rows.groupby("pruner")
    peaks = groups[PEAKS].max().astype(float).replace(0, math.nan) / 2**30  # a run on a CPU holds nothing of a device
    costs = pd.DataFrame({"Seconds": groups["seconds_total"].mean(), "GiB": peaks["peak_host_bytes"]})
    if peaks["peak_device_bytes"].notna().any():
        costs["GiB of device"] = peaks["peak_device_bytes"]
    return costs.reindex(sorted(costs.index, key=pruner_key))


def _dense_row(beside: list[str], values: list[float | None]) -> Row:
    return Row([pretty_pruner(DENSE), *beside], [_text(value) for value in values], [False] * len(values))


def _block(rows: pd.DataFrame, across: str, columns: list[str], metric: str, beside: list[str]) -> list[Row]:
    """A row a pruner, with `beside` next to its name; columns are values of the frame's column `across`."""
    grid = one_per_cell(rows).pivot(index="pruner", columns=across, values=["mean", "std"])
    means, stds = (grid[kind].reindex(columns=columns) for kind in ("mean", "std"))
    best = means.max() if higher_is_better(metric) else means.min()
    contested = means.notna().sum() > 1  # alone in its column, a figure is the best of nothing
    block = []
    for pruner in sorted(means.index, key=pruner_key):
        texts = [_text(means.at[pruner, c], stds.at[pruner, c]) for c in columns]
        bold = [bool(contested[c]) and _text(means.at[pruner, c]) == _text(best[c]) for c in columns]
        block.append(Row([pretty_pruner(pruner), *beside], texts, bold))
    return block


def _text(mean: float | None, std: float = math.nan) -> str:
    return MISSING if mean is None or math.isnan(mean) else format_mean(mean, std)


def to_markdown(table: Table) -> str:
    width = len(table.head) + len(table.columns)
    lines = [[*table.head, *(name.replace("|", r"\|") for name in table.columns)], [":---"] * width]
    for i, block in enumerate(table.blocks):
        lines += [[""] * width] if i else []
        for row in block:
            cells = [f"**{text}**" if best else text for text, best in zip(row.cells, row.best, strict=True)]
            lines.append([f"**{row.head[0]}**", *row.head[1:], *cells])
    return "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) + "\n" for line in lines)


def to_latex(table: Table) -> str:
    """A booktabs table; `\\usepackage{booktabs}` is all it needs."""
    alignment = "l" * len(table.head) + "r" * len(table.columns)
    head = " & ".join(map(_escape_latex, [*table.head, *table.columns]))
    lines = [r"\begin{table}", r"  \centering", rf"  \caption{{{_escape_latex(table.caption)}}}",
             rf"  \begin{{tabular}}{{{alignment}}}", r"    \toprule", rf"    {head} \\"]  # fmt: skip
    for block in table.blocks:
        lines.append(r"    \midrule")
        for row in block:
            texts = [text.replace("±", r"$\pm$") for text in row.cells]
            cells = [rf"\textbf{{{t}}}" if best else t for t, best in zip(texts, row.best, strict=True)]
            lines.append("    " + " & ".join([*map(_escape_latex, row.head), *cells]) + r" \\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda match: special.get(match[0], "\\" + match[0]), text)
