"""Records -> one long frame, and which of its rows a table or a plot shows.

A *cell* is one (model, pruner, sparsity) of one metric. An *experiment* is all records of a cell whose configs differ in
nothing but the seed, the newest record of each seed. Where experiments compete for a cell, the one with the newest
`finished` is shown: the mean over its seeds and their sample standard deviation. That, and on demand a perplexity beside
another's, is all that is computed here.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from nnprune import records
from nnprune.report.labels import DENSE, normal_sparsity

CELL = ["model", "pruner", "sparsity"]
PEAKS = ["peak_host_bytes", "peak_device_bytes"]
OF_RECORD = ["value", "dense_value", "linear_sparsity", "seconds_total", *PEAKS, "fingerprint", "finished", "path"]
OF_EXPERIMENT = ["experiment", "seed", "num_seeds", "mean", "std"]
COLUMNS = [*CELL, "metric", *OF_RECORD, *OF_EXPERIMENT]
NOT_SCIENCE = ("seed", *records.NOT_SCIENCE)
"""Settings that do not tell one experiment from another."""


def to_frame(records: list[dict[str, Any]]) -> tuple[pd.DataFrame, list[str]]:
    """One row per completed record and metric, oldest first; and a line for each record that cannot be used.

    A fingerprint that occurs twice is the same run made again: only its newest record stays. Of a row's experiment there
    are the number of seeds, their mean, and the sample standard deviation, NaN for a single seed.
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
    frame = pd.DataFrame(rows, columns=[column for column in COLUMNS if column not in ("num_seeds", "mean", "std")])
    frame = frame.astype({**dict.fromkeys(PEAKS, "Int64"), "value": float})
    # Sorted by instant, not by text: records may carry different UTC offsets. Unreadable times count as oldest.
    instants = pd.to_datetime(frame["finished"], utc=True, format="ISO8601", errors="coerce")
    frame = frame.assign(instant=instants).sort_values(["instant", "path"], kind="stable", na_position="first")
    newest = frame.drop_duplicates("fingerprint", keep="last").set_index("fingerprint")["path"]
    frame = frame[frame["path"] == frame["fingerprint"].map(newest)]
    return _with_seeds(frame.drop(columns="instant").reset_index(drop=True)), problems


def _with_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame, oldest first, with what belongs to the experiment of each row.

    Records of one seed that differ in what no config shows, such as the text in a file, are experiments of their own:
    the newest of each seed are one, those before them another.
    """
    key = [*CELL, "metric", "experiment"]
    age = frame.groupby([*key, "seed"]).cumcount(ascending=False)
    frame["experiment"] = frame["experiment"].where(age == 0, frame["experiment"] + "-" + age.astype(str))
    return _with_means(frame)[COLUMNS]


def _with_means(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the number of seeds of each row's experiment, the mean of their values and its standard deviation."""
    values = frame.groupby([*CELL, "metric", "experiment"])["value"]
    num_seeds = values.transform("size").astype(int)
    whole = values.transform("count") == num_seeds  # no mean over some of the seeds: one that is NaN makes NaN
    mean = frame["value"].where(num_seeds == 1, values.transform("mean").where(whole))
    return frame.assign(num_seeds=num_seeds, mean=mean, std=values.transform("std").where(whole))


def _record_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    dense_metrics = record.get("dense_metrics") or {}
    experiment, seed = _experiment_and_seed(record)
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
            **{name: None if record.get(name) is None else int(record[name]) for name in PEAKS},
            "fingerprint": str(record["fingerprint"]),
            "finished": str(record["finished"] or ""),
            "path": record["path"],
            "experiment": experiment,
            "seed": seed,
        }
        for metric, value in record["metrics"].items()
    ]


def _experiment_and_seed(record: dict[str, Any]) -> tuple[str, str]:
    """12 digits that name the config and the evaluated tokens without the seeds; the seeds as text, "" for none."""
    config = dict(record.get("config") or {})
    calibration = dict(config.get("calibration") or {})
    seeds = [config.get("seed"), calibration.pop("seed", None)]
    config = {key: value for key, value in config.items() if key not in NOT_SCIENCE}
    name = records.fingerprint({**config, "calibration": calibration, "tokens": record.get("evaluation_hashes") or {}})
    known = dict.fromkeys(str(seed) for seed in seeds if seed is not None)
    return name, "" if str(record["pruner"]) == DENSE else "/".join(known)  # nothing of a dense model is drawn


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _one_line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else text[:157] + "..."


def shown(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Of the rows of one metric those of each cell's newest experiment; and a line for each cell that others compete for."""
    warnings = []
    for names, group in rows.groupby(CELL):
        newest = group.drop_duplicates("experiment", keep="last")  # fingerprints are unique by now, and rows in time order
        if len(newest) > 1:
            last = newest.iloc[-1]
            seeds = f" ({last['num_seeds']} seeds)" if last["num_seeds"] > 1 else ""
            warnings.append(
                f"{' / '.join(names)}: {len(newest)} experiments compete ({', '.join(newest['fingerprint'])}); "
                f"shown is the newest, {last['fingerprint']}{seeds}: {last['path']}"
            )
    return rows[rows["experiment"] == rows.groupby(CELL)["experiment"].transform("last")], warnings


def relative_to(rows: pd.DataFrame, pruner: str) -> pd.DataFrame:
    """The shown rows of one perplexity, each value x / x of `pruner` at the same model, sparsity and seed.

    x = ln(perplexity / dense perplexity): 0 for the dense model, 1 for `pruner` itself, NaN where that has no record.
    """
    ratios = rows["value"] / rows["dense_value"]
    x = ratios.map(lambda ratio: math.log(ratio) if ratio > 0 else math.nan)
    place = pd.MultiIndex.from_frame(rows[["model", "sparsity", "seed"]])
    of_pruner = x.set_axis(place)[(rows["pruner"] == pruner).to_numpy()].reindex(place)
    return _with_means(rows.assign(value=x / of_pruner.to_numpy(), dense_value=rows["dense_value"] * 0))


def one_per_cell(rows: pd.DataFrame) -> pd.DataFrame:
    """The newest row of each cell; `mean` and `std` are those of all its seeds."""
    return rows.drop_duplicates(CELL, keep="last")


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
