"""How a measure without a file of its own is shown: by the axes, series and bounds that its metric declares.

In: a Measure of some runs. Out: a frame, figures, tables, highlights, scalars and signals. No axis gives a curve over training
tokens, one gives curves over the axis, two give a heat map of every checkpoint; what differs besides is averaged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from math import inf

import pandas as pd

from megatron_lccp.analysis.charts.chart import Chart, Curves, Maps, NothingToDraw, Panel, Scale
from megatron_lccp.analysis.charts.parts import (
    SHOWN_CURVES,
    is_wide,
    lines_of_checkpoints,
    lines_of_runs,
    n_text,
    over_tokens,
    panels_of_runs,
    picked,
    starts_of,
    whole,
)
from megatron_lccp.analysis.frames import CHECKPOINT, at_checkpoint, checkpoints, means
from megatron_lccp.analysis.measured.columns import WHERE, Column, count_cell, number_cell, table
from megatron_lccp.analysis.measured.highlight import Highlight, change_highlight, on_samples, start_and_end
from megatron_lccp.analysis.measured.shown import Figure
from megatron_lccp.analysis.measured.signal import Signal, of_means, of_samples
from megatron_lccp.analysis.run import OF_A_HEAD, Measure, Run, Runs
from megatron_lccp.analysis.statistics.paired import CLUSTER, Paired, paired
from megatron_lccp.text import count_text, length_text, number_text, path_text


def numbers(run: Run, measure: Measure) -> pd.DataFrame:
    """The measure by checkpoint, axes and series: value (the mean), rows (how many are behind it), and `label`, which
    tells the series apart."""
    return run.derived(_numbers, measure)


def _numbers(run: Run, measure: Measure) -> pd.DataFrame:
    rows, axes, series = _rows_of(run, measure), _axes(run, measure), _series(run, measure)
    found = means(rows.rename(columns={"n": "_averaged"}), [*CHECKPOINT, *axes, *series], ["value", "_averaged"])
    found, averaged = found.rename(columns={"n": "rows"}), found["_averaged"]
    found = found.drop(columns="_averaged")
    if _is_of_heads(measure):  # rows that were averaged already
        found["rows"] = (found["rows"] * averaged).round().astype(int)
    found = found.dropna(subset=axes).reset_index(drop=True)
    return found.assign(label=_labels(found, series))


def _rows_of(run: Run, measure: Measure) -> pd.DataFrame:
    source = run.head_means if _is_of_heads(measure) else run.rows
    rows = source[(source["monitor"] == measure.monitor) & (source["metric"] == measure.metric.name)]
    return rows.assign(**{name: None for name in (*measure.metric.axes, *measure.metric.series) if name not in rows})


def _is_of_heads(measure: Measure) -> bool:
    return {*measure.metric.axes} >= OF_A_HEAD


def _axes(run: Run, measure: Measure) -> list[str]:
    """The axes that are numbers and were measured; names cannot be drawn over."""
    rows = _rows_of(run, measure)
    return [
        name for name in measure.metric.axes
        if rows[name].notna().any() and pd.api.types.is_numeric_dtype(rows[name].infer_objects())
    ]  # fmt: skip


def _series(run: Run, measure: Measure) -> list[str]:
    """The coordinates that tell series apart: those declared, and axes that are names; one value alone is no series."""
    rows, axes = _rows_of(run, measure), _axes(run, measure)
    names = [name for name in (*measure.metric.axes, *measure.metric.series) if name not in axes]
    return [name for name in names if rows[name].nunique() > 1] or [n for n in names if rows[n].notna().any()][:1]


def _labels(frame: pd.DataFrame, series: list[str]) -> pd.Series:
    """`code, lag 64` for each line: values of the series, with the name of those that are numbers."""
    parts = [frame[name].map(lambda value, name=name: _place_text(name, value)) for name in series]
    if not parts:
        return pd.Series("", index=frame.index)
    return parts[0].str.cat(parts[1:], sep=", ") if len(parts) > 1 else parts[0]


def _place_text(name: str, value: object) -> str:
    if value is None or value is pd.NA or value != value:
        return ""
    if isinstance(value, str):
        return value
    return f"{_words(name)} {_coordinate(name)(value)}"


def _words(name: str) -> str:
    """`lag_tok` as people read it: lag (tokens); `first_nll`: first NLL."""
    words = [word.upper() if word in ("nll", "ppl") else word for word in name.removesuffix("_tok").split("_")]
    return " ".join(words) + (" (tokens)" if name.endswith("_tok") else "")


def _coordinate(name: str):
    return length_text if name.endswith("_tok") else lambda value: f"{value:g}"


def _scale(name: str) -> Scale:
    return "length" if name.endswith("_tok") else "number"


def title_of(measure: Measure) -> str:
    """CopyBack: second NLL."""
    return f"{measure.monitor}: {_words(measure.metric.name)}"


def _key(measure: Measure, label: str = "") -> str:
    return "-".join(
        re.sub(r"[^\w.]+", "-", part).strip("-") for part in (measure.monitor, measure.metric.name, label) if part
    )


def _value_label(measure: Measure) -> str:
    unit = measure.metric.unit
    return f"{_words(measure.metric.name)}{'' if unit in ('count', '') else f' ({unit})'}"


def _y_options(measure: Measure, values: pd.Series) -> dict:
    if measure.metric.unit == "share" and measure.metric.bounds == (0.0, 1.0):
        return {"y_scale": "share"}
    return {"log_y": measure.metric.bounds[0] is not None and is_wide(values)}


def _caption(measure: Measure, frame: pd.DataFrame) -> str:
    m = measure.metric
    better = {"higher": "Higher is better.", "lower": "Lower is better.", None: ""}[m.better]
    low, high = (None if bound is None else f"{bound:g}" for bound in m.bounds)
    bounds = {
        (False, False): f"From {low} to {high}.", (False, True): f"{low} or more.", (True, False): f"{high} or less.",
    }.get((low is None, high is None), "")  # fmt: skip
    once, rows = frame["rows"].max() == 1, n_text(frame, "rows")
    behind = "Each value was measured once" if once else f"A value is the mean of {rows} rows"
    behind += f"; {count_text(len(checkpoints(frame)), 'checkpoint')}."
    return " ".join(filter(None, (m.about, bounds, better, behind)))


# --- figures -------------------------------------------------------------------------------------------------------


def generic_figures(runs: Runs, measure: Measure) -> Iterator[Figure]:
    """One figure; of heat maps one for each series."""
    level, axes = measure.metric.level or "training", max((_axes(run, measure) for run in runs), key=len)
    if len(axes) < 2:
        yield Figure(_key(measure), title_of(measure), level, partial(_curves, measure), of_window=len(axes) == 1)
        return
    labels = dict.fromkeys(label for run in runs for label in numbers(run, measure)["label"])
    for label in labels:
        title = title_of(measure) + (f" ({label})" if len(labels) > 1 else "")
        chart = partial(_maps, measure, label)
        yield Figure(_key(measure, label if len(labels) > 1 else ""), title, level, chart, of_window=True)


def _curves(measure: Measure, runs: Runs) -> Chart:
    frame = whole((numbers(run, measure) for run in runs), f"{title_of(measure)}: no rows.")
    axes = max((_axes(run, measure) for run in runs), key=len)
    options = _y_options(measure, frame["value"])
    labels = list(dict.fromkeys(frame["label"]))
    if not axes:
        lines = []
        for color, label in enumerate(labels):
            lines += lines_of_runs(runs, frame[frame["label"] == label], "value", label, color)
        return Curves(
            "", "", _caption(measure, frame), frame, (over_tokens(runs, lines, _value_label(measure), **options),)
        )

    def panels_of(run: Run, shown: pd.DataFrame) -> Iterator[Panel]:
        for label in dict.fromkeys(shown["label"]):
            part = shown[shown["label"] == label].sort_values(["tokens", "step", axes[0]], kind="stable")
            yield Panel(
                axes[0], _words(axes[0]), _value_label(measure), lines_of_checkpoints(part, "value"),
                label if len(labels) > 1 else "", _scale(axes[0]), log_x=is_wide(part[axes[0]].astype(float), 8), **options,
            )  # fmt: skip

    _, panels = panels_of_runs(runs, lambda run: numbers(run, measure), panels_of)
    return Curves("", "", f"{_caption(measure, frame)} {SHOWN_CURVES}", frame, panels)


def _maps(measure: Measure, label: str, runs: Runs) -> Chart:
    frame = whole((numbers(run, measure) for run in runs), f"{title_of(measure)}: no rows.")
    frame = frame[frame["label"] == label]
    if not len(frame):
        raise NothingToDraw(f"{title_of(measure)} ({label}): no rows.")
    x, y = measure.metric.axes
    low, high = measure.metric.bounds
    signed = low is not None and low < 0 and low == -(high or 0)
    if signed:  # colours to both sides of 0; without intervals no cell is marked
        frame = frame.assign(low=0.0, high=0.0)
    return Maps(
        "", "", _caption(measure, frame), frame, x, y, "value", _words(x), _words(y), _value_label(measure),
        _scale(x), _scale(y), log=not signed and measure.metric.unit in ("ppl", "nat") and is_wide(frame["value"]),
        diverging=signed, starts=starts_of(runs),
    )  # fmt: skip


# --- numbers -------------------------------------------------------------------------------------------------------


def generic_tables(run: Run, measure: Measure) -> Iterator[str]:
    """The numbers behind the figure; with axes, of the checkpoints that it shows."""
    frame = numbers(run, measure)
    axes, series = _axes(run, measure), _series(run, measure)
    if axes and len(frame):
        frame = picked(run, frame)
    if OF_A_HEAD <= {*axes}:  # thousands of heads: the best of each checkpoint
        frame = frame.sort_values("value", ascending=False, kind="stable").groupby(CHECKPOINT, sort=False).head(10)
    columns = (
        *WHERE,
        *(Column(_words(name), name, lambda v: v if isinstance(v, str) else f"{v:g}", "text") for name in series),
        *(Column(_words(name), name, _coordinate(name)) for name in axes),
        Column(_value_label(measure), "value", number_cell),
        Column("rows", "rows", count_cell),
    )
    yield table(f"t-{_key(measure)}", title_of(measure), frame, columns)


def generic_scalars(run: Run, measure: Measure) -> dict[str, float]:
    """The mean over all axes at the last checkpoint, of each series."""
    frame = numbers(run, measure)
    if not len(frame):
        return {}
    last = at_checkpoint(frame, checkpoints(frame).iloc[-1])
    several = last["label"].nunique() > 1 or (last["label"] != "").all()
    return {
        f"{measure.monitor}/{measure.metric.name}{f'_{path_text(label)}' if several and label else ''}": value
        for label, value in last.groupby("label", sort=False)["value"].mean().items()
    }


def generic_highlights(run: Run, measure: Measure) -> Iterator[Highlight]:
    """The mean over all axes, from the start of the LCCP to its last checkpoint, of each series."""
    m = measure.metric
    frame = numbers(run, measure)
    for label in dict.fromkeys(frame["label"]):
        part = means(frame[frame["label"] == label], CHECKPOINT, ["value"])
        first, last = start_and_end(part, run)
        share = m.unit == "share"
        text = (lambda value: f"{100 * value:.1f} %") if share else number_text
        difference = (lambda value: f"{100 * value:+.1f} points") if share else (lambda v: f"{v:+.3g} {m.unit}")
        cells = int(last["n"].iloc[0])
        note = f"mean over {count_text(cells, 'cell')}" if cells > 1 else m.about.rstrip(".")
        least, largest = m.bounds
        most = inf if least is None or largest is None else largest - least
        change = on_samples(_samples(run, measure, label), first, last, difference, most=most)
        name = title_of(measure) + (f" ({label})" if label else "")
        yield change_highlight(name, first, last, "value", note, change, text, ratio=False)


# --- signals -------------------------------------------------------------------------------------------------------


def _samples(run: Run, measure: Measure, label: str) -> Paired:
    """The rows of one series, paired over samples; empty where there are none."""
    if _is_of_heads(measure):
        return paired(run.rows.head(0), ["monitor"])
    rows, series = _rows_of(run, measure), _series(run, measure)
    rows = rows[_labels(rows, series) == label]
    return paired(rows if rows[CLUSTER[-1]].notna().any() else rows.head(0), _axes(run, measure) or ["monitor"])


def generic_signals(run: Run, measure: Measure) -> Iterator[Signal]:
    """The mean over all axes of each series, with its samples where rows have any; none without a better way."""
    m = measure.metric
    if m.better is None or m.level is None:
        return
    frame = numbers(run, measure)
    for label in dict.fromkeys(frame["label"]):
        name = f"{measure.monitor}.{m.name}" + (f"[{label}]" if label and len(set(frame["label"])) > 1 else "")
        found = _samples(run, measure, label)
        means_k = means(frame[frame["label"] == label], CHECKPOINT, ["value"])
        yield of_samples(name, m, found) if len(found) else of_means(name, m, means_k)
