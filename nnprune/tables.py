"""The collector's frame -> tables. Pure formatting with pandas: the means and spreads over seeds that are shown were taken
in cells.py, no figure is computed here, no file is read or written.

The layout: rows are method x sparsity, columns are models, dense on top, one block a
sparsity, the best of a block and column in bold.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import pandas as pd

from nnprune.cells import dense_disagreements, dense_values, one_per_cell, shown
from nnprune.names import DENSE, PRETTY, model_key, pretty_sparsity, pruner_key, sparsity_key

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
        return f"{text} ± {std / 10**exponent:.1f}e{exponent}"
    decimals = 2 if std < 0.1 else 1 if std < 10 else 0
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


@dataclass
class Row:
    method: str
    sparsity: str
    cells: list[str]
    best: list[bool]  # a cell of this row is the best of its block and column


@dataclass
class Table:
    metric: str
    models: list[str]
    blocks: list[list[Row]]  # the first block is the dense row
    num_records: int
    warnings: list[str] = field(default_factory=list)


def build_table(frame: pd.DataFrame, metric: str, **filters: list[str] | None) -> Table:
    """The table of one metric. Filters: `models` (gives their order too), `pruners`, `sparsities`.

    Filters never hide the dense row. A value that matches no record is warned of; a model still gets its column.
    """
    rows, warnings = frame[frame["metric"] == metric], []
    for column, option in (("model", "models"), ("pruner", "pruners"), ("sparsity", "sparsities")):
        wanted = filters.get(option)
        if wanted is None:
            continue
        unmatched = sorted(set(wanted) - set(rows[column]) - {DENSE})
        warnings += [f"{option}={value}: no record with {metric} has it" for value in unmatched]
        rows = rows[rows[column].isin(wanted) | ((rows["pruner"] == DENSE) & (column != "model"))]
    rows, competing = shown(rows)
    models = filters.get("models") or sorted(rows["model"].unique(), key=model_key)
    dense, sources = dense_values(rows)
    blocks = [[Row(PRETTY[DENSE], "0%", [_text(dense.get(m)) for m in models], [False] * len(models))]]
    pruned = rows[rows["pruner"] != DENSE]
    for sparsity in sorted(pruned["sparsity"].unique(), key=lambda label: (sparsity_key(label), label)):
        blocks.append(_block(pruned[pruned["sparsity"] == sparsity], sparsity, models, metric))
    warnings += competing + dense_disagreements(rows, metric)
    return Table(metric, models, blocks, len(set(pruned["path"]) | sources), warnings)


def _block(rows: pd.DataFrame, sparsity: str, models: list[str], metric: str) -> list[Row]:
    grid = one_per_cell(rows).pivot(index="pruner", columns="model", values=["mean", "std"])
    means, stds = (grid[kind].reindex(columns=models) for kind in ("mean", "std"))
    best = means.max() if higher_is_better(metric) else means.min()
    contested = means.notna().sum() > 1  # alone in its column, a figure is the best of nothing
    block = []
    for pruner in sorted(means.index, key=pruner_key):
        of_row = [(means.at[pruner, m], stds.at[pruner, m]) for m in models]
        texts = [_text(mean, std) for mean, std in of_row]
        bold = [bool(contested[m]) and _text(mean) == _text(best[m]) for m, (mean, _) in zip(models, of_row, strict=True)]
        block.append(Row(PRETTY.get(pruner, pruner), pretty_sparsity(sparsity), texts, bold))
    return block


def _text(mean: float | None, std: float = math.nan) -> str:
    return MISSING if mean is None or math.isnan(mean) else format_mean(mean, std)


def to_markdown(table: Table) -> str:
    lines = [["Method", "Sparsity", *(m.replace("|", r"\|") for m in table.models)], [":---"] * (2 + len(table.models))]
    for i, block in enumerate(table.blocks):
        lines += [[""] * (2 + len(table.models))] if i else []
        for row in block:
            cells = [f"**{text}**" if best else text for text, best in zip(row.cells, row.best, strict=True)]
            lines.append([f"**{row.method}**", row.sparsity, *cells])
    return "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) + "\n" for line in lines)


def to_latex(table: Table) -> str:
    """A booktabs table; `\\usepackage{booktabs}` is all it needs."""
    head = " & ".join(["Method", "Sparsity", *map(_escape_latex, table.models)])
    lines = [r"\begin{table}", r"  \centering", rf"  \caption{{{_escape_latex(table.metric)}}}",
             rf"  \begin{{tabular}}{{ll{'r' * len(table.models)}}}", r"    \toprule", rf"    {head} \\"]  # fmt: skip
    for block in table.blocks:
        lines.append(r"    \midrule")
        for row in block:
            texts = [text.replace("±", r"$\pm$") for text in row.cells]
            cells = [rf"\textbf{{{t}}}" if best else t for t, best in zip(texts, row.best, strict=True)]
            lines.append("    " + " & ".join([*map(_escape_latex, (row.method, row.sparsity)), *cells]) + r" \\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda match: special.get(match[0], "\\" + match[0]), text)
