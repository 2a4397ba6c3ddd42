"""What a run shows, in sentences computed from its frames.

In: RunFrames. Out: Facts, each a number with how it came about. No verdict: whether a difference means anything is a
matter for statistics, not for this file. What was not measured yields no fact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.run import RunFrames
from megatron_lccp.analysis.style import length_text, number_text, tokens_text


@dataclass(frozen=True)
class Fact:
    """One line of the report's first section."""

    label: str
    """What was measured."""
    value: str
    """The number, or the number at the start and at the end."""
    note: str
    """Where, over what, by which definition."""


def run_facts(run: RunFrames) -> list[Fact]:
    """All facts that the run's rows and steps support, the paper's measures first."""
    makers = (_longest_needle, _exact, _retrieval_heads, _corpora, _loss, _throughput, _window_share, _skipped)
    return [fact for make in makers for fact in make(run)]


def _longest_needle(run: RunFrames) -> Iterator[Fact]:
    by_length = frames.needle_averages(run.cells, ["length_tok"])
    if not len(by_length):
        return
    start, end = _start_and_end(by_length, run)
    both = set(start["length_tok"]) & set(end["length_tok"])
    longest = max(both or set(end["length_tok"]))
    first, last = (part[part["length_tok"] == longest] for part in (start, end))
    note = f"mean over samples and {int(last['cells'].iloc[0])} depths"
    yield _change(f"Answer PPL at {length_text(longest)} tokens", first, last, "mean_ppl", note)


def _exact(run: RunFrames) -> Iterator[Fact]:
    averages = run.averages.dropna(subset=["exact_share"])
    if not len(averages):
        return
    first, last = _start_and_end(averages, run)
    note = f"share of needles whose every answer token is the argmax, mean over {int(last['cells'].iloc[0])} cells"
    yield _change(
        "NIAH exact", first, last, "exact_share", note, text=lambda share: f"{100 * share:.1f} %", ratio=False
    )


def _retrieval_heads(run: RunFrames) -> Iterator[Fact]:
    if not len(run.scores):
        return
    counts = run.heads[run.heads["quantity"] == "retrieval_heads"]
    first, last = _start_and_end(counts, run)
    now = frames.at_checkpoint(run.scores, frames.checkpoints(run.scores).iloc[-1]).dropna(subset=["score"])
    note = f"of {int(last['n'].iloc[0])} heads, score > {run.threshold:g}"
    if len(now):
        best = now.loc[now["score"].idxmax()]
        note += f"; the best at the end is layer {best['layer']} head {best['head']} with {best['score']:.2f}"
    yield _change("Retrieval heads", first, last, "value", note, text=lambda count: f"{count:.0f}", ratio=False)


def _corpora(run: RunFrames) -> Iterator[Fact]:
    for label, part in run.corpora.groupby("label", sort=False):
        first, last = _start_and_end(part, run)
        yield _change(f"Corpus PPL, {label}", first, last, "ppl", f"over {int(last['n'].iloc[0]):,} held-out tokens")


def _loss(run: RunFrames) -> Iterator[Fact]:
    losses = run.steps[~run.steps["skipped"]].dropna(subset=["loss"])
    if len(losses):
        last = losses["loss"].tail(10)
        note = f"nat per token: first step, and mean of the last {len(last)} of {len(losses):,} steps, over all stages"
        yield Fact("Training loss", f"{losses['loss'].iloc[0]:.3f} → {last.mean():.3f}", note)


def _throughput(run: RunFrames) -> Iterator[Fact]:
    rates = run.steps.dropna(subset=["tokens_per_s"])
    if len(rates):
        medians = rates.groupby("stage", sort=False)["tokens_per_s"].median()
        each = ", ".join(f"{stage} {rate:,.0f}" for stage, rate in medians.items())
        yield Fact(
            "Throughput", f"{medians.iloc[-1]:,.0f} tokens/s", f"median over the steps of the last stage ({each})"
        )


def _window_share(run: RunFrames) -> Iterator[Fact]:
    measuring, training = run.windows["time_s"].sum(), run.steps["time_s"].sum()
    if measuring > 0 and training > 0:
        times = f"{duration_text(measuring)} in monitors, {duration_text(training)} in optimizer steps"
        yield Fact(
            "Time spent measuring", f"{100 * measuring / (measuring + training):.1f} %", f"of wall time: {times}"
        )


def _skipped(run: RunFrames) -> Iterator[Fact]:
    skipped = int(run.steps["skipped"].sum())
    if skipped:
        yield Fact("Skipped steps", f"{skipped:,}", f"of {len(run.steps):,}: loss or gradient was not finite")


def _start_and_end(frame: pd.DataFrame, run: RunFrames) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The lines of `frame` at the start of the LCCP and at its last checkpoint."""
    start = frames.start_checkpoint(frame, run.lccp_from).iloc[0]
    return frames.at_checkpoint(frame, start), frames.at_checkpoint(frame, frames.checkpoints(frame).iloc[-1])


def _change(label, first, last, column, note, text=number_text, ratio=True) -> Fact:
    """The fact that `column` went from its value in the one-line frame `first` to that in `last`."""
    end = last.iloc[0]
    if first.empty or (first.iloc[0][frames.CHECKPOINT] == end[frames.CHECKPOINT]).all():
        return Fact(label, text(end[column]), f"{note}; at {tokens_text(end['tokens'])} tokens ({end['stage']})")
    start = first.iloc[0]
    change, times = "", start[column] / end[column] if end[column] else np.nan
    if ratio and np.isfinite(times) and times > 0:
        change = f"; {times:.3g}× lower" if times >= 1 else f"; {1 / times:.3g}× higher"
    when = " to ".join(f"{tokens_text(point['tokens'])} tokens ({point['stage']})" for point in (start, end))
    return Fact(label, f"{text(start[column])} → {text(end[column])}", f"{note}; from {when}{change}")


def duration_text(seconds: float) -> str:
    """2 h 05 min, 3 min 20 s, 12.5 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
