"""Turns records into one long frame, and chooses which of its rows a table or a plot shows.

A *cell* is one (model, method, sparsity) of one metric; runs of one pruner that differ in a setting are of several methods
(variants.py). An *experiment* is all records of a cell that differ in nothing but the seed, neither in their configs nor in the code
and the files that these name, the newest record of each seed. Where experiments compete for a cell, the one with the newest
`finished` is shown: the mean over its seeds and their sample standard deviation. That and the mean accuracy over a record's tasks are
all that is computed here.
"""

import math
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from nnprune import records
from nnprune.report.labels import DENSE, normal_sparsity
from nnprune.report.validation import find_fault
from nnprune.report.variants import plain_method, setting_key, settings_of, short_texts, with_methods

CELL = ["model", "method", "sparsity"]
NAMES = ["model", "pruner", "sparsity"]
FIGURES = ["value", "stderr", "dense_value", "linear_sparsity", "seconds"]
PEAKS = ["peak_host_bytes", "peak_device_bytes"]
COLUMNS = [*NAMES, "metric", *FIGURES, *PEAKS, "whole_model", "fingerprint", "finished", "path", "experiment", "seed"]
OBJECTS = ["record"]  # columns that are no plain values: the record itself, a dict
MEAN_ACCURACY = "mean_acc"
FRACTIONS = ("accuracy", "acc", "acc_norm", "exact_match", "f1")
"""How names of metrics end that are fractions of what is right; tables show them in per cent."""

FOR_ALL = ("dense_evaluation", "generation")
"""Stages of the first run of several whose results the others use: the dense model's figures, a calibration that the model writes."""

SAME_EXPERIMENT = ("seed", *records.NOT_SCIENCE)  # settings in which records of one experiment may differ


def to_frame(found: list[dict[str, Any]]) -> tuple[pd.DataFrame, list[str]]:
    """One row per completed run and metric, oldest first, and one line for each record that is not in the frame.

    `found` is from `records.read_all`. Columns are `COLUMNS` and `OBJECTS`, in units of the metric, seconds, bytes, and `num_seeds`, `mean`
    and `std` of the row's experiment, `std` the sample standard deviation, NaN for a single seed.

    Records of one seed that differ in what no config shows, such as the text in a file, are experiments of their own:
    the newest of each seed form one, those before them another, named by a number.
    """
    usable, problems = [], []
    for record in found:
        if fault := find_fault(record):
            problems.append(f"{record['path']}: skipped, {fault}")
        else:
            usable.append(record)
    # Sorted by instant and not by text, since records may carry different UTC offsets.
    usable.sort(key=lambda record: (_instant(record["finished"]), record["path"]))
    runs, replaced = _newest_of_each_run(usable)
    rows = [row for record in runs for row in _record_rows(record)]
    frame = pd.DataFrame(rows, columns=[*COLUMNS, *OBJECTS]).astype(
        {**dict.fromkeys(FIGURES, float), **dict.fromkeys(PEAKS, "Int64"), "whole_model": bool}
    )
    age = frame.groupby([*NAMES, "metric", "experiment", "seed"]).cumcount(ascending=False)
    frame["experiment"] = frame["experiment"].where(age == 0, frame["experiment"] + "-" + age.astype(str))
    return with_seed_statistics(frame), problems + replaced


def _instant(finished: str | None) -> float:
    """Seconds since 1970 of an ISO 8601 time. What cannot be read counts as oldest."""
    try:
        time = datetime.fromisoformat(finished or "")
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return -math.inf


def _newest_of_each_run(usable: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The newest record of each fingerprint, and a line for each other one with other names or figures.

    A fingerprint that occurs twice is one run made twice, or a copy of its record. Model name and label are not part of it.
    `usable` is sorted, oldest first.
    """
    newest = {record["fingerprint"]: record for record in usable}
    kept, lines = [], []
    for record in usable:
        shown = newest[record["fingerprint"]]
        names, shown_names = _names(record), _names(shown)
        if record is shown:
            kept.append(record)
        elif names != shown_names:
            lines.append(
                f"{record['path']}: not shown; {names} is the same run (fingerprint {record['fingerprint']}) as "
                f"{shown_names}, which is shown: {shown['path']}"
            )
        elif record["metrics"] != shown["metrics"] or record["dense_metrics"] != shown["dense_metrics"]:
            lines.append(
                f"{record['path']}: not shown; {names} has a newer record of the same run (fingerprint "
                f"{record['fingerprint']}) with other figures, which is shown: {shown['path']}"
            )
    return kept, lines


def _names(record: dict[str, Any]) -> str:
    return " / ".join([record["model"], record["pruner"], normal_sparsity(record["sparsity"])])


def with_seed_statistics(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the number of seeds, the mean and the standard deviation of the experiment of each row."""
    values = frame.groupby([*NAMES, "metric", "experiment"])["value"]
    num_seeds = values.transform("size").astype(int)
    complete = values.transform("count") == num_seeds  # if one seed has no figure, the others' mean would mislead
    mean = frame["value"].where(num_seeds == 1, values.transform("mean").where(complete))
    return frame.assign(num_seeds=num_seeds, mean=mean, std=values.transform("std").where(complete))


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows as a table or a plot shows them: accuracies in per cent, and the standard error of the measurement as `std` where there
    is one seed."""
    factor = rows["metric"].map(lambda metric: 100.0 if metric.endswith(FRACTIONS) else 1.0).astype(float)
    std = rows["std"].where(rows["num_seeds"] > 1, rows["stderr"])
    return rows.assign(mean=rows["mean"] * factor, std=std * factor, dense_value=rows["dense_value"] * factor)


def _with_mean_accuracy(record: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics and, if a record has the accuracies of several tasks, their mean as `MEAN_ACCURACY`."""
    names = dict.fromkeys(f"{entry.get('name')}_acc" for entry in record["evaluations"].values())
    found = [(metrics[name], metrics.get(f"{name}_stderr")) for name in names if isinstance(metrics.get(name), float | int)]
    if len(found) < 2:
        return metrics
    mean = {MEAN_ACCURACY: sum(value for value, _ in found) / len(found)}
    if all(isinstance(stderr, float | int) for _, stderr in found):
        mean[f"{MEAN_ACCURACY}_stderr"] = math.hypot(*(stderr for _, stderr in found)) / len(found)  # tasks are independent
    return metrics | mean


def _record_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    metrics, dense = (_with_mean_accuracy(record, record[key]) for key in ("metrics", "dense_metrics"))
    return [
        {
            "model": record["model"],
            "pruner": record["pruner"],
            "sparsity": normal_sparsity(record["sparsity"]),
            "metric": metric,
            "value": value,
            "stderr": stderr,
            "dense_value": dense.get(metric),
            "linear_sparsity": record["linear_sparsity"],
            "seconds": _seconds(record),
            **{name: record[name] for name in (*PEAKS, "whole_model")},
            "fingerprint": record["fingerprint"],
            "finished": record["finished"] or "",
            "path": record["path"],
            "record": record,
            **_experiment_and_seed(record, metric),
        }
        for metric, (value, stderr) in records.with_stderr(metrics).items()
    ]


def _seconds(record: dict[str, Any]) -> float | None:
    """The seconds of a run, without what it did for later runs too."""
    total = record["seconds"].get("total")
    if total is None or record["pruner"] == DENSE:
        return total
    return total - sum(record["seconds"].get(stage, 0) for stage in FOR_ALL)


def _experiment_and_seed(record: dict[str, Any], metric: str) -> dict[str, str]:
    """12 digits that name what a metric was measured of, and how, without the seeds, and the seeds as text, "" for none."""
    config = {key: value for key, value in record["config"].items() if key not in SAME_EXPERIMENT}
    config |= {key: record[key] for key in ("dtype", "model_hash", "commits", "seedless_fingerprint")}  # these no config shows
    seeds = [record["config"].get("seed")]
    if isinstance(config.get("calibration"), dict):
        config["calibration"] = dict(config["calibration"])
        seeds.append(config["calibration"].pop("seed", None))
    measured = [key for key, entry in record["evaluations"].items() if metric in entry["metrics"]]
    if metric == MEAN_ACCURACY:
        config["evaluation"] = sorted(
            key for key, entry in record["evaluations"].items() if f"{entry['name']}_acc" in entry["metrics"]
        )
    else:
        settings = measured[-1] if measured else record["config"].get("evaluation")
        config["evaluation"] = [
            settings,
            record["evaluations"][settings].get("tokens") if measured else record["evaluation_hashes"],
        ]
    if record["pruner"] == DENSE and normal_sparsity(record["sparsity"]) == DENSE:
        seeds = []  # nothing random in evaluating the dense model
    seed = "/".join(dict.fromkeys(str(seed) for seed in seeds if seed is not None))
    return {"experiment": records.fingerprint(config), "seed": seed}


def is_dense(rows: pd.DataFrame) -> pd.Series:
    """True for runs of the dense model. A pruned one may be labelled "dense" too, so the label alone does not tell."""
    return (rows["pruner"] == DENSE) & (rows["sparsity"] == DENSE)


def newest_experiments(rows: pd.DataFrame, by: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Those rows of one metric that belong to the newest experiment of their cell, and a line for each contested cell, and for each
    whose seeds were pruned by different code of nnprune.

    They have `method` and `variant` (variants.py). With `by`, a setting, each value of it (the column `by`) makes other cells.
    """
    rows, cell, warnings = with_methods(rows, by), [*CELL, *(["by"] if by else [])], []
    for (model, method, *others), group in rows.groupby(cell):
        name = " / ".join([model, plain_method(method), *others])
        newest = group.drop_duplicates("experiment", keep="last")  # rows are in order of time
        if len(newest) > 1:
            last = newest.iloc[-1]
            seeds = f" ({last['num_seeds']} seeds)" if last["num_seeds"] > 1 else ""
            warnings.append(
                f"{name}: {len(newest)} experiments compete ({', '.join(newest['fingerprint'])}); "
                f"shown is the newest, {last['fingerprint']}{seeds}: {last['path']}"
            )
        files = _changed_files(group.loc[group["experiment"] == newest["experiment"].iloc[-1], "record"])
        if files:
            warnings.append(
                f"{name}: other code of nnprune pruned some of its seeds ({', '.join(files)}), so they may not compare"
            )
    return rows[rows["experiment"] == rows.groupby(cell)["experiment"].transform("last")], warnings


def mixed_models(rows: pd.DataFrame) -> list[str]:
    """A line for each name that is of several models."""
    hashes = rows["record"].map(lambda record: record["model_hash"])
    several = hashes.groupby(rows["model"]).nunique()
    return [
        f"{model}: the records are of {number} different models of this name, so they do not compare; tell them apart with model.name"
        for model, number in several[several > 1].items()
    ]


def _changed_files(found: pd.Series) -> list[str]:
    """The files of nnprune that differ between records, as far as these tell."""
    codes = [record["code"] for record in found if record["code"]]
    return sorted(file for file in set().union(*codes) if len({code.get(file) for code in codes}) > 1)


def with_setting(rows: pd.DataFrame, key: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows whose config has the setting `key`, with its value as text in the column `by`, and a line about the others."""
    settings = [settings_of(record) for record in rows["record"]]
    has = pd.Series([key in one for one in settings], index=rows.index, dtype=bool)
    texts = short_texts(key, settings)
    values = pd.Series([texts.get(setting_key(one, key), "") for one in settings], index=rows.index, dtype=object)
    left_out = sorted(set(rows["pruner"][~has & ~is_dense(rows)]))
    lines = [f"--by {key}: not shown are runs without this setting, of {', '.join(left_out)}"] if left_out else []
    return rows.assign(by=values)[has | is_dense(rows)], lines
