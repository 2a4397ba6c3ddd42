"""A highlight: one number of a run, with how it came about.

In: frames of a run. Out: Highlights, and what changed since the start of the LCCP with its interval over samples; where
there are none to draw anew, it says so. No verdict. What was not measured yields no highlight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.run import Run
from megatron_lccp.analysis.statistics.paired import Paired
from megatron_lccp.analysis.statistics.stats import change_of
from megatron_lccp.schema import PUBLISHED
from megatron_lccp.text import number_text, tokens_text


@dataclass(frozen=True)
class Highlight:
    """One line of the report's first section."""

    label: str
    """What was measured."""
    value: str
    """The number, or the number at the start and at the end."""
    note: str
    """Where, over what, by which definition."""
    change: str = ""
    """From the start to the end on the same samples (of a perplexity, of its NLL), with its interval, or why there is
    none; empty for what is no difference."""


def start_and_end(frame: pd.DataFrame, run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The lines of `frame` at the start of the LCCP and at its last checkpoint."""
    start = frames.start_checkpoint(frame, run.lccp_from).iloc[0]
    return frames.at_checkpoint(frame, start), frames.at_checkpoint(frame, frames.checkpoints(frame).iloc[-1])


def change_highlight(label, first, last, column, note, change, text=number_text, ratio=True) -> Highlight:
    """That `column` went from its value in the one-line frame `first` to that in `last`."""
    end = last.iloc[0]
    if end["stage"] == PUBLISHED:
        return Highlight(label, text(end[column]), note)
    if _is_alone(first, last):
        return Highlight(label, text(end[column]), f"{note}; at {tokens_text(end['tokens'])} tokens ({end['stage']})")
    start = first.iloc[0]
    factor, times = "", start[column] / end[column] if end[column] else np.nan
    if ratio and np.isfinite(times) and times > 0:
        factor = f"; {times:.3g}× lower" if times >= 1 else f"; {1 / times:.3g}× higher"
    when = " to ".join(f"{tokens_text(point['tokens'])} tokens ({point['stage']})" for point in (start, end))
    value = f"{text(start[column])} → {text(end[column])}"
    return Highlight(label, value, f"{note}; from {when}{factor}", change)


def _is_alone(first: pd.DataFrame, last: pd.DataFrame) -> bool:
    """Whether there is no checkpoint before the last one."""
    return first.empty or bool((first.iloc[0][frames.CHECKPOINT] == last.iloc[0][frames.CHECKPOINT]).all())


def on_samples(
    found: Paired, first: pd.DataFrame, last: pd.DataFrame, text: Callable[[float], str],
    of: Callable[[np.ndarray], np.ndarray] = lambda mean: mean.mean(axis=-1), most: float = np.inf,
) -> str:  # fmt: skip
    """What changed on the samples that both measured: -0.52 nat [-0.61, -0.44], 4 samples; or why that is not known.

    `of` takes the means of cells over samples to the number that changed, by default their mean. `most` is the largest
    change that there can be: of few samples, an interval would reach beyond it.
    """
    if _is_alone(first, last):
        return ""
    at = [found.number(part.iloc[0]) for part in (first, last)]
    if None in at:
        return "no interval: not the same samples at both, or averages alone"
    if len(found.clusters) < 2:
        return "no interval: one sample, or averages alone"
    before_sm, after_sm = (found.value_kcs[k].T for k in at)
    change = change_of(before_sm, after_sm, of)
    low, high = (text(min(max(end, -most), most)).split()[0] for end in (change.low, change.high))
    return f"{text(change.value)} [{low}, {high}], {change.n} samples"


def nat_text(nll: float) -> str:
    return f"{nll:+.3g} nat"
