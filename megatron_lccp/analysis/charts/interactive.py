"""Charts -> what the page's script draws with plotly.js: traces and layouts, as plain JSON.

In: a Chart. Out: a dict. Numbers keep six digits; a value that is not finite keeps its meaning: None is missing, HUGE
infinite. Colours of text and lines of axes are left to the page's style sheet, which knows light, dark and paper.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.charts import style
from megatron_lccp.analysis.charts.chart import Chart, Curves, Line, Maps, Panel, checkpoint_text, tick_text

HUGE = 1e308
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x")
LOG_DIGITS = (
    range(10, 100), (10, 15, 20, 25, 30, 40, 50, 60, 80), (10, 15, 20, 30, 50, 70), (10, 20, 50), (10, 30), (10,)
)  # fmt: skip
VIRIDIS = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725")
DIVERGING = ("#2d004b", "#8073ac", "#d8daeb", "#f7f7f7", "#fee0b6", "#e08214", "#7f3b08")


def payload(chart: Chart) -> dict[str, Any]:
    """What the page's script needs to draw the chart."""
    if isinstance(chart, Curves):
        return {"kind": "curves", "panels": [_panel(panel) for panel in chart.panels]}
    return _maps(chart)


def numbers(values: Any) -> list[float | None]:
    """Numbers for JSON: six digits, None where there is none, HUGE for infinity."""
    found: list[float | None] = []
    for value in np.asarray(values, dtype=float).ravel():
        if math.isnan(value):
            found.append(None)
        elif math.isinf(value):
            found.append(math.copysign(HUGE, value))
        else:
            short = float(f"{value:.6g}")
            found.append(int(short) if short.is_integer() and abs(short) < 1e15 else short)
    return found


# --- curves --------------------------------------------------------------------------------------------------------


def _panel(panel: Panel) -> dict[str, Any]:
    traces = [trace for line in panel.lines for trace in _traces(panel, line)]
    layout: dict[str, Any] = {"xaxis": _x_axis(panel), "yaxis": _y_axis(panel)}
    layout["showlegend"] = any(line.label for line in panel.lines)
    if panel.spans is not None and len(panel.spans) > 1:
        layout["shapes"] = [
            {"type": "line", "xref": "x", "x0": start, "x1": start, "yref": "paper", "y0": 0, "y1": 1,
             "line": {"width": 1, "dash": "dot"}}
            for start in panel.spans["tokens_from"].iloc[1:].tolist()
        ]  # fmt: skip
        layout["annotations"] = [
            {"x": span.tokens_from, "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "bottom",
             "text": _safe(span.stage), "showarrow": False, "font": {"size": 11}}
            for span in panel.spans.itertuples()
        ]  # fmt: skip
    return {"title": panel.title, "traces": traces, "layout": layout}


def _traces(panel: Panel, line: Line) -> list[dict[str, Any]]:
    color = style.line_color(line.color)
    x = numbers(line.frame[panel.x])
    found = []
    known = line.frame.dropna(subset=[line.low, line.high]) if line.low and line.high else line.frame[:0]
    if len(known) and not np.array_equal(known[line.low], known[line.high]):
        at, low, high = (numbers(known[name]) for name in (panel.x, line.low, line.high))
        band = {"x": at + at[::-1], "y": high + low[::-1], "fill": "toself", "fillcolor": color + "33", "mode": "lines"}
        found.append(band | {"line": {"width": 0}, "hoverinfo": "skip", "showlegend": False})
    mode = "+".join(["lines"] * line.joined + ["markers"] * (line.marks or len(x) == 1)) or "markers"
    found.append(
        {
            "x": x, "y": numbers(line.frame[line.y]), "name": _safe(line.label), "mode": mode,
            "hovertemplate": _hover(panel),
            "line": {"color": color, "width": 2, "dash": DASHES[line.dash]},
            "marker": {"color": color, "size": 6, "symbol": SYMBOLS[line.dash]},
        }
    )  # fmt: skip
    return found


def _hover(panel: Panel) -> str:
    value = "%{y:.1%}" if panel.y_scale == "share" else "%{y:.4~g}"
    return f"{value}<extra>%{{fullData.name}}</extra>"


def _x_axis(panel: Panel) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": panel.x_label}, "type": "log" if panel.log_x else "linear"}
    values = sorted({value for line in panel.lines for value in numbers(line.frame[panel.x]) if value is not None})
    if panel.x_scale == "tokens" and panel.log_x and values:
        shown = log_ticks(values[0], values[-1])
        return axis | {"tickvals": shown, "ticktext": [tick_text(value, "tokens") for value in shown]}
    if panel.x_scale == "tokens":
        return axis | {"exponentformat": "B"}
    shown = values if len(values) <= 12 else values[:: math.ceil(len(values) / 12)]
    return axis | {"tickvals": shown, "ticktext": [tick_text(value, panel.x_scale) for value in shown]}


def _y_axis(panel: Panel) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": panel.y_label}, "type": "log" if panel.log_y else "linear"}
    if panel.y_scale == "share":
        return axis | {"range": [-0.02, 1.02], "tickformat": ".0%"}
    if panel.zero:
        axis["rangemode"] = "tozero"
    values = [value for line in panel.lines for value in numbers(line.frame[line.y]) if value and 0 < value < HUGE]
    if panel.log_y and values:
        shown = log_ticks(min(values), max(values))
        return axis | {"tickvals": shown, "ticktext": [f"{value:g}" for value in shown]}
    return axis | {"exponentformat": "B"}


# --- heat maps -----------------------------------------------------------------------------------------------------


def _maps(chart: Maps) -> dict[str, Any]:
    grids = list(chart.grids())
    points = pd.DataFrame([point for point, *_ in grids]).reset_index(drop=True)
    several = points["run"].nunique() > 1
    low, high = chart.range()
    xs, ys = chart.axis(chart.x), chart.axis(chart.y)
    maps = [
        {
            "label": checkpoint_text(point, several),
            "values": [numbers(line) for line in grid],
            "marked": np.argwhere(marked).tolist(),
        }
        for point, grid, marked in grids
    ]
    return {
        "kind": "maps", "x": [tick_text(value, chart.x_scale) for value in xs],
        "y": [tick_text(value, chart.y_scale) for value in ys], "xLabel": chart.x_label, "yLabel": chart.y_label,
        "valueLabel": chart.value_label, "log": chart.log, "threshold": chart.threshold, "range": numbers([low, high]),
        "ticks": log_ticks(low, high) if chart.log else None, "maps": maps,
        "colors": list(DIVERGING if chart.diverging else VIRIDIS), "signed": chart.diverging,
    } | _stops(points, dict(chart.starts) or None)  # fmt: skip


def _stops(points: pd.DataFrame, starts: dict[str, int] | None) -> dict[str, Any]:
    """What the slider does: `fixed`, the map that stays, and for each stop the maps that are shown.

    A run alone has a stop for every checkpoint, beside the one that its LCCP started from (`starts`: run to tokens).
    Runs side by side have one for all token counts of any of them; each shows its last checkpoint until then.
    """
    if points["run"].nunique() == 1:
        stops = [{"tokens": int(point.tokens), "show": [k]} for k, point in enumerate(points.itertuples())]
        if starts is None or len(points) == 1:
            return {"fixed": [], "stops": stops}
        start = frames.start_checkpoint(points, starts.get(points["run"].iloc[0], 0)).index[0]
        return {"fixed": [int(start)], "stops": stops}
    stops = []
    for tokens in sorted(points["tokens"].unique()):
        show = []
        for _, own in points.groupby("run", sort=False):
            until = own[own["tokens"] <= tokens]
            show.append(int((until if len(until) else own.head(1)).index[-1]))
        stops.append({"tokens": int(tokens), "show": show})
    return {"fixed": [], "stops": stops}


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a log scale, from three to seven of them between its ends where there are such."""
    found: list[float] = []
    for digits in LOG_DIGITS:
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        found = [float(f"{digit}e{power - 1}") for power in powers for digit in digits]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= 7:
            break
    return found or [value for value in numbers([low, high]) if value is not None]


def _safe(text: str) -> str:
    """Text for plotly, which reads a little HTML in labels."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
