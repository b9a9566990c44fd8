"""Records -> tables. Pure formatting with pandas: no figure is computed here, no file is read or written.

A *cell* is one (model, pruner, sparsity) of one metric. Where several records claim a cell, the newest
`finished` is shown. The layout: rows are method x sparsity, columns are models, dense on top, one block a
sparsity, the best of a block and column in bold.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

DENSE = "dense"
MISSING = "--"
COLUMNS = ["model", "pruner", "sparsity", "metric", "value", "dense_value", "linear_sparsity",
           "seconds_total", "peak_host_bytes", "fingerprint", "finished", "path"]  # fmt: skip
PRETTY = {
    DENSE: "Dense",
    "magnitude": "Magnitude",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "sparsegpt_nnpruning": "SparseGPT (nn-pruning)",
}
FIRST_PRUNERS = [DENSE, "magnitude", "wanda", "sparsegpt"]
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def to_frame(records: list[dict[str, Any]]) -> tuple[pd.DataFrame, list[str]]:
    """One row per completed record and metric, oldest first; and a line for each record that cannot be used.

    A fingerprint that occurs twice is the same experiment run again: only its newest record stays.
    """
    rows, problems = [], []
    for record in records:
        path, status = record["path"], record.get("status")
        if status != "completed":
            problems.append(f"{path}: skipped, {status} run: {_one_line(record.get('error'))}")
            continue
        try:
            rows += _record_rows(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{path}: skipped, not a usable record ({type(error).__name__}: {_one_line(error)})")
    frame = pd.DataFrame(rows, columns=COLUMNS).astype({"peak_host_bytes": "Int64"})
    # Sorted by instant, not by text: records may carry different UTC offsets. Unreadable times count as oldest.
    instants = pd.to_datetime(frame["finished"], utc=True, format="ISO8601", errors="coerce")
    frame = frame.assign(instant=instants).sort_values(["instant", "path"], kind="stable", na_position="first")
    newest = frame.drop_duplicates("fingerprint", keep="last").set_index("fingerprint")["path"]
    frame = frame[frame["path"] == frame["fingerprint"].map(newest)]
    return frame.drop(columns="instant").reset_index(drop=True), problems


def _record_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    dense_metrics = record.get("dense_metrics") or {}
    return [
        {
            "model": str(record["model"]),
            "pruner": str(record["pruner"]),
            "sparsity": normal_sparsity(record["sparsity"]),
            "metric": metric,
            "value": _number(value),
            "dense_value": _number(dense_metrics.get(metric)),
            "linear_sparsity": _number(record.get("linear_sparsity")),
            "seconds_total": _number((record.get("seconds") or {}).get("total")),
            "peak_host_bytes": None if record.get("peak_host_bytes") is None else int(record["peak_host_bytes"]),
            "fingerprint": str(record["fingerprint"]),
            "finished": str(record["finished"] or ""),
            "path": record["path"],
        }
        for metric, value in record["metrics"].items()
    ]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _one_line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else text[:157] + "..."


def normal_sparsity(label: Any) -> str:
    """Text of a sparsity, so that "0.50" and 0.5 name the same cell; 2:4 and dense stay as they are."""
    try:
        return f"{float(label):g}"
    except ValueError:
        return str(label).strip()


def sparsity_key(label: str) -> tuple[int, float, int]:
    """(kind, fraction of zeros, M): unstructured first, ascending, then N:M, then whatever else a record may say."""
    pair = re.fullmatch(r"(\d+):([1-9]\d*)", label)
    if pair:
        return 1, 1 - int(pair[1]) / int(pair[2]), int(pair[2])
    try:
        return 0, 0.0 if label == DENSE else float(label), 0
    except ValueError:
        return 2, 0.0, 0


def pretty_sparsity(label: str) -> str:
    kind, fraction, _ = sparsity_key(label)
    return f"{100 * fraction:.4g}%" if kind == 0 else label


def pruner_key(name: str) -> tuple[int, str]:
    return (FIRST_PRUNERS.index(name), "") if name in FIRST_PRUNERS else (len(FIRST_PRUNERS), name.lower())


def model_key(name: str) -> tuple[bool, list[str | float]]:
    """The demo first, then natural order with size units: opt-125m < opt-350m < opt-1.3b < opt-13b."""
    parts: list[str | float] = re.split(r"(\d+(?:\.\d+)?(?:[kmbt](?![a-z]))?)", name.lower())
    for i in range(1, len(parts), 2):  # re.split puts the captured numbers at the odd places
        unit = UNITS.get(parts[i][-1])
        parts[i] = float(parts[i][:-1]) * unit if unit else float(parts[i])
    return name != "demo", parts


def higher_is_better(metric: str) -> bool:
    return metric.endswith(("accuracy", "acc", "acc_norm"))


def format_value(value: float) -> str:
    """Two decimals; 1.6e3 from a thousand up."""
    if math.isfinite(value) and abs(round(value, 2)) >= 1000:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.2f}"


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
    cells, competing = newest_per_cell(rows)
    models = filters.get("models") or sorted(rows["model"].unique(), key=model_key)
    dense, sources = dense_values(cells)
    blocks = [[Row(PRETTY[DENSE], "0%", [_text(dense.get(m)) for m in models], [False] * len(models))]]
    pruned = cells[cells["pruner"] != DENSE]
    for sparsity in sorted(pruned["sparsity"].unique(), key=lambda label: (sparsity_key(label), label)):
        blocks.append(_block(pruned[pruned["sparsity"] == sparsity], sparsity, models, metric))
    warnings += competing + _dense_disagreements(cells, metric)
    return Table(metric, models, blocks, len(set(pruned["path"]) | sources), warnings)


def newest_per_cell(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The newest record of each cell, and a line for each cell that different experiments compete for."""
    cell, warnings = ["model", "pruner", "sparsity"], []
    for (model, pruner, sparsity), group in rows.groupby(cell):
        if len(group) > 1:  # fingerprints are unique by now, and rows are in time order
            newest = group.iloc[-1]
            warnings.append(
                f"{model} / {pruner} / {sparsity}: {len(group)} experiments compete "
                f"({', '.join(group['fingerprint'])}); shown is the newest, {newest['fingerprint']}: {newest['path']}"
            )
    return rows.drop_duplicates(cell, keep="last"), warnings


def dense_values(cells: pd.DataFrame) -> tuple[dict[str, float], set[str]]:
    """Model -> dense value, from its dense run or else from the newest pruned run's own dense figure; its paths."""
    values, sources = {}, set()
    for model, group in cells.dropna(subset="dense_value").groupby("model"):
        runs = group[group["pruner"] == DENSE]
        source = (group if runs.empty else runs).iloc[-1]
        values[model] = float(source["dense_value"])
        sources.add(source["path"])
    return values, sources


def _dense_disagreements(cells: pd.DataFrame, metric: str) -> list[str]:
    """One model has one dense figure; more than rounding between records means they were evaluated differently."""
    spread = cells.groupby("model")["dense_value"].agg(["min", "max"])
    return [
        f"{model}: records disagree on dense {metric} ({low:.2f} to {high:.2f}), so they do not compare"
        for model, low, high in spread.itertuples()
        if high - low > 0.01 * abs(low)
    ]


def _block(cells: pd.DataFrame, sparsity: str, models: list[str], metric: str) -> list[Row]:
    grid = cells.pivot(index="pruner", columns="model", values="value").reindex(columns=models)
    grid = grid.loc[sorted(grid.index, key=pruner_key)]
    best = grid.max() if higher_is_better(metric) else grid.min()
    contested = grid.notna().sum() > 1  # alone in its column, a figure is the best of nothing
    rows = []
    for pruner, values in grid.iterrows():
        texts = [_text(value) for value in values]
        bold = [bool(contested[m]) and t == _text(best[m]) for m, t in zip(models, texts, strict=True)]
        rows.append(Row(PRETTY.get(pruner, pruner), pretty_sparsity(sparsity), texts, bold))
    return rows


def _text(value: float | None) -> str:
    return MISSING if value is None or math.isnan(value) else format_value(value)


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
            cells = [rf"\textbf{{{t}}}" if best else t for t, best in zip(row.cells, row.best, strict=True)]
            lines.append("    " + " & ".join([*map(_escape_latex, (row.method, row.sparsity)), *cells]) + r" \\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return re.sub(r"[\\~^&%$#_{}]", lambda match: special.get(match[0], "\\" + match[0]), text)
