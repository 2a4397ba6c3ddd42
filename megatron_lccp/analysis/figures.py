"""The figures of a run, each from the frames that `frames` makes.

In: tidy frames and `stage_spans`. Out: matplotlib Figures (render with `style.figure_svg` or `figure_png`).
Every function takes `columns`, the number of panels side by side: the default for a wide page, 1 for a phone. Where
there is nothing to draw it raises NothingToDraw, whose text says what is missing and what would provide it.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_lccp.analysis import style
from megatron_lccp.analysis.frames import RETRIEVAL_THRESHOLD, at_checkpoint, pick_checkpoints

WIDE_IN, NARROW_IN = 9.2, 4.4


class NothingToDraw(ValueError):
    """The run has not measured what a figure shows; the text says what would provide it."""


@style.styled
def training_curves(steps: pd.DataFrame, spans: pd.DataFrame, columns: int = 2) -> Figure:
    """Loss, gradient norm, learning rate and tokens/s over training tokens; stages as bands, skipped steps as crosses.

    Long curves show means over neighbouring steps with the lowest and the highest of them as a band.
    """
    if not len(steps):
        raise NothingToDraw("No training curves: steps.jsonl is missing or empty; `lccp train` writes it.")
    panels = [
        ("loss", "loss (nat/token)", style.BLUE),
        ("grad_norm", "gradient norm", style.ORANGE),
        ("lr", "learning rate", style.GREEN),
        ("tokens_per_s", "throughput (tokens/s)", style.PURPLE),
    ]
    figure, axes_list = _panels(len(panels), columns, height=2.0)
    taken, skipped = steps[~steps["skipped"]], steps[steps["skipped"]]
    for axes, (column, label, color) in zip(axes_list, panels, strict=True):
        _over_tokens(axes, steps["tokens"].max(), spans)
        x, y, low, high = style.thin(taken["tokens"].to_numpy(float), taken[column].to_numpy(float))
        if low is not None:
            axes.fill_between(x, low, high, color=color, alpha=0.22, linewidth=0)
        axes.plot(x, y, color=color, marker="" if len(x) > 40 else "o", markersize=2.5)
        axes.set_ylabel(label)
        if column == "grad_norm":
            style.log_if_wide(axes, taken[column])
        elif column != "loss" and len(x):
            axes.set_ylim(bottom=0)
        if column == "tokens_per_s":
            axes.yaxis.set_major_formatter(lambda rate, _: style.tokens_text(rate))
        if column in ("loss", "grad_norm") and len(skipped):
            at_bottom = axes.get_xaxis_transform()
            axes.plot(
                skipped["tokens"],
                np.full(len(skipped), 0.04),
                "x",
                color=style.INK,
                transform=at_bottom,
                label="skipped step",
            )
            axes.legend(loc="upper right")
    return figure


@style.styled
def needle_heat_maps(
    cells: pd.DataFrame, tokens_from: int = 0, value: str = "mean_ppl", columns: int | None = None, limit: int = 8
) -> Figure:
    """Figure 2: answer PPL by context length and needle depth, one heat map per checkpoint, one log colour scale.

    At most `limit` checkpoints, evenly chosen from the start of the LCCP (at `tokens_from`) to the last.
    """
    if not len(cells):
        raise NothingToDraw("No needle heat maps (Figure 2): no rows of answer_nll; add the NeedleGrid monitor.")
    points = pick_checkpoints(cells, tokens_from, limit)
    shown = cells.merge(points, on=list(points.columns))
    lengths, depths = sorted(shown["length_tok"].unique()), sorted(shown["depth_cell"].unique())
    columns = columns or _even(len(points), most=min(4, max(2, int(WIDE_IN // (0.34 * len(lengths) + 0.5)))))
    finite = shown[value][np.isfinite(shown[value].astype(float))]
    low, high = (max(finite.min(), 1e-6), finite.max()) if len(finite) else (1.0, 10.0)
    norm = LogNorm(low, max(high, low * 1.05))
    figure, axes_list = _panels(len(points), columns, height=0.55 + 0.165 * max(len(depths), 4))
    cell_in = (figure.get_figwidth() / columns - 0.5) / len(lengths)
    for axes, (_, point) in zip(axes_list, points.iterrows(), strict=True):
        grid = at_checkpoint(shown, point).pivot(index="depth_cell", columns="length_tok", values=value)
        values_yx = grid.reindex(index=depths, columns=lengths).to_numpy(float)
        image = style.heat_map(axes, values_yx, norm)
        style.write_cells(axes, image, values_yx, size=min(6.5, cell_in * 72 / 3.1))
        axes.set_title(_checkpoint_text(point))
        axes.set_xticks(
            range(len(lengths)), [style.length_text(n) for n in lengths], rotation=90 if cell_in < 0.3 else 0
        )
        every = max(1, math.ceil(len(depths) / 6))
        axes.set_yticks(range(0, len(depths), every), [f"{100 * d:.0f}" for d in depths[::every]])
    _label(figure, axes_list, columns, "context length (tokens)", "needle depth (%)")
    bar = _color_bar(
        figure, image, axes_list, "answer PPL, mean over samples" if value == "mean_ppl" else value, columns
    )
    style.plain_log_ticks(bar.ax.yaxis if columns > 1 else bar.ax.xaxis, norm.vmin, norm.vmax)
    return figure


@style.styled
def needle_curves(averages: pd.DataFrame, spans: pd.DataFrame, columns: int = 2) -> Figure:
    """Figure 3: exact share and answer PPL, averaged over the cells of the grid, over training tokens."""
    if not len(averages):
        raise NothingToDraw("No needle averages (Figure 3): no rows of answer_nll; add the NeedleGrid monitor.")
    figure, (left, right) = _panels(2, columns, height=2.4)
    for axes in (left, right):
        _over_tokens(axes, averages["tokens"].max(), spans)
    left.plot(averages["tokens"], averages["exact_share"], color=style.BLUE, marker="o", clip_on=False)
    left.set_ylim(0, 1)
    left.yaxis.set_major_formatter(PercentFormatter(1))
    left.set_ylabel("NIAH exact (share of samples, %)")
    right.plot(averages["tokens"], averages["mean_ppl"], color=style.ORANGE, marker="o", label="mean_ppl")
    right.plot(
        averages["tokens"],
        averages["exp_mean_nll"],
        color=style.PURPLE,
        marker="s",
        linestyle="--",
        label="exp_mean_nll",
    )
    right.set_ylabel("NIAH answer PPL")
    style.log_if_wide(right, averages[["mean_ppl", "exp_mean_nll"]].stack(), ratio=8)
    right.legend()
    return figure


@style.styled
def head_heat_maps(
    scores: pd.DataFrame, tokens_from: int = 0, threshold: float = RETRIEVAL_THRESHOLD, columns: int | None = None,
    limit: int = 8,
) -> Figure:  # fmt: skip
    """Figure 4: retrieval score of every head by layer and head, one map per checkpoint on one shared linear scale.

    Heads above the threshold are framed.
    """
    if not len(scores):
        raise NothingToDraw(
            "No retrieval scores (Figure 4): no rows of retrieval_score; add the RetrievalHeads monitor."
        )
    points = pick_checkpoints(scores, tokens_from, limit)
    shown = scores.merge(points, on=list(points.columns))
    layers, heads = int(shown["layer"].max()) + 1, int(shown["head"].max()) + 1
    columns = columns or _even(len(points), most=4)
    norm = Normalize(0, max(2 * threshold, float(shown["score"].max())))
    figure, axes_list = _panels(len(points), columns, height=min(2.3, 0.75 + 0.14 * max(layers, 6)))
    for axes, (_, point) in zip(axes_list, points.iterrows(), strict=True):
        grid = at_checkpoint(shown, point).pivot(index="layer", columns="head", values="score")
        scores_LH = grid.reindex(index=range(layers), columns=range(heads)).to_numpy(float)
        image = style.heat_map(axes, scores_LH, norm)
        style.outline_cells(axes, scores_LH > threshold)
        axes.set_title(f"{_checkpoint_text(point)}: {int((scores_LH > threshold).sum())} above {threshold:g}")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    _label(figure, axes_list, columns, "head", "layer")
    bar = _color_bar(figure, image, axes_list, "retrieval score", columns)
    (bar.ax.axhline if columns > 1 else bar.ax.axvline)(threshold, color="#ffffff", linewidth=1.2)
    return figure


@style.styled
def head_curves(
    summary: pd.DataFrame, spans: pd.DataFrame, threshold: float = RETRIEVAL_THRESHOLD, columns: int = 2
) -> Figure:
    """Figure 5: number of retrieval heads, and mean score of the initial and of the top ones, over training tokens."""
    if not len(summary):
        raise NothingToDraw(
            "No retrieval-head curves (Figure 5): no rows of retrieval_score; add the RetrievalHeads monitor."
        )
    lines = {name: part for name, part in summary.groupby("quantity")}
    figure, (left, right) = _panels(2, columns, height=2.4)
    for axes in (left, right):
        _over_tokens(axes, summary["tokens"].max(), spans)
    left.plot(
        lines["retrieval_heads"]["tokens"],
        lines["retrieval_heads"]["value"],
        color=style.BLUE,
        marker="o",
        clip_on=False,
    )
    left.set_ylim(0, max(1.0, lines["retrieval_heads"]["value"].max() * 1.08))
    left.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    left.set_ylabel(f"heads with score > {threshold:g} (count)")
    curves = (
        ("initial_mean_score", "the {n} initial heads", style.ORANGE, "o-"),
        ("top_mean_score", "the top {n} heads", style.PURPLE, "s--"),
    )
    for name, text, color, marks in curves:
        if name in lines:
            part = lines[name]
            right.plot(
                part["tokens"], part["value"], marks, color=color, label=text.format(n=part["n"].max()), clip_on=False
            )
    right.set_ylim(bottom=0)
    right.set_ylabel("mean retrieval score")
    right.legend()
    return figure


@style.styled
def corpus_curves(corpora: pd.DataFrame, spans: pd.DataFrame, columns: int = 2) -> Figure:
    """Figure 6: perplexity of each held-out corpus over training tokens, on a linear and on a log axis."""
    if not len(corpora):
        raise NothingToDraw("No corpus perplexity (Figure 6): no rows of nll with a corpus; add the CorpusPPL monitor.")
    figure, axes_list = _panels(2, columns, height=2.4)
    for axes, log in zip(axes_list, (False, True), strict=True):
        _over_tokens(axes, corpora["tokens"].max(), spans, names=not log)
        for index, (label, part) in enumerate(corpora.groupby("label", sort=False)):
            part = part[part["tokens"] > 0] if log else part
            axes.plot(
                part["tokens"],
                part["ppl"],
                color=style.SERIES[index % len(style.SERIES)],
                marker="osD^vP"[index % 6],
                label=label,
            )
        axes.set_ylabel("corpus PPL")
        if not log:  # the law of section 7.1 is a straight line in log N and PPL, not in log PPL
            style.log_if_wide(axes, corpora["ppl"], ratio=8)
        later = corpora["tokens"][corpora["tokens"] > 0]
        if log and later.nunique() > 1:
            axes.set_xscale("log")
            axes.set_xlim(later.min() / 1.1, later.max() * 1.1)
            style.plain_log_ticks(axes.xaxis, later.min(), later.max())
            style.token_axis(axes, later.max(), log=True)
    axes_list[0].legend()
    return figure


def _panels(n: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `n` panels of `height` inches, `columns` of them side by side."""
    rows = math.ceil(n / columns)
    width = NARROW_IN if columns == 1 else WIDE_IN
    figure = Figure(figsize=(width, rows * height + 0.35), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(n)]


def _even(n: int, most: int) -> int:
    """How many of `n` panels to set side by side, at most `most`, so that the rows are as full as can be."""
    return math.ceil(n / math.ceil(n / most))


def _over_tokens(axes: Axes, largest: float, spans: pd.DataFrame, names: bool = True) -> None:
    style.shade_stages(axes, spans, names)
    style.token_axis(axes, largest)


def _label(figure: Figure, axes_list: list[Axes], columns: int, x_label: str, y_label: str) -> None:
    """One label for the x axes of all panels and one for their y axes; in a single column, y labels stay in sight."""
    figure.supxlabel(x_label, fontsize=style.RC["font.size"])
    if columns > 1:
        figure.supylabel(y_label, fontsize=style.RC["font.size"])
    else:
        for axes in axes_list:
            axes.set_ylabel(y_label)


def _color_bar(figure: Figure, image: AxesImage, axes_list: list[Axes], label: str, columns: int) -> Colorbar:
    """To the right of several columns; on top of a single one, where a phone shows it first."""
    height = figure.get_figheight()
    top = {"location": "top", "pad": 0.1 / height, "fraction": 0.16 / height, "aspect": 28}
    place = top if columns == 1 else {"location": "right", "pad": 0.01, "fraction": 0.03, "aspect": 30}
    bar = figure.colorbar(image, ax=axes_list, label=label, **place)
    bar.outline.set_visible(False)
    bar.ax.grid(False)
    return bar


def _checkpoint_text(point: pd.Series) -> str:
    return f"{style.tokens_text(point['tokens'])} ({point['stage']})"
