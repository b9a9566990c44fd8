"""Figures from the collector's frame (see cells.py). Matplotlib is imported only when a figure is asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from nnprune.report import labels
from nnprune.report.frame import dense_values, one_per_cell, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".pdf", ".svg")
# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6A00", "#444444"]
LINE_STYLES = ["-", ":", "-."]  # for the second and third eight pruners
PATTERN_MARKERS = "sD^vPX*"
HOLLOW = {"markerfacecolor": "none", "markeredgewidth": 1.5, "markersize": 7, "linestyle": "none", "zorder": 3}
GREY = "#666666"


def plot_sparsity(frame: pd.DataFrame, metric: str, path: Path) -> list[str]:
    """`metric` against sparsity, one panel a model, one line a pruner; returns the collector's warnings.

    Points are means over seeds, bars their standard deviation. N:M patterns are hollow markers at their fraction of zeros,
    1 - N/M; dense is a dashed line.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    rows, warnings = shown(frame[frame["metric"] == metric])
    cells = one_per_cell(rows)
    cells = cells[cells["mean"].map(math.isfinite) & (cells["mean"] > 0)]  # what a logarithmic axis can show
    dense, _ = dense_values(cells)
    if cells.empty:
        raise ValueError(f"no record has a positive, finite {metric} to draw; choose another with --metric")
    models = sorted(cells["model"].unique(), key=labels.model_key)
    pruned = cells[cells["pruner"] != labels.DENSE]
    pruners = sorted(pruned["pruner"].unique(), key=labels.pruner_key)
    styles = {p: (COLOURS[i % 8], LINE_STYLES[i // 8 % 3]) for i, p in enumerate(pruners)}
    patterns = sorted((s for s in pruned["sparsity"].unique() if ":" in s), key=labels.sparsity_key)
    shapes = {pattern: PATTERN_MARKERS[i % len(PATTERN_MARKERS)] for i, pattern in enumerate(patterns)}

    columns = 2 if len(models) == 4 else min(len(models), 3)
    lines = math.ceil(len(models) / columns)
    figure = Figure(figsize=(max(4.2 * columns, 5.4), 3.4 * lines + 0.7), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, model in zip(grid.flat, models, strict=False):
        panel = pruned[pruned["model"] == model]
        _draw_panel(axes, panel, styles, shapes, dense.get(model))
        axes.set_title(model, fontsize=11, fontweight="bold")
    for axes in grid.flat[len(models) :]:
        axes.set_visible(False)
    figure.supxlabel("sparsity", fontsize=10)
    figure.supylabel(metric.replace("_", " "), fontsize=10)
    handles = _legend(styles, shapes, bool(dense))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 3 * columns), frameon=False)
    figure.savefig(path, dpi=150)
    return warnings


def _draw_panel(axes: Axes, panel: pd.DataFrame, styles: dict, shapes: dict, dense: float | None) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for pruner, group in panel.groupby("pruner"):
        colour, dashes = styles[pruner]
        line = []
        for sparsity, mean, std in zip(group["sparsity"], group["mean"], group["std"], strict=True):
            kind, x, _ = labels.sparsity_key(sparsity)
            if kind == 2:  # what is neither a fraction nor N:M has no place on this axis
                continue
            if kind == 0:
                line.append((x, mean))
            else:
                axes.plot([x], [mean], color=colour, marker=shapes[sparsity], **HOLLOW)
            if std > 0:
                axes.errorbar([x], [mean], [std], color=colour, capsize=3, linewidth=1.2)
        if line:
            style = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 4.5, "linewidth": 1.6}
            axes.plot(*zip(*sorted(line), strict=True), **style)
    if dense is not None:
        axes.axhline(dense, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Within a decade or two a log axis has hardly a labelled tick: label 2 and 5 as well.
    subs = (1, 2, 5) if high / low < 300 else (1,)
    if high / low < 8:
        subs = (1, 1.5, 2, 3, 4, 5, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.margins(x=0.1)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(styles: dict, shapes: dict, has_dense: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linestyle=style, marker="o", markersize=4.5, label=labels.pretty_pruner(name))
        for name, (colour, style) in styles.items()
    ]
    if has_dense:
        handles.append(Line2D([], [], color=GREY, linestyle="--", label=labels.PRETTY[labels.DENSE]))
    return handles + [Line2D([], [], color=GREY, marker=shape, label=label, **HOLLOW) for label, shape in shapes.items()]
