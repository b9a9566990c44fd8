"""Perplexities relative to those of one pruner."""

import math

import pandas as pd

from nnprune.report.frame import CELL, with_seed_statistics
from nnprune.report.variants import plain_method


def relative_to(rows: pd.DataFrame, pruner: str) -> pd.DataFrame:
    """Rows of one perplexity with each value x divided by the x of `pruner` at the same model, sparsity and seed.

    x = ln(perplexity / dense perplexity). The result is 0 for the dense model, 1 for `pruner` itself, and NaN where `pruner`
    has no record, or is no worse than the dense model. `rows` are those of `newest_experiments`.
    """
    ratios = rows["value"] / rows["dense_value"]
    x = ratios.map(lambda ratio: math.log(ratio) if ratio > 0 else math.nan)
    reference = _of_pruner(x, rows, pruner)
    return with_seed_statistics(rows.assign(value=x / reference.where(reference > 0), dense_value=rows["dense_value"] * 0))


def other_tokens(rows: pd.DataFrame, pruner: str) -> list[str]:
    """A line for each method and sparsity that was calibrated on other tokens than `pruner`, with the same seed."""
    hashes = rows["record"].map(lambda record: record["calibration_hash"])
    reference = _of_pruner(hashes, rows, pruner)
    others = rows[hashes.notna() & reference.notna() & (hashes != reference)]
    return [
        f"{model} / {plain_method(method)} / {sparsity}: calibrated on other tokens than {pruner}, so they do not compare"
        for model, method, sparsity in others[CELL].drop_duplicates().itertuples(index=False)
    ]


def _of_pruner(values: pd.Series, rows: pd.DataFrame, pruner: str) -> pd.Series:
    """For each of `rows` the value that `pruner` has at the same model, sparsity and seed; NaN without one.

    Of a pruner's variants it is that with the most seeds, of several the newest.
    """
    own = rows[rows["pruner"] == pruner]
    by_seeds = own.loc[own.groupby(CELL)["seed"].transform("size").sort_values(kind="stable").index]
    own = own[own["method"] == by_seeds.groupby(["model", "sparsity"])["method"].transform("last").reindex(own.index)]
    place = ["model", "sparsity", "seed"]
    found = values[own.index].set_axis(pd.MultiIndex.from_frame(own[place]))
    found = found[~found.index.duplicated(keep="last")].reindex(pd.MultiIndex.from_frame(rows[place]))
    return pd.Series(found.to_numpy(), rows.index)
