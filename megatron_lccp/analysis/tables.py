"""The numbers behind the figures, as collapsible tables of the report.

In: RunFrames. Out: HTML; a frame without lines gives no table.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from megatron_lccp.analysis import frames, measures
from megatron_lccp.analysis.report.page import Column, table
from megatron_lccp.analysis.run import RunFrames
from megatron_lccp.analysis.text import duration_text, length_text, number_text, tokens_text

MOST_EVENTS = 200


def _number(value: float) -> str:
    return f"{value:.4g}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _count(value: float) -> str:
    return f"{int(value):,}" if np.isfinite(value) else number_text(value)


_STAGE, _MONITOR = Column("stage", "stage", css="text"), Column("monitor", "monitor", css="text")
_WHERE = (Column("tokens", "tokens", tokens_text), Column("step", "step", _count), _STAGE)
_LENGTH, _DEPTH = Column("length", "length_tok", length_text), Column("depth", "depth_cell", _share)

_VALUES = (
    Column("mean_ppl", "mean_ppl", _number),
    Column("exp_mean_nll", "exp_mean_nll", _number),
    Column("exact", "exact_share", _share),
)


def run_tables(run: RunFrames, prefix: str = "") -> list[str]:
    """Every table that the run has numbers for, in the order of the figures; `prefix` keeps ids of runs apart."""
    makers = (_stages, _benchmarks, _needles, _interference, _corpora, _heads, _ablations, _monitors)
    return [html.replace('id="', f'id="{prefix}', 1) for make in makers for html in make(run) if html]


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
    cells, samples = Column("cells", "cells", _count), Column("samples", "n", _count)
    yield table(
        "t-needle", "Needle averages over the grid (Figure 3)", run.averages, (*_WHERE, *_VALUES, cells, samples)
    )
    by_length = frames.needle_averages(run.cells, ["length_tok"])
    yield table(
        "t-lengths", "Needle averages by context length", by_length, (*_WHERE, _LENGTH, *_VALUES, cells, samples)
    )
    shown = run.cells.merge(frames.pick_checkpoints(run.cells, run.lccp_from), on=frames.CHECKPOINT)
    title = "Needle cells of the checkpoints shown (Figure 2)"
    yield table("t-cells", title, shown, (*_WHERE, _LENGTH, _DEPTH, *_VALUES, samples))


def _benchmarks(run: RunFrames) -> Iterator[str]:
    columns = (*_WHERE, Column("benchmark", "benchmark", css="text"), Column("score", "score", _number))
    yield table("t-benchmarks", "Benchmark scores (Figure 1)", run.benchmarks, columns)


def _interference(run: RunFrames) -> Iterator[str]:
    columns = (
        *_WHERE,
        Column("before", "before_tok", length_text),
        Column("after", "after_tok", length_text),
        *_VALUES,
        Column("samples", "n", _count),
    )
    shown = run.interference.merge(frames.pick_checkpoints(run.interference, run.lccp_from), on=frames.CHECKPOINT)
    yield table("t-interference", "Interference cells of the checkpoints shown (Figures 8 and 9)", shown, columns)


def _ablations(run: RunFrames) -> Iterator[str]:
    columns = (
        *_WHERE,
        Column("set to zero", "ablated", css="text"),
        Column("heads", "heads", _count),
        Column("answer nll (nat)", "ablated_nll", _number),
        Column("change (nat)", "nll_change", _number),
        Column("from", "low", _number),
        Column("to (95 %)", "high", _number),
        Column("samples", "n", _count),
    )
    yield table("t-ablation", "Head ablation", run.ablations, columns)


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
    corpus, tokens = Column("corpus", "corpus", css="text"), Column("tokens measured", "n", _count)
    values = (Column("ppl", "ppl", _number), Column("nll (nat)", "nll", _number))
    yield table("t-corpus", "Corpus perplexity (Figure 6)", run.corpora, (*_WHERE, corpus, _LENGTH, *values, tokens))
    law = measures.log_law(run.corpora, {run.name: run.lccp_from})
    columns = (
        Column("corpus", "label", css="text"),
        Column("A", "a", _number),
        Column("B", "b", _number),
        Column("r²", "r2", _number),
        Column("checkpoints", "n", _count),
    )
    note = "Least squares over the LCCP's own tokens N > 0, natural logarithm."
    yield table("t-law", "PPL = A ln N + B (section 7.1)", law, columns, note=note)
    shown = run.positions.merge(frames.pick_checkpoints(run.positions, run.lccp_from), on=frames.CHECKPOINT)
    at = (Column("from", "from_tok", length_text), Column("to", "to_tok", length_text))
    title = "Perplexity by position, of the checkpoints shown"
    yield table("t-positions", title, shown, (*_WHERE, corpus, *at, *values, tokens))


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


def event_table(run: RunFrames, key: str = "events") -> str:
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
    return table(key, counts, last, columns, note=note, open=len(last) <= 20)
