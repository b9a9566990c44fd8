"""Plots from the collector's frame (see frame.py). Matplotlib is imported only when a plot is asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from nnprune.report import labels
from nnprune.report.escaping import distinct_names, shorten, visible
from nnprune.report.frame import CELL, dense_values, is_dense, newest_experiments

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
# Okabe and Ito's palette, which colour-blind readers can tell apart too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6A00", "#444444"]
LINE_STYLES = ["-", ":", "-."]  # for the second and third eight pruners
PATTERN_MARKERS = "sD^vPX*"
HOLLOW = {"markerfacecolor": "none", "markeredgewidth": 1.5, "markersize": 7, "linestyle": "none", "zorder": 3}
GREY = "#666666"
SMALLEST, LARGEST = 1e-30, 1e30  # what a logarithmic axis shows without overflow
LONGEST_NAME = 60  # characters, so that the legend leaves room for the panels


def plot_sparsity(frame: pd.DataFrame, metric: str, path: Path) -> list[str]:
    """Draw `metric` against sparsity to `path`, a panel for each model and a line for each pruner; returns warnings.

    Points are means over seeds, bars their standard deviation. N:M patterns are hollow markers at their fraction of zeros,
    1 - N/M; dense is a dashed line. Raises ValueError when there is nothing to draw, OSError when `path` cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    rows, warnings = newest_experiments(frame[frame["metric"] == metric])
    cells = rows.drop_duplicates(CELL, keep="last")  # `mean` and `std` are those over all seeds
    can_be_drawn = cells["mean"].between(SMALLEST, LARGEST)
    for *names, mean in cells.loc[~can_be_drawn, [*CELL, "mean"]].itertuples(index=False):
        warnings.append(f"{' / '.join(names)}: not drawn, a logarithmic axis cannot show {metric} {mean:g}")
    cells = cells[can_be_drawn]
    if cells.empty:
        raise ValueError(f"no record has a positive, finite {metric} to draw; choose another with --metric")
    dense = {model: value for model, value in dense_values(cells)[0].items() if SMALLEST <= value <= LARGEST}
    pruned = cells[~is_dense(cells)]
    pruners = sorted(pruned["pruner"].unique(), key=labels.pruner_key)
    styles = {p: (COLOURS[i % 8], LINE_STYLES[i // 8 % 3]) for i, p in enumerate(pruners)}
    patterns = sorted((s for s in pruned["sparsity"].unique() if ":" in s), key=labels.sparsity_key)
    names = distinct_names(pruners, _pretty_pruner, reserved=[_pretty_pruner(labels.DENSE), *patterns])
    shapes = {pattern: PATTERN_MARKERS[i % len(PATTERN_MARKERS)] for i, pattern in enumerate(patterns)}

    models = sorted(cells["model"].unique(), key=labels.model_key)
    titles = distinct_names(models, _short)
    columns = 2 if len(models) == 4 else min(len(models), 3)
    lines = math.ceil(len(models) / columns)
    figure = Figure(figsize=(max(4.2 * columns, 5.4), 3.4 * lines + 0.7), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels[len(models) :]:
        axes.set_visible(False)
    for axes, model in zip(panels, models, strict=False):
        _draw_panel(axes, pruned[pruned["model"] == model], styles, shapes, dense.get(model))
        axes.set_title(titles[model], fontsize=11, fontweight="bold", parse_math=False)
    figure.supxlabel("sparsity", fontsize=10)
    figure.supylabel(_short(metric.replace("_", " ")), fontsize=10, parse_math=False)
    _add_legend(figure, {names[pruner]: style for pruner, style in styles.items()}, shapes, bool(dense), 3 * columns)
    figure.savefig(path, dpi=150)
    return warnings


def _short(name: str) -> str:
    return shorten(visible(name), LONGEST_NAME)


def _pretty_pruner(label: str) -> str:
    return _short(labels.pretty_pruner(label))


def _draw_panel(axes: Axes, panel: pd.DataFrame, styles: dict, shapes: dict, dense: float | None) -> None:
    for pruner, group in panel.groupby("pruner"):
        colour, dashes = styles[pruner]
        line = []
        for sparsity, mean, std in zip(group["sparsity"], group["mean"], group["std"], strict=True):
            kind, x, _ = labels.sparsity_key(sparsity)
            if kind == labels.UNSTRUCTURED:
                line.append((x, mean))
            else:
                axes.plot([x], [mean], color=colour, marker=shapes[sparsity], **HOLLOW)
            if 0 < std <= LARGEST:
                axes.errorbar([x], [mean], [std], color=colour, capsize=3, linewidth=1.2)
        if line:
            style = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 4.5, "linewidth": 1.6}
            axes.plot(*zip(*sorted(line), strict=True), **style)
    if dense is not None:
        axes.axhline(dense, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
    _format_axes(axes)


def _format_axes(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Within a decade or two a logarithmic axis has hardly any labelled tick: label 2 and 5 as well.
    subs: tuple[float, ...] = (1, 2, 5) if high / low < 300 else (1,)
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


def _add_legend(figure: Figure, styles: dict, shapes: dict, has_dense: bool, columns: int) -> None:
    """Pruners, the dense line, N:M patterns."""
    from matplotlib.lines import Line2D

    handles = {
        name: Line2D([], [], color=colour, linestyle=style, marker="o", markersize=4.5)
        for name, (colour, style) in styles.items()
    }
    if has_dense:
        handles[labels.PRETTY[labels.DENSE]] = Line2D([], [], color=GREY, linestyle="--")
    handles |= {pattern: Line2D([], [], color=GREY, marker=shape, **HOLLOW) for pattern, shape in shapes.items()}
    # The names are set afterwards: of labels, Matplotlib omits those that begin with _ and reads $ as mathematics.
    numbers = [str(i) for i in range(len(handles))]
    columns = max(min(len(handles), columns), 1)
    legend = figure.legend(list(handles.values()), numbers, loc="outside upper center", ncols=columns, frameon=False)
    for text, name in zip(legend.get_texts(), handles, strict=True):
        text.set(text=name, parse_math=False)
