"""Plots from the collector's frame (see frame.py). Matplotlib is imported only when a plot is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd

from nnprune.report import labels
from nnprune.report.dense import dense_values
from nnprune.report.escaping import distinct_names
from nnprune.report.frame import CELL, is_dense, with_setting
from nnprune.report.metrics import higher_is_better, pretty_metric
from nnprune.report.panels import LARGEST, Styles, draw_bars, draw_lines, draw_pareto, draw_setting, format_axes, short
from nnprune.report.tables import select, sparsity_names
from nnprune.report.variants import plain_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
GREY = "#666666"
SMALLEST = 1e-30  # what a logarithmic axis shows without overflow, up to LARGEST
KINDS = ("sparsity", "pareto")


@dataclass
class Panel:
    """One pair of axes: its title, its cells, and the function that draws them."""

    title: str
    cells: pd.DataFrame
    draw: Callable[[Axes, pd.DataFrame, Styles], None]
    dense: float | None


def plot(
    frame: pd.DataFrame, metric: str, kind: str = "sparsity", by: str | None = None, **filters: list[str] | None
) -> tuple[Figure, list[str]]:
    """A figure of `metric`, and warnings. Filters are those of tables.py.

    `sparsity`: for each model lines over fractions of zeros, where it has more than one, and bars for N:M patterns beside the
    fraction that has as many zeros. `pareto`: a panel for each model and sparsity, `metric` against seconds; the dashed line
    joins the methods that none beats in both. `by`: a panel for each model and sparsity, lines over a setting that is a number.

    Values are means over seeds, bars at them their standard deviation; the dense model is a dashed line. Raises ValueError when
    there is nothing to draw.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    rows = frame[frame["metric"] == metric]
    warnings: list[str] = []
    if by:
        rows, warnings = with_setting(rows, by)
    rows, more = select(rows, metric, filters, by)
    rows["seconds"] = rows.groupby([*CELL, *(["by"] if by else [])])["seconds"].transform("mean")
    cells = rows.drop_duplicates([*CELL, *(["by"] if by else [])], keep="last")  # `mean` and `std` are those over all seeds
    cells, lines = _drawable(cells, metric, kind)
    dense = {model: value for model, value in dense_values(cells)[0].items() if _is_drawable(value, metric)}
    pruned = cells[~is_dense(cells)]
    styles = Styles(pruned)
    panels = _panels(cells, pruned, kind, by, dense)
    across = 4 if len(panels) == 8 else 2 if len(panels) in (2, 4) else min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(max(4.2 * across, 5.4), 3.4 * down + 0.7), layout="constrained")
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw(axes, panel.cells, styles)
        if panel.dense is not None:
            axes.axhline(panel.dense, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
        axes.set_title(panel.title, fontsize=11, fontweight="bold", parse_math=False)
        format_axes(axes, _is_linear(metric))
    x_title = by or ("seconds" if kind == "pareto" else "sparsity")
    figure.supxlabel(short(x_title), fontsize=10, parse_math=False)
    figure.supylabel(short(pretty_metric(metric)), fontsize=10, parse_math=False)
    _add_legend(figure, styles, bool(dense), max(3 * across, 4))
    return figure, warnings + more + lines


def _drawable(cells: pd.DataFrame, metric: str, kind: str) -> tuple[pd.DataFrame, list[str]]:
    """The cells that the axes can show, and a line for each other. Raises ValueError when there are none."""
    can_be_drawn = cells["mean"].map(lambda value: _is_drawable(value, metric))
    axis = "an axis" if _is_linear(metric) else "a logarithmic axis"
    lines = [
        f"{model} / {plain_method(method)} / {sparsity}: not drawn, {axis} cannot show {metric} {mean:g}"
        for model, method, sparsity, mean in cells.loc[~can_be_drawn, [*CELL, "mean"]].itertuples(index=False)
    ]
    if kind == "pareto":
        has_time = (cells["seconds"] > 0) | is_dense(cells)
        lines += [f"{path}: not drawn, its record has no seconds" for path in cells.loc[can_be_drawn & ~has_time, "path"]]
        can_be_drawn &= has_time
    if not can_be_drawn.any():
        kind_of = "finite" if _is_linear(metric) else "positive, finite"
        raise ValueError(f"no record has a {kind_of} {metric} to draw; choose another with --metric")
    return cells[can_be_drawn], lines


def _is_drawable(value: float, metric: str) -> bool:
    return abs(value) <= LARGEST if _is_linear(metric) else SMALLEST <= value <= LARGEST


def _is_linear(metric: str) -> bool:
    """Whether its axis is linear: a metric that is not known as a loss may be 0 or less."""
    return higher_is_better(metric) is not False


def _panels(cells: pd.DataFrame, pruned: pd.DataFrame, kind: str, by: str | None, dense: dict[str, float]) -> list[Panel]:
    models = sorted(cells["model"].unique(), key=labels.model_key)
    titles, panels = distinct_names(models, short), []
    for model in models:
        of_model = pruned[pruned["model"] == model]
        if kind == "pareto" or by:
            draw = partial(draw_setting, key=by) if by else draw_pareto
            for sparsity, name in sparsity_names(of_model).items():
                of_sparsity = of_model[of_model["sparsity"] == sparsity]
                panels.append(Panel(f"{titles[model]}, {name}", of_sparsity, draw, dense.get(model)))
            continue
        kinds = of_model["sparsity"].map(lambda one: labels.sparsity_key(one)[0])
        zeros = of_model["sparsity"].map(lambda one: labels.sparsity_key(one)[1])
        fractions, patterns = of_model[kinds == labels.UNSTRUCTURED], of_model[kinds == labels.N_OF_M]
        has_lines = fractions["sparsity"].nunique() > 1 or of_model.empty
        if has_lines:
            panels.append(Panel(titles[model], fractions, draw_lines, dense.get(model)))
        if not of_model.empty and (not has_lines or not patterns.empty):
            same = fractions[zeros[fractions.index].isin(zeros[patterns.index])] if has_lines else fractions
            panels.append(Panel(titles[model], pd.concat([same, patterns]), draw_bars, dense.get(model)))
    if not panels:
        raise ValueError("no pruned model to draw; leave --kind and --by out, or prune one")
    return panels


def _add_legend(figure: Figure, styles: Styles, has_dense: bool, columns: int) -> None:
    """Methods, and the dense line."""
    from matplotlib.lines import Line2D

    handles = {
        styles.names[method]: Line2D(
            [], [], color=styles.colour[method], linestyle=styles.dashes[method], marker="o", markersize=4.5
        )
        for method in styles.methods
    }
    if has_dense:
        handles[labels.PRETTY[labels.DENSE]] = Line2D([], [], color=GREY, linestyle="--")
    # The names are set afterwards: of labels, Matplotlib omits those that begin with _ and reads $ as mathematics.
    numbers = [str(i) for i in range(len(handles))]
    columns = max(min(len(handles), columns), 1)
    legend = figure.legend(list(handles.values()), numbers, loc="outside upper center", ncols=columns, frameon=False)
    for text, name in zip(legend.get_texts(), handles, strict=True):
        text.set(text=name, parse_math=False)
