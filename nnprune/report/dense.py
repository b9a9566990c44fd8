"""The figures of dense models beside those of pruned ones."""

import json
from typing import Any

import pandas as pd

from nnprune.report.frame import is_dense
from nnprune.report.numbers import format_value


def dense_values(rows: pd.DataFrame) -> tuple[dict[str, float], set[str]]:
    """Model -> dense value, and the paths it comes from: the model's dense run, or its newest pruned run without one."""
    values, sources = {}, set()
    for model, group in rows.dropna(subset="dense_value").groupby("model"):
        dense_runs = group[is_dense(group)]
        source = (group if dense_runs.empty else dense_runs).iloc[-1]
        values[model] = float(source["dense_value"])
        sources.add(source["path"])
    return values, sources


def without_other_evaluations(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Without those runs of the dense model that measured a metric otherwise than the newest pruned run, or in another dtype; that run's
    record has the figure to compare with."""

    def measured_as(record: dict[str, Any]) -> str | None:
        settings = _evaluated_as(record, metric)
        return settings and f"{settings} {record['dtype']}"

    how, dense = rows["record"].map(measured_as), is_dense(rows)
    of_newest = rows["model"].map(how[~dense].groupby(rows["model"]).last())
    return rows[~(dense & how.notna() & of_newest.notna() & (how != of_newest))]


def dense_disagreements(rows: pd.DataFrame, metric: str) -> list[str]:
    """A line for each model whose records were evaluated differently: their dense figures differ by more than rounding, or they
    tell of other settings of the evaluation."""
    extremes = rows.groupby("model")["dense_value"].agg(["min", "max"])
    settings = rows["record"].map(lambda record: _evaluated_as(record, metric)).dropna()
    several = settings.groupby(rows["model"]).nunique()
    return [
        f"{model}: records measured {metric} with different settings of the evaluation, so they do not compare"
        for model in several[several > 1].index
    ] + [
        f"{model}: records disagree on dense {metric} ({format_value(low)} to {format_value(high)}), so they do not compare"
        for model, low, high in extremes.itertuples()
        if high - low > 0.01 * abs(low)
    ]


def _evaluated_as(record: dict[str, Any], metric: str) -> str | None:
    """The settings of the last evaluation that measured a metric, as text; None where an older record does not tell."""
    found = [one for one in record["evaluations"].values() if metric in (one.get("metrics") or {}) and "settings" in one]
    return json.dumps(found[-1]["settings"], sort_keys=True) if found else None
