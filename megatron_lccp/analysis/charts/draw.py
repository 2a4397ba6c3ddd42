"""Charts -> matplotlib Figures, for PNG and SVG files and for W&B.

In: a Chart. Out: a Figure; render it with `style.figure_svg` or `figure_png`. What is drawn is the chart's frame.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.charts import style
from megatron_lccp.analysis.charts.chart import Chart, Curves, Line, Maps, Panel, checkpoint_text, tick_text

WIDE_IN = 9.2
MOST_MAPS = 8
DASHES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (10, 3)))
MARKERS = "oDs^X"


@style.styled
def draw(chart: Chart) -> Figure:
    """The chart as a Figure; of heat maps at most MOST_MAPS checkpoints of each run, evenly chosen to the last."""
    return _curves(chart) if isinstance(chart, Curves) else _maps(chart)


def _curves(chart: Curves) -> Figure:
    columns = min(2, len(chart.panels))
    figure, axes_list = _panels(len(chart.panels), columns, height=2.4)
    for axes, panel in zip(axes_list, chart.panels, strict=True):
        if panel.spans is not None:
            style.shade_stages(axes, panel.spans, names=True)
        for line in panel.lines:
            _line(axes, panel, line)
        axes.set_ylabel(panel.y_label)
        axes.set_title(panel.title)
        _scales(axes, panel)
        if sum(bool(line.label) for line in panel.lines):
            axes.legend(ncols=1 + (len(panel.lines) > 6))
    return figure


def _line(axes: Axes, panel: Panel, line: Line) -> None:
    x, y = (line.frame[name].to_numpy(float) for name in (panel.x, line.y))
    color = style.line_color(line.color)
    if line.low and line.high:
        low, high = (line.frame[name].to_numpy(float) for name in (line.low, line.high))
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    marker = MARKERS[line.dash] if line.marks else ""
    dash = DASHES[line.dash] if line.joined else ""
    axes.plot(x, y, color=color, marker=marker, linestyle=dash, label=line.label or None, clip_on=False)


def _scales(axes: Axes, panel: Panel) -> None:
    x, y = (
        pd.concat([line.frame[name] for line, name in ((line, by(line)) for line in panel.lines)]).to_numpy(float)
        for by in (lambda line: panel.x, lambda line: line.y)
    )
    x, y = x[np.isfinite(x)], y[np.isfinite(y)]
    axes.set_xlabel(panel.x_label)
    if panel.log_x and len(x) and x.min() > 0 and x.min() < x.max():
        axes.set_xscale("log")
        style.plain_log_ticks(axes.xaxis, x.min(), x.max())
    if panel.log_y and len(y) and y.min() > 0:
        axes.set_yscale("log")
        style.plain_log_ticks(axes.yaxis, y.min(), y.max())
    elif panel.zero:
        axes.set_ylim(bottom=0)
    if panel.y_scale == "share":
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if panel.x_scale == "tokens" and len(x):
        style.token_axis(axes, x.max(), panel.x_label)
    elif panel.x_scale in ("share", "length"):
        values = sorted(set(x))
        if len(values) <= 12:
            axes.xaxis.set_major_locator(FixedLocator(values))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value, panel.x_scale)))


def _maps(chart: Maps) -> Figure:
    starts = dict(chart.starts)
    points = pd.concat(
        [
            frames.pick_checkpoints(part, starts.get(run, 0), MOST_MAPS)
            for run, part in chart.frame.groupby("run", sort=False)
        ],
        ignore_index=True,
    )
    chosen = {tuple(point) for point in points[frames.CHECKPOINT].to_numpy()}
    grids = [found for found in chart.grids() if tuple(found[0]) in chosen]
    xs, ys = chart.axis(chart.x), chart.axis(chart.y)
    columns = _even(len(grids), most=min(4, max(2, int(WIDE_IN // (0.2 * len(xs) + 0.5)))))
    figure, axes_list = _panels(len(grids), columns, height=min(2.6, 0.55 + 0.165 * max(len(ys), 4)))
    low, high = chart.range()
    norm = (LogNorm if chart.log else Normalize)(low, high)
    cell_in = (figure.get_figwidth() / columns - 0.5) / len(xs)
    several = chart.frame["run"].nunique() > 1
    has_marks = chart.threshold is not None or any(marked.any() for *_, marked in grids)
    for axes, (point, grid, marked) in zip(axes_list, grids, strict=True):
        image = style.heat_map(axes, grid, norm, style.DIVERGING if chart.diverging else style.HEAT)
        title = checkpoint_text(point, several)
        if chart.threshold is not None:
            title += f": {int(marked.sum())} above {chart.threshold:g}"
        if has_marks:
            style.dot_cells(axes, marked, style.INK if chart.diverging else "#ffffff")
        elif cell_in > 0.22:
            style.write_cells(axes, image, grid, size=min(6.5, cell_in * 72 / 3.1))
        axes.set_title(title)
        _map_ticks(axes, chart, xs, ys, cell_in)
    figure.supxlabel(chart.x_label, fontsize=style.RC["font.size"])
    figure.supylabel(chart.y_label, fontsize=style.RC["font.size"])
    place: dict[str, Any] = {"location": "right", "pad": 0.01, "fraction": 0.03, "aspect": 30}
    bar = figure.colorbar(image, ax=axes_list, label=chart.value_label, **place)
    bar.outline.set_visible(False)
    bar.ax.grid(False)
    if chart.log:
        style.plain_log_ticks(bar.ax.yaxis, low, high)
    return figure


def _map_ticks(axes: Axes, chart: Maps, xs: list[float], ys: list[float], cell_in: float) -> None:
    for axis, values, scale, most in (
        (axes.xaxis, xs, chart.x_scale, 16), (axes.yaxis, ys, chart.y_scale, 6 if len(ys) > 8 else 8)
    ):  # fmt: skip
        if scale == "number" and len(values) > most:
            axis.set_major_locator(MaxNLocator(8, integer=True))
            continue
        every = max(1, math.ceil(len(values) / most))
        axis.set_ticks(range(0, len(values), every), [tick_text(value, scale) for value in values[::every]])
    if cell_in < 0.3 and chart.x_scale != "number":
        axes.tick_params(axis="x", labelrotation=90)


def _panels(n: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `n` panels of `height` inches, `columns` of them side by side."""
    rows = math.ceil(n / columns)
    width = WIDE_IN if columns > 1 else 0.62 * WIDE_IN
    figure = Figure(figsize=(width, rows * height + 0.35), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(n)]


def _even(n: int, most: int) -> int:
    """How many of `n` panels to set side by side, at most `most`, so that the rows are as full as can be."""
    return math.ceil(n / math.ceil(n / most))
