"""What the figures are put together from: frames of several runs, and lines of runs and of checkpoints.

In: Run and parts of their frames. Out: frames, Lines, Panels, and what captions say of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.charts.chart import RUN_STYLES, Line, NothingToDraw, Panel, checkpoint_text
from megatron_lccp.analysis.run import Run, Runs
from megatron_lccp.schema import PUBLISHED
from megatron_lccp.text import count_text, tokens_text

CURVES_SHOWN = 6
SHOWN_CURVES = f"At most {CURVES_SHOWN} checkpoints, from the start of the LCCP (light) to the last (dark)."
PAPER = "arXiv 2604.02650"


def whole(parts: Iterable[pd.DataFrame], missing: str) -> pd.DataFrame:
    """The frames of all runs together; NothingToDraw with the text `missing` if none has lines in it."""
    parts = [part for part in parts if len(part)]
    if not parts:
        raise NothingToDraw(missing)
    return pd.concat(parts, ignore_index=True)


def picked(run: Run, frame: pd.DataFrame, most: int = frames.MOST_SHOWN) -> pd.DataFrame:
    """The lines of the checkpoints that figures and tables show, the first of them where the LCCP starts."""
    return frame.merge(frames.pick_checkpoints(frame, run.lccp_from, most), on=frames.CHECKPOINT)


def panels_of_runs(
    runs: Runs, frame_of: Callable[[Run], pd.DataFrame], panels_of: Callable[[Run, pd.DataFrame], Iterable[Panel]]
) -> tuple[pd.DataFrame, tuple[Panel, ...]]:
    """The lines of every run's checkpoints that curves show, and the panels that `panels_of` makes of them.

    The title of a panel begins with the run if there are several.
    """
    parts, panels = [], []
    for run in runs:
        if len(part := picked(run, frame_of(run), CURVES_SHOWN)):
            parts.append(part)
            for panel in panels_of(run, part):
                title = ": ".join(filter(None, (run.name if len(runs) > 1 else "", panel.title)))
                panels.append(replace(panel, title=title))
    return pd.concat(parts, ignore_index=True), tuple(panels)


def lines_of_runs(runs: Runs, frame: pd.DataFrame, y: str, name: str, color: int, **options) -> list[Line]:
    """A line of each run; a measure without a name stands alone in its panel, so colours are the runs'."""
    lines = []
    for k, run in enumerate(runs):
        part = frame[frame["run"] == run.name]
        if len(part):
            label = name if len(runs) == 1 else ": ".join(filter(None, (run.name, name)))
            lines.append(Line(label, part, y, color if name or len(runs) == 1 else k, dash=k % RUN_STYLES, **options))
    return lines


def lines_of_checkpoints(frame: pd.DataFrame, y: str) -> tuple[Line, ...]:
    """A line of each checkpoint of one run, along the ramp of colours."""
    parts = [part for _, part in frame.groupby(frames.CHECKPOINT, sort=False)]
    several = frame["stage"].nunique() > 1 or (frame["stage"] == PUBLISHED).any()
    return tuple(
        Line(
            checkpoint_text(part.iloc[0]) if several else tokens_text(part["tokens"].iloc[0]),
            part, y, k / max(len(parts) - 1, 1),
        )
        for k, part in enumerate(parts)
    )  # fmt: skip


def over_tokens(runs: Runs, lines: Sequence[Line], y_label: str, **options) -> Panel:
    values = pd.concat([line.frame[line.y] for line in lines]) if lines else pd.Series(dtype=float)
    if "zero" not in options and "y_scale" not in options:
        options.setdefault("log_y", is_wide(values, 8) and "PPL" in y_label)
    spans = runs[0].spans if len(runs) == 1 else None
    return Panel("tokens", "training tokens", y_label, tuple(lines), spans=spans, **options)


def is_wide(values: pd.Series, ratio: float = 20.0) -> bool:
    """Whether positive values span more than `ratio`, so that only a log axis shows them all."""
    values = values[np.isfinite(values.astype(float))]
    return bool(len(values) and values.min() > 0 and values.max() / values.min() > ratio)


def n_text(frame: pd.DataFrame, column: str = "n") -> str:
    """The number behind a value, or its range."""
    low, high = int(frame[column].min()), int(frame[column].max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def checkpoints_text(frame: pd.DataFrame, before: str = "") -> str:
    """1 checkpoint, 6 checkpoints; `before` stands before several."""
    count = len(frames.checkpoints(frame))
    return (before if count > 1 else "") + count_text(count, "checkpoint")


def starts_of(runs: Runs) -> tuple[tuple[str, int], ...]:
    return tuple((run.name, run.lccp_from) for run in runs)
