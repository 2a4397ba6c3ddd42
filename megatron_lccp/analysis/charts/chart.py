"""What a figure shows, apart from how it is drawn: lines over an axis, or heat maps of checkpoints.

In: frames as `frames` and the files of `measured` make them. Out: a Curves or a Maps. Both hold the one frame that everything in
them comes from: `draw` makes PNG and SVG of it, `page` the interactive figure, and its CSV is the frame itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from megatron_lccp.analysis import frames
from megatron_lccp.schema import PUBLISHED
from megatron_lccp.text import length_text, tokens_text

Scale = Literal["tokens", "length", "share", "number"]
RUN_STYLES = 5
"""Line styles that tell runs apart. Five and six colours have no common factor: style and colour together recur after
thirty runs."""


class NothingToDraw(ValueError):
    """The runs have not measured what a figure shows; the text says what would provide it."""


@dataclass(frozen=True)
class Line:
    """One line of a panel: column `y` over the panel's x, in the order of `frame`, which is a part of the chart's."""

    label: str
    frame: pd.DataFrame
    y: str
    color: int | float
    """An int is a colour of its own; a float in [0, 1] a place on the ramp from the first checkpoint to the last."""
    low: str | None = None
    """Columns of a band around the line."""
    high: str | None = None
    dash: int = 0
    """One of RUN_STYLES, 0 solid: the run, where several are compared."""
    marks: bool = True
    """Whether every value has a mark; not for what has a value a step."""
    joined: bool = True
    """Whether values are joined by a line."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    x: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    title: str = ""
    x_scale: Scale = "tokens"
    y_scale: Scale = "number"
    log_x: bool = False
    log_y: bool = False
    zero: bool = False
    """Whether the y axis begins at 0; shares run from 0 to 1."""
    spans: pd.DataFrame | None = None
    """Stages to mark on a token axis, as `frames.stage_spans` makes them."""


@dataclass(frozen=True)
class Curves:
    """Panels of lines."""

    key: str
    title: str
    caption: str
    frame: pd.DataFrame
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Maps:
    """A heat map of `value` over `x` and `y` for every checkpoint in `frame`, all on one colour scale."""

    key: str
    title: str
    caption: str
    frame: pd.DataFrame
    x: str
    y: str
    value: str
    x_label: str
    y_label: str
    value_label: str
    x_scale: Scale = "number"
    y_scale: Scale = "number"
    log: bool = False
    """A logarithmic colour scale."""
    threshold: float | None = None
    """Cells above it are marked and counted; the scale begins at 0 then."""
    diverging: bool = False
    """Colours to both sides of 0; cells whose interval (columns low, high) leaves out 0 are marked."""
    starts: tuple[tuple[str, int], ...] = ()
    """(run, tokens at which its LCCP begins): that checkpoint stays beside the slider. Empty: none does."""

    def axis(self, name: str) -> list[float]:
        """The values of a coordinate, in order; heads and layers from 0 without a gap."""
        values = sorted(self.frame[name].dropna().unique())
        return list(range(int(values[-1]) + 1)) if name in ("layer", "head") else values

    def grids(self) -> Iterator[tuple[pd.Series, np.ndarray, np.ndarray]]:
        """Each checkpoint, its values [y, x], NaN where nothing was measured, and which cells are marked [y, x]."""
        xs, ys = self.axis(self.x), self.axis(self.y)
        place_x, place_y = ({value: k for k, value in enumerate(axis)} for axis in (xs, ys))
        for _, part in self.frame.groupby(frames.CHECKPOINT, sort=False):
            grid = np.full((len(ys), len(xs)), np.nan)
            at = (part[self.y].map(place_y).astype(int), part[self.x].map(place_x).astype(int))
            grid[at], marked = part[self.value], np.zeros(grid.shape, dtype=bool)
            if self.threshold is not None:
                marked = grid > self.threshold
            elif self.diverging:
                marked[at] = (part["low"] > 0) | (part["high"] < 0)
            yield part.iloc[0][frames.CHECKPOINT], grid, marked

    def range(self) -> tuple[float, float]:
        """The ends of the colour scale, of all checkpoints."""
        values = self.frame[self.value].to_numpy(float)
        values = values[np.isfinite(values)]
        if self.diverging:
            most = float(np.abs(values).max(initial=0.0)) or 1.0
            return -most, most
        if self.threshold is not None:
            return 0.0, max(2 * self.threshold, float(values.max(initial=0.0)))
        low, high = (float(values.min()), float(values.max())) if len(values) else (1.0, 10.0)
        if low == high and not self.log:  # a scale of some width all the same
            return (0.0, 1.0) if 0 <= low <= 1 else (low - 1, low + 1)
        low = max(low, 1e-6) if self.log else low
        return low, max(high, low * 1.05) if self.log else high


Chart = Curves | Maps


def tick_text(value: float, scale: Scale) -> str:
    """A value of an axis as people write it."""
    if scale == "length":
        return length_text(value)
    if scale == "tokens":
        return tokens_text(value)
    return f"{100 * value:.3g} %" if scale == "share" else f"{value:g}"


def checkpoint_text(point: pd.Series, run: bool = False) -> str:
    """How a checkpoint is called over a panel: 1.5M (lccp), and its run where there are several; a published model by its
    name."""
    if point["stage"] == PUBLISHED:
        return str(point["run"])
    text = tokens_text(point["tokens"]) + (f" ({point['stage']})" if point["stage"] else "")
    return f"{point['run']}: {text}" if run else text
