"""What is in one pair of axes of a plot: lines, bars or points."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd

from nnprune.report import labels
from nnprune.report.escaping import distinct_names, shorten, visible
from nnprune.report.metrics import higher_is_better
from nnprune.report.tables import sparsity_names
from nnprune.report.variants import method_key, plain_method, pretty_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6A00", "#444444"]
LINE_STYLES = ["-", ":", "-."]  # for the second and third eight pruners
HATCHES = ["", "//", ".."]
MARKERS = "osD"
LARGEST = 1e30
LONGEST_NAME = 60  # characters, so that the legend leaves room for the panels


def short(name: str) -> str:
    return shorten(visible(name), LONGEST_NAME)


def _pretty(method: str) -> str:
    return short(pretty_method(method))


def _plain(method: str) -> str:
    return short(plain_method(method))


class Styles:
    """Method -> its colour and line, and its name in the legend."""

    def __init__(self, pruned: pd.DataFrame) -> None:
        self.methods = sorted(pruned["method"].unique(), key=method_key)
        self.names = distinct_names(self.methods, _pretty, _plain, reserved=[short(labels.PRETTY[labels.DENSE])])
        self.colour = {method: COLOURS[i % 8] for i, method in enumerate(self.methods)}
        self.dashes = {method: LINE_STYLES[i // 8 % 3] for i, method in enumerate(self.methods)}
        self.hatch = {method: HATCHES[i // 8 % 3] for i, method in enumerate(self.methods)}


def draw_lines(axes: Axes, cells: pd.DataFrame, styles: Styles) -> None:
    """A line for each method over fractions of zeros."""
    _lines(axes, cells, styles, cells["sparsity"].map(lambda one: labels.sparsity_key(one)[1]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def draw_setting(axes: Axes, cells: pd.DataFrame, styles: Styles, key: str) -> None:
    """A line for each method over the numbers of a setting. Raises ValueError for one that is no number."""
    numbers = pd.to_numeric(cells["by"], errors="coerce")
    if numbers.isna().any():
        value = cells["by"][numbers.isna()].iloc[0]
        raise ValueError(f"--by {key}: {shorten(visible(value), 40)} is no number; make a table of it, without --plot")
    _lines(axes, cells, styles, numbers)
    if numbers.min() > 0 and numbers.max() >= 20 * numbers.min():
        axes.set_xscale("log")


def _lines(axes: Axes, cells: pd.DataFrame, styles: Styles, x: pd.Series) -> None:
    for method, group in cells.assign(x=x).sort_values("x").groupby("method"):
        style = {"color": styles.colour[method], "linestyle": styles.dashes[method]}
        axes.plot(group["x"], group["mean"], marker="o", markersize=4.5, linewidth=1.6, **style)
        spread = group[group["std"].between(0, LARGEST, inclusive="right")]
        axes.errorbar(
            spread["x"], spread["mean"], spread["std"], color=style["color"], capsize=3, linewidth=1.2, linestyle="none"
        )


def draw_bars(axes: Axes, cells: pd.DataFrame, styles: Styles) -> None:
    """A group of bars for each pattern, a bar for each method."""
    groups = sparsity_names(cells)
    methods = [method for method in styles.methods if method in set(cells["method"])]
    width = 0.84 / len(methods)
    for place, method in enumerate(methods):
        of_method = cells[cells["method"] == method]
        x = [list(groups).index(one) + (place - (len(methods) - 1) / 2) * width for one in of_method["sparsity"]]
        std = of_method["std"].where(of_method["std"] <= LARGEST, 0).fillna(0)
        options = {"color": styles.colour[method], "hatch": styles.hatch[method], "edgecolor": "white", "linewidth": 0.5}
        axes.bar(x, of_method["mean"], width, yerr=std if std.any() else None, capsize=3, **options)
    axes.set_xticks(range(len(groups)), [short(name) for name in groups.values()], parse_math=False)


def draw_pareto(axes: Axes, cells: pd.DataFrame, styles: Styles) -> None:
    """A point for each method, and, if the direction of the metric is known, a line through those that none beats in both time and
    metric, but for those that tune the whole model."""
    is_higher = higher_is_better(cells["metric"].iloc[0])
    sign = -1 if is_higher else 1
    front, best = [], math.inf
    columns = ["seconds", "mean", "method", "whole_model"]
    for seconds, mean, method, is_whole in cells.sort_values("seconds")[columns].itertuples(index=False):
        marker = MARKERS[styles.methods.index(method) // 8 % 3]
        axes.plot([seconds], [mean], color=styles.colour[method], marker=marker, markersize=7, linestyle="none", zorder=3)
        if sign * mean < best and not is_whole and is_higher is not None:
            best = sign * mean
            front.append((seconds, mean))
    if front:
        axes.plot(*zip(*front, strict=True), color="#BBBBBB", linestyle=":", linewidth=1.4, zorder=2)
    axes.set_xscale("log")


def format_axes(axes: Axes, is_linear: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    if not is_linear:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        # Within a decade or two a logarithmic axis has hardly any labelled tick: label 2 and 5 as well.
        subs: tuple[float, ...] = (1, 2, 5) if high / low < 300 else (1,)
        if high / low < 8:
            subs = (1, 1.5, 2, 3, 4, 5, 6, 8)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1)
    axes.grid(True, which="major", axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
