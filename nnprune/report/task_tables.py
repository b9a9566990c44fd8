"""The table of several metrics of one model: rows are pruner x sparsity, columns are the metrics and their mean."""

import math

import pandas as pd

from nnprune.report.dense import dense_values
from nnprune.report.escaping import distinct_names
from nnprune.report.frame import FRACTIONS, is_dense
from nnprune.report.messages import UsageError
from nnprune.report.metrics import direction, higher_is_better, pretty_metric
from nnprune.report.tables import Table, all_blocks, dense_row, method_names, select

MEAN = "Mean"
ROW = "method"  # the frame's column that names a row


def build_tasks_table(frame: pd.DataFrame, metrics: list[str], model: str, **filters: list[str] | None) -> Table:
    """The table of metrics, such as the accuracies of tasks, and their mean. Filters are `pruners` and `sparsities`.

    A row without one of the metrics has no mean. The ± of a mean takes the metrics for independent. Raises UsageError for metrics of
    which some are better when higher and others when lower.
    """
    if {higher_is_better(metric) for metric in metrics} >= {True, False}:
        raise UsageError(f"metric={','.join(metrics)}: have no mean, since higher is better for some only; make two tables")
    # If the direction of one is unknown, so is that of the mean.
    judge = next((metric for metric in metrics if higher_is_better(metric) is None), metrics[0])
    selected = [select(frame, metric, {**filters, "models": [model]}) for metric in metrics]
    warnings = list(dict.fromkeys(line for _, lines in selected for line in lines))
    rows = pd.concat([rows for rows, _ in selected])
    rows = pd.concat([rows, *_means(rows, len(metrics))])
    dense = {metric: dense_values(rows[rows["metric"] == metric]) for metric in (*metrics, MEAN)}
    pruned = rows[~is_dense(rows)]
    top = dense_row(["0%"], [values.get(model) for values, _ in dense.values()])
    blocks, whole = all_blocks(top, pruned, "metric", list(dense), judge, method_names(pruned))
    sources = set(pruned["path"]).union(*(paths for _, paths in dense.values()))
    caption = f"{', '.join(metrics)}, {model}"
    title = f"{', '.join(map(pretty_metric, metrics))} of {model}{direction(judge)}"
    return Table(caption, title, ["Method", "Sparsity"], _columns([*metrics, MEAN]), blocks, len(sources), warnings, whole)


def _means(rows: pd.DataFrame, num_metrics: int) -> list[pd.DataFrame]:
    """A row with the mean of each pruner and sparsity that has all metrics."""
    cells = rows.drop_duplicates([ROW, "sparsity", "metric"], keep="last")
    return [
        group.iloc[-1:].assign(
            metric=MEAN,
            mean=group["mean"].mean(skipna=False),
            std=math.hypot(*group["std"]) / num_metrics,
            dense_value=group["dense_value"].mean(skipna=False),
        )
        for _, group in cells.groupby([ROW, "sparsity"])
        if len(group) == num_metrics
    ]


def _columns(metrics: list[str]) -> list[str]:
    """Names of columns: the tasks alone where all metrics are of one kind."""
    for kind in sorted(FRACTIONS, key=len, reverse=True):
        if all(metric.endswith(f"_{kind}") for metric in metrics[:-1]):
            metrics = [metric.removesuffix(f"_{kind}") for metric in metrics]
            break
    return list(distinct_names(metrics, str).values())
