"""Records -> one long frame, and which of its rows a table or a plot shows.

A *cell* is one (model, pruner, sparsity) of one metric. Where several records claim a cell, the newest
`finished` is shown.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from nnprune.names import DENSE, normal_sparsity

COLUMNS = ["model", "pruner", "sparsity", "metric", "value", "dense_value", "linear_sparsity",
           "seconds_total", "peak_host_bytes", "fingerprint", "finished", "path"]  # fmt: skip


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


def dense_disagreements(cells: pd.DataFrame, metric: str) -> list[str]:
    """One model has one dense figure; more than rounding between records means they were evaluated differently."""
    spread = cells.groupby("model")["dense_value"].agg(["min", "max"])
    return [
        f"{model}: records disagree on dense {metric} ({low:.2f} to {high:.2f}), so they do not compare"
        for model, low, high in spread.itertuples()
        if high - low > 0.01 * abs(low)
    ]
