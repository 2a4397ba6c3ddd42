"""What a run shows, in sentences computed from its frames.

In: RunFrames. Out: Facts, each a number with how it came about, and what changed since the start of the LCCP with its
interval over samples; where there are none to draw anew, it says so. No verdict. What was not measured yields no fact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.run import RunFrames
from megatron_lccp.analysis.statistics.paired import Paired, head_samples, needle_grid, paired
from megatron_lccp.analysis.statistics.stats import change_of
from megatron_lccp.analysis.text import duration_text, length_text, number_text, tokens_text


@dataclass(frozen=True)
class Fact:
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
    change = _on_samples(needle_grid(run.rows[run.rows["length_tok"] == longest]), first, last, _nat)
    yield _change(f"Answer PPL at {length_text(longest)} tokens", first, last, "mean_ppl", note, change)


def _exact(run: RunFrames) -> Iterator[Fact]:
    averages = run.averages.dropna(subset=["exact_share"])
    if not len(averages):
        return
    first, last = _start_and_end(averages, run)
    note = f"share of needles whose every answer token is the argmax, mean over {int(last['cells'].iloc[0])} cells"
    change = _on_samples(needle_grid(run.rows, "exact"), first, last, lambda share: f"{100 * share:+.1f} points")
    text = lambda share: f"{100 * share:.1f} %"  # noqa: E731
    yield _change("NIAH exact", first, last, "exact_share", note, change, text, ratio=False)


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
    above = lambda score: (score > run.threshold).sum(axis=-1)  # noqa: E731
    change = _on_samples(head_samples(run.rows), first, last, "{:+.0f}".format, above)
    yield _change("Retrieval heads", first, last, "value", note, change, "{:.0f}".format, ratio=False)


def _corpora(run: RunFrames) -> Iterator[Fact]:
    sequences = run.rows[run.rows["metric"] == "sequence_nll"]
    for label, part in run.corpora.groupby("label", sort=False):
        first, last = _start_and_end(part, run)
        where = ["corpus", "length_tok"]
        found = paired(sequences[(sequences[where] == last[where].iloc[0]).all(axis=1)], where)
        note, change = f"over {int(last['n'].iloc[0]):,} held-out tokens", _on_samples(found, first, last, _nat)
        yield _change(f"Corpus PPL, {label}", first, last, "ppl", note, change)


def _loss(run: RunFrames) -> Iterator[Fact]:
    losses = run.steps[~run.steps["skipped"]].dropna(subset=["loss"])
    if len(losses):
        last = losses["loss"].tail(10)
        note = f"nat per token: first step, and mean of the last {len(last)} of {len(losses):,} steps, over all stages"
        change = "no interval: every step trains on other text"
        yield Fact("Training loss", f"{losses['loss'].iloc[0]:.3f} → {last.mean():.3f}", note, change)


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
    if 0 < measuring < np.inf and 0 < training < np.inf:
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


def _change(label, first, last, column, note, change, text=number_text, ratio=True) -> Fact:
    """The fact that `column` went from its value in the one-line frame `first` to that in `last`."""
    end = last.iloc[0]
    if _is_alone(first, last):
        return Fact(label, text(end[column]), f"{note}; at {tokens_text(end['tokens'])} tokens ({end['stage']})")
    start = first.iloc[0]
    factor, times = "", start[column] / end[column] if end[column] else np.nan
    if ratio and np.isfinite(times) and times > 0:
        factor = f"; {times:.3g}× lower" if times >= 1 else f"; {1 / times:.3g}× higher"
    when = " to ".join(f"{tokens_text(point['tokens'])} tokens ({point['stage']})" for point in (start, end))
    value = f"{text(start[column])} → {text(end[column])}"
    return Fact(label, value, f"{note}; from {when}{factor}", change)


def _is_alone(first: pd.DataFrame, last: pd.DataFrame) -> bool:
    """Whether there is no checkpoint before the last one."""
    return first.empty or bool((first.iloc[0][frames.CHECKPOINT] == last.iloc[0][frames.CHECKPOINT]).all())


def _on_samples(
    found: Paired, first: pd.DataFrame, last: pd.DataFrame, text: Callable[[float], str],
    of: Callable[[np.ndarray], np.ndarray] = lambda mean: mean.mean(axis=-1),
) -> str:  # fmt: skip
    """What changed on the samples that both measured: -0.52 nat [-0.61, -0.44], 4 samples; or why that is not known.

    `of` takes the means of cells over samples to the number that changed, by default their mean.
    """
    if _is_alone(first, last):
        return ""
    at = [found.number(part.iloc[0]) for part in (first, last)]
    if None in at:
        return "no interval: not the same samples at both, or averages alone"
    if len(found.clusters) < 2:
        return "no interval: one sample, or averages alone"
    change = change_of(*(found.value_kcs[k].T for k in at), of)
    low, high = (text(end).split()[0] for end in (change.low, change.high))
    return f"{text(change.value)} [{low}, {high}], {change.n} samples"


def _nat(nll: float) -> str:
    return f"{nll:+.3g} nat"
