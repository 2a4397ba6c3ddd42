"""The numbers behind the figures, as collapsible tables of the report.

In: RunFrames. Out: HTML; a frame without lines gives no table.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.facts import duration_text
from megatron_lccp.analysis.page import Column, table
from megatron_lccp.analysis.run import RunFrames
from megatron_lccp.analysis.style import length_text, tokens_text

MOST_EVENTS = 200


def _number(value: float) -> str:
    return f"{value:.4g}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _count(value: float) -> str:
    return f"{int(value):,}"


_STAGE, _MONITOR = Column("stage", "stage", css="text"), Column("monitor", "monitor", css="text")
_WHERE = (Column("tokens", "tokens", tokens_text), Column("step", "step", _count), _STAGE)
_LENGTH, _DEPTH = Column("length", "length_tok", length_text), Column("depth", "depth_cell", _share)


def run_tables(run: RunFrames) -> list[str]:
    """Every table that the run has numbers for, in the order of the figures."""
    makers = (_stages, _needles, _heads, _corpora, _monitors)
    return [html for make in makers for html in make(run) if html]


def _stages(run: RunFrames) -> Iterator[str]:
    if not len(run.steps):
        return
    every = run.steps.groupby("stage", sort=False)
    taken = run.steps[~run.steps["skipped"]].groupby("stage", sort=False)
    of_stage = pd.DataFrame(
        {
            "steps": every.size(),
            "skipped": every["skipped"].sum(),
            "first_loss": taken["loss"].first(),
            "last_loss": taken["loss"].last(),
            "rate": every["tokens_per_s"].median(),
            "time_s": every["time_s"].sum(min_count=1),
        }
    )
    columns = (
        _STAGE,
        Column("tokens from", "tokens_from", tokens_text),
        Column("to", "tokens_to", tokens_text),
        Column("steps", "steps", _count),
        Column("skipped", "skipped", _count),
        Column("loss, first", "first_loss", _number),
        Column("loss, last", "last_loss", _number),
        Column("tokens/s, median", "rate", _count),
        Column("time", "time_s", duration_text),
    )
    yield table("t-stages", "Training by stage", run.spans.merge(of_stage, left_on="stage", right_index=True), columns)


def _needles(run: RunFrames) -> Iterator[str]:
    values = (
        Column("mean_ppl", "mean_ppl", _number),
        Column("exp_mean_nll", "exp_mean_nll", _number),
        Column("exact", "exact_share", _share),
    )
    cells, samples = Column("cells", "cells", _count), Column("samples", "n", _count)
    yield table(
        "t-needle", "Needle averages over the grid (Figure 3)", run.averages, (*_WHERE, *values, cells, samples)
    )
    by_length = frames.needle_averages(run.cells, ["length_tok"])
    yield table(
        "t-lengths", "Needle averages by context length", by_length, (*_WHERE, _LENGTH, *values, cells, samples)
    )
    shown = run.cells.merge(frames.pick_checkpoints(run.cells, run.lccp_from), on=frames.CHECKPOINT)
    title = "Needle cells of the checkpoints shown (Figure 2)"
    yield table("t-cells", title, shown, (*_WHERE, _LENGTH, _DEPTH, *values, samples))


def _heads(run: RunFrames) -> Iterator[str]:
    if not len(run.scores):
        return
    names = {
        "retrieval_heads": f"heads above {run.threshold:g} (count)",
        "initial_mean_score": "mean score of the initial heads",
        "top_mean_score": "mean score of the top heads",
    }
    columns = (
        *_WHERE,
        Column("quantity", "quantity", names.__getitem__, "text"),
        Column("value", "value", _number),
        Column("over heads", "n", _count),
    )
    yield table("t-heads", "Retrieval heads over training (Figure 5)", run.heads, columns)
    now = frames.at_checkpoint(run.scores, frames.checkpoints(run.scores).iloc[-1])
    start = run.scores.merge(frames.start_checkpoint(run.scores, run.lccp_from), on=frames.CHECKPOINT)
    start = start[["layer", "head", "score"]].rename(columns={"score": "start"})
    top = now.nlargest(frames.TOP_HEADS, "score").merge(start, on=["layer", "head"], how="left")
    columns = (
        Column("layer", "layer", _count),
        Column("head", "head", _count),
        Column("score", "score", _number),
        Column("at the start of the LCCP", "start", _number),
        Column("needle mass", "needle_mass", _number),
        Column("samples", "n", _count),
    )
    yield table("t-top", f"Top {len(top)} heads at the last checkpoint", top, columns)


def _corpora(run: RunFrames) -> Iterator[str]:
    columns = (
        *_WHERE,
        Column("corpus", "corpus", css="text"),
        _LENGTH,
        Column("ppl", "ppl", _number),
        Column("nll (nat)", "nll", _number),
        Column("tokens measured", "n", _count),
    )
    yield table("t-corpus", "Corpus perplexity (Figure 6)", run.corpora, columns)


def _monitors(run: RunFrames) -> Iterator[str]:
    columns = (
        _MONITOR,
        Column("windows", "size", _count),
        Column("mean", "mean", duration_text),
        Column("longest", "max", duration_text),
        Column("sum", "sum", duration_text),
    )
    times = run.windows.groupby("monitor", sort=False)["time_s"].agg(["size", "mean", "max", "sum"]).reset_index()
    yield table("t-windows", "Time of the monitors", times, columns)
    columns = (
        *_WHERE,
        _MONITOR,
        Column("metric", "metric", css="text"),
        Column("value", "value", _number),
        Column("unit", "unit", css="text"),
        Column("n", "n", _count),
    )
    yield table("t-others", "Other monitors", run.others, columns)


def event_table(run: RunFrames) -> str:
    """What happened, the last MOST_EVENTS of it; a sentence if nothing did."""
    if not len(run.events):
        return '<p class="note">None was recorded: no monitor failed, no step was skipped, the run was not resumed.</p>'
    counts = ", ".join(f"{kind}: {count}" for kind, count in run.events["kind"].value_counts().items())
    last = run.events.tail(MOST_EVENTS)
    note = f"The last {MOST_EVENTS} of {len(run.events):,}." if len(run.events) > MOST_EVENTS else ""
    columns = (
        Column("step", "step", _count),
        Column("kind", "kind", css="text"),
        Column("what happened", "text", css="wrap"),
        Column("time", "time", css="text"),
    )
    return table("events", counts, last, columns, note=note, open=len(last) <= 20)
