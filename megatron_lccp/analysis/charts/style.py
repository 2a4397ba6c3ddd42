"""What all figures share: colours, numbers as people write them, and matplotlib's scales, heat maps and files.

In: plain numbers, matplotlib axes. Out: text; the same axes drawn on; figures as SVG or PNG. No pyplot, no global
state. Colours tell series apart for colour-blind readers too (Okabe and Ito; viridis), on a light and on a dark page.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from megatron_lccp.text import number_text, token_unit

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, MUTED, BAND = "#1a2028", "#66707b", "#8a95a3"
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW = "#2a7ab8", "#d55e00", "#119c75", "#b8639a", "#3a9bd6", "#bd8500"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW)
"""Stay apart for colour-blind eyes (after Okabe and Ito); dark enough for white pages, light enough for black ones."""
HEAT, DIVERGING = "viridis", "PuOr_r"
RAMP = ("#c4851c", "#d9694a", "#b8467f", "#7d5bd0")
RC: dict[RcKeyType, Any] = {
    "font.size": 8.5, "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "axes.titlesize": 9, "axes.edgecolor": MUTED, "axes.facecolor": "none", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": BAND, "grid.alpha": 0.3, "grid.linewidth": 0.6,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "lines.linewidth": 1.4, "lines.markersize": 3.5, "legend.edgecolor": "none",
    "legend.facecolor": "white", "legend.framealpha": 0.7, "legend.fontsize": 8, "legend.labelcolor": INK,
    "svg.fonttype": "none", "svg.hashsalt": "megatron_lccp",
}  # fmt: skip

_LOG_STEPS = (
    (2, (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)),
    (3, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)),
    (20, (1, 1.5, 2, 3, 5, 7)),
    (300, (1, 2, 5)),
    (3000, (1, 3)),
    (np.inf, (1,)),
)
_Draw = TypeVar("_Draw", bound=Callable[..., Figure])


def styled(draw: _Draw) -> _Draw:
    """Run a drawing function under RC, leaving matplotlib's own settings as they were."""

    @wraps(draw)
    def wrapped(*args: object, **kwargs: object) -> Figure:
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapped  # type: ignore[return-value]  # it has the signature of `draw`, which *args do not show


def line_color(color: int | float) -> str:
    """The colour of a line: one of SERIES, or a place on RAMP."""
    if isinstance(color, int):
        return SERIES[color % len(SERIES)]
    place = color * (len(RAMP) - 1)
    left = min(int(place), len(RAMP) - 2)
    ends = [[int(RAMP[k][at : at + 2], 16) for at in (1, 3, 5)] for k in (left, left + 1)]
    mixed = (round(a + (place - left) * (b - a)) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


# --- numbers as people write them ----------------------------------------------------------------------------------


# --- curves over training tokens -----------------------------------------------------------------------------------


def token_axis(axes: Axes, largest: float, label: str) -> None:
    """Label x in a readable unit of tokens; the data stays in tokens."""
    size, unit = token_unit(largest)
    axes.set_xlabel(label + (f" ({unit})" if unit else ""))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / size:g}"))


def shade_stages(axes: Axes, spans: pd.DataFrame, names: bool) -> None:
    """A band behind every second stage, a line where one begins, and its name above if there is room for it."""
    last = float(spans["tokens_to"].max()) if len(spans) else 0.0
    for index, span in enumerate(spans.itertuples()):
        if index % 2:
            axes.axvspan(span.tokens_from, span.tokens_to, color=BAND, alpha=0.16, linewidth=0, zorder=0)
        if index:
            axes.axvline(span.tokens_from, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        share = (span.tokens_to - span.tokens_from) / last if last else 0
        if names and len(spans) > 1 and share * 45 > len(span.stage):  # a panel is some 45 letters wide
            middle = (span.tokens_from + span.tokens_to) / 2
            axes.annotate(
                span.stage, (middle, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                ha="center", va="bottom", fontsize=7.5, color=MUTED,
            )  # fmt: skip


def plain_log_ticks(axis: matplotlib.axis.Axis, low: float, high: float) -> None:
    """Ticks on a log axis written as plain numbers, fewer to the decade the wider the range."""
    steps = next(steps for most, steps in _LOG_STEPS if high / low <= most)
    axis.set_major_locator(LogLocator(subs=steps, numticks=15))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if 1e-4 <= value < 1e5 else f"{value:.0e}"))
    axis.set_minor_locator(NullLocator())


def thin(
    x: np.ndarray, y: np.ndarray, bins: int = 300
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """At most `bins` points of a long curve: x, y, and the lowest and highest y behind each (None if all are shown)."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= bins:
        return x, y, None, None
    edges = np.linspace(0, len(x), bins + 1).astype(int)[:-1]
    n = np.diff(np.append(edges, len(x)))
    x_mean, y_mean = (np.add.reduceat(values, edges) / n for values in (x, y))
    return x_mean, y_mean, np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)


# --- heat maps -----------------------------------------------------------------------------------------------------


def heat_map(axes: Axes, values_yx: np.ndarray, norm: Normalize, colors: str = HEAT) -> AxesImage:
    """One coloured cell per value, the first row on top; what was not measured stays empty."""
    axes.grid(False)
    axes.spines[["top", "right"]].set_visible(True)
    image = axes.imshow(
        np.ma.masked_invalid(values_yx), norm=norm, cmap=colors, aspect="auto", interpolation="none", origin="upper"
    )
    axes.tick_params(length=2)
    return image


def write_cells(axes: Axes, image: AxesImage, values_yx: np.ndarray, size: float) -> None:
    """The value in each cell, dark on light cells and light on dark ones."""
    for (y, x), value in np.ndenumerate(values_yx):
        red, green, blue, alpha = image.cmap(image.norm(value)) if np.isfinite(value) else (0, 0, 0, 0)
        dark = alpha and 0.299 * red + 0.587 * green + 0.114 * blue < 0.52
        color = "white" if dark else "black" if alpha else MUTED
        text = axes.text(x, y, number_text(value), ha="center", va="center", fontsize=size, color=color)
        text.set_in_layout(False)  # it is inside the axes: measuring hundreds of them would take the longest


def dot_cells(axes: Axes, chosen_yx: np.ndarray, color: str) -> None:
    """A dot in chosen cells, small enough for the colour around it to show."""
    y, x = np.nonzero(chosen_yx)
    size = min(4.0, 60 / max(chosen_yx.shape))
    axes.plot(x, y, "o", color=color, markersize=size, markeredgewidth=0, scalex=False, scaley=False)


# --- files ---------------------------------------------------------------------------------------------------------


def figure_svg(figure: Figure) -> str:
    """The figure on white, as an SVG file: the same to the byte for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context(RC):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return buffer.getvalue()


def figure_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure on white, as PNG."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(RC):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    return buffer.getvalue()
