"""Attention heads: their retrieval scores and rankings (section 6 of the paper, appendix A.1).

In: rows with a layer and a head. Out: frames by head, Figures 4 and 5, tables, highlights and signals.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.charts.chart import Chart, Curves, Maps
from megatron_lccp.analysis.charts.parts import (
    PAPER,
    Runs,
    checkpoints_text,
    lines_of_runs,
    n_text,
    over_tokens,
    starts_of,
    whole,
)
from megatron_lccp.analysis.frames import (
    CHECKPOINT,
    RETRIEVAL_THRESHOLD,
    TOP_HEADS,
    checkpoints,
    means,
    start_checkpoint,
)
from megatron_lccp.analysis.measured.columns import (
    INTERVAL,
    WHERE,
    Column,
    count_cell,
    number_cell,
    table,
    three_digits,
    whole_column,
    with_interval,
)
from megatron_lccp.analysis.measured.highlight import Highlight, change_highlight, on_samples, start_and_end
from megatron_lccp.analysis.measured.shown import Block, Figure, Shown
from megatron_lccp.analysis.measured.signal import Signal, at_checkpoints, of_samples
from megatron_lccp.analysis.run import Run
from megatron_lccp.analysis.statistics.paired import Paired, head_samples
from megatron_lccp.analysis.statistics.rankings import overlaps, replaced_by_noise, top_of, top_overlap, trajectories
from megatron_lccp.schema import PUBLISHED
from megatron_lccp.text import tokens_text

MONITOR = "RetrievalHeads"
MOST_RANKED = 100
"""Checkpoints whose rankings are redrawn for head_overlap: the last ones."""


def head_scores(run: Run) -> pd.DataFrame:
    """Retrieval score of every head by checkpoint, layer and head (section 6.1, appendix A.1, Figure 4).

    score: mean over samples of the share of answer tokens that the head copies from the needle, in [0, 1], no success
    gate. needle_mass: mean attention on the needle, in [0, 1]; NaN where it was not measured. n: samples.
    """
    by, found = [*CHECKPOINT, "layer", "head"], run.head_means
    if (own := found["monitor"] == MONITOR).any():
        found = found[own]  # a grid may score heads too, on other samples and at other checkpoints
    score, mass = (
        _over_monitors(found[found["metric"] == metric], by) for metric in ("retrieval_score", "needle_mass")
    )
    heads = score.rename(columns={"value": "score"})
    heads = heads.merge(mass.drop(columns="n").rename(columns={"value": "needle_mass"}), on=by, how="left")
    return heads[[*by, "score", "needle_mass", "n"]]


def _over_monitors(means_h: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means of heads, of several grids the mean over the samples of all."""
    if not means_h.duplicated(by).any():
        order = means_h.sort_values(["run", "tokens", "step"], kind="stable").groupby(CHECKPOINT, sort=False).ngroup()
        sorted_h = means_h.assign(_order=order).sort_values(
            ["_order", "layer", "head"], kind="stable", ignore_index=True
        )
        return sorted_h[[*by, "value", "n"]]
    sums = (
        means_h.assign(value=means_h["value"] * means_h["n"])
        .groupby(by, sort=False, as_index=False)[["value", "n"]]
        .sum()
    )
    return sums.assign(value=sums["value"] / sums["n"])


def head_summary(
    scores: pd.DataFrame, threshold: float = RETRIEVAL_THRESHOLD, top_k: int = TOP_HEADS, tokens_from: int = 0
) -> pd.DataFrame:
    """What Figure 5 plots, one line per checkpoint and quantity; `n` is how many heads the value is over.

    retrieval_heads: number of heads with score > threshold, of n heads.
    initial_mean_score: mean score of the initial retrieval heads, those above the threshold at `start_checkpoint`. A
    young model may have none: then there is no such line. top_mean_score: mean score of the top_k heads of that
    checkpoint.
    """
    initial = scores.merge(start_checkpoint(scores, tokens_from), on=CHECKPOINT)
    initial = pd.MultiIndex.from_frame(initial.loc[initial["score"] > threshold, ["layer", "head"]])
    among = scores[pd.MultiIndex.from_frame(scores[["layer", "head"]]).isin(initial)]
    top = scores.dropna(subset=["score"]).sort_values("score", ascending=False, kind="stable")
    top = top.groupby(CHECKPOINT, sort=False).head(top_k)
    above = scores.assign(score=(scores["score"] > threshold).astype(float))
    counts = means(above, CHECKPOINT, ["score"])
    parts = {
        "retrieval_heads": counts.assign(score=(counts["score"] * counts["n"]).round()),
        "initial_mean_score": means(among, CHECKPOINT, ["score"]),
        "top_mean_score": means(top, CHECKPOINT, ["score"]),
    }
    lines = pd.concat([part.assign(quantity=name) for name, part in parts.items()]).rename(columns={"score": "value"})
    order = checkpoints(counts).reset_index(names="order")
    lines = lines.merge(order, on=CHECKPOINT).sort_values("order", kind="stable", ignore_index=True)
    return lines[[*CHECKPOINT, "quantity", "value", "n"]]


def retrieval_summary(run: Run) -> pd.DataFrame:
    """`head_summary` of a run, from the start of its LCCP."""
    return head_summary(run.derived(head_scores), run.threshold, tokens_from=run.lccp_from)


def head_trajectories(run: Run) -> pd.DataFrame:
    """What became of each retrieval head since the start of the LCCP, see `rankings.trajectories`."""
    return trajectories(run.rows, run.threshold, run.lccp_from)


def head_signals(run: Run) -> Iterator[Signal]:
    """Mean score of a frozen set of heads, how many retrieve, and how many of the top ones were replaced."""
    heads = head_samples(run.rows)
    if not len(heads):
        return
    score_kh = heads.value_kcs.mean(axis=2)
    tokens_k = heads.checkpoints["tokens"].to_numpy()
    start = max(0, int(np.searchsorted(tokens_k, run.lccp_from, side="right")) - 1)
    above_kh = score_kh > run.threshold
    if above_kh[start:].any():
        frozen_h = above_kh[start + above_kh[start:].any(axis=1).argmax()]
        scored = [measure for measure in run.measures if SHOWN.claims(measure)]
        metric = next((m for m in scored if m.monitor == MONITOR), scored[0]).metric
        yield of_samples("retrieval_score", metric, heads, frozen_h)
    count_k = above_kh.sum(axis=1).astype(float)  # no mean of samples: which heads pass is decided by all of them
    more = dict(resolution=1.0, bounds=(0.0, float(above_kh.shape[1])))
    yield at_checkpoints(heads.checkpoints, "retrieval_heads", "mechanistic", "heads", 1, count_k, margin=1.0, **more)
    yield _turnover(run, heads, score_kh)


def _turnover(run: Run, heads: Paired, score_kh: np.ndarray) -> Signal:
    """Top heads replaced over the last +25 % tokens, beyond those that the noise of single samples replaces, the same
    samples at both ends; needs several clusters."""
    lccp_k = heads.checkpoints["tokens"].to_numpy() - run.lccp_from
    top_k, numbers, values = top_of(score_kh.shape[1]), [], []
    for k in range(max(0, len(heads) - MOST_RANKED), len(heads)) if len(heads.clusters) > 1 else []:
        before = int(np.searchsorted(lccp_k, lccp_k[k] / 1.25, side="right")) - 1
        if lccp_k[k] > 0 and before >= 0:
            replaced = top_k - top_overlap(score_kh[before], score_kh[k], top_k)
            values.append(replaced - replaced_by_noise(heads.value_kcs[before].T, heads.value_kcs[k].T, top_k))
            numbers.append(k)
    return at_checkpoints(
        heads.checkpoints.iloc[numbers], "head_overlap", "mechanistic", "heads", 1, np.array(values), margin=1.0, resolution=1.0,
        turnover=True,
    )  # fmt: skip


def head_maps(runs: Runs) -> Chart:
    """Figure 4: retrieval score of every head."""
    missing = "retrieval scores (Figure 4; RetrievalHeads)"
    frame = whole((run.derived(head_scores) for run in runs), missing)
    caption = (
        f"Figure 4 of {PAPER}. The score of a head is the share of answer tokens for which the attention row that "
        "predicts the token has its maximum inside the needle, on a position that holds the same token (appendix A.1); "
        f"mean over n = {n_text(frame)} samples, no success gate. Dotted: retrieval heads, score above "
        f"{runs[0].threshold:g}. One colour scale for {checkpoints_text(frame, 'all ')}."
    )
    return Maps(
        "", "", caption, frame, "head", "layer", "score", "head", "layer", "retrieval score",
        threshold=runs[0].threshold, starts=starts_of(runs),
    )  # fmt: skip


def head_curves(runs: Runs) -> Chart:
    """Figure 5: number of retrieval heads, and mean score of the initial ones."""
    missing = "retrieval-head curves (Figure 5; RetrievalHeads)"
    frame = whole((run.derived(retrieval_summary) for run in runs), missing)
    part = {name: frame[frame["quantity"] == name] for name in frame["quantity"].unique()}
    count = lines_of_runs(runs, part["retrieval_heads"], "value", "", 0)
    scores = []
    for color, (name, text) in enumerate(
        [("initial_mean_score", "initial heads (n = {})"), ("top_mean_score", "top heads (n = {})")]
    ):
        if name in part:
            scores += lines_of_runs(runs, part[name], "value", text.format(n_text(part[name])), 1 + 2 * color)
    caption = (
        f"Figure 5 of {PAPER}. Left: heads with a score above {runs[0].threshold:g}, of "
        f"{n_text(part['retrieval_heads'])}. Right: mean score of the initial retrieval heads, those above "
        "the threshold "
        "in the model that the LCCP started from (no line if there were none), and of the top heads of each checkpoint."
    )
    left = over_tokens(runs, count, f"heads with score > {runs[0].threshold:g}", zero=True)
    panels = [left]
    if scores:  # of heads whose scores are all not numbers there is no mean
        panels.append(over_tokens(runs, scores, "mean retrieval score", zero=True))
    return Curves("", "", caption, frame, tuple(panels))


def head_tables(run: Run) -> Iterator[str]:
    if not len(run.derived(head_scores)):
        return
    names = {
        "retrieval_heads": f"heads above {run.threshold:g} (count)",
        "initial_mean_score": "mean score of the initial heads",
        "top_mean_score": "mean score of the top heads",
    }
    columns = (
        *WHERE,
        Column("quantity", "quantity", names.__getitem__, "text"),
        Column("value", "value", number_cell),
        Column("over heads", "n", count_cell),
    )
    yield table("t-heads", "Retrieval heads over training (Figure 5)", run.derived(retrieval_summary), columns)
    now = frames.at_checkpoint(run.derived(head_scores), frames.checkpoints(run.derived(head_scores)).iloc[-1])
    start = run.derived(head_scores).merge(
        frames.start_checkpoint(run.derived(head_scores), run.lccp_from), on=frames.CHECKPOINT
    )
    start = start[["layer", "head", "score"]].rename(columns={"score": "start"})
    top = now.nlargest(frames.TOP_HEADS, "score").merge(start, on=["layer", "head"], how="left")
    columns = (
        Column("layer", "layer", count_cell),
        Column("head", "head", count_cell),
        Column("score", "score", number_cell),
        Column("at the start of the LCCP", "start", number_cell),
        Column("needle mass", "needle_mass", number_cell),
        Column("samples", "n", count_cell),
    )
    yield table("t-top", f"Top {len(top)} heads at the last checkpoint", top, columns)


def retrieval_heads_highlight(run: Run) -> Iterator[Highlight]:
    if not len(run.derived(head_scores)):
        return
    counts = run.derived(retrieval_summary)[run.derived(retrieval_summary)["quantity"] == "retrieval_heads"]
    first, last = start_and_end(counts, run)
    now = frames.at_checkpoint(run.derived(head_scores), frames.checkpoints(run.derived(head_scores)).iloc[-1]).dropna(
        subset=["score"]
    )
    note = f"of {int(last['n'].iloc[0])} heads, score > {run.threshold:g}"
    if len(now):
        best = now.loc[now["score"].idxmax()]
        when = " at the end" if now["stage"].iloc[0] != PUBLISHED else ""
        note += f"; the best{when} is layer {best['layer']} head {best['head']} with {best['score']:.2f}"
    above = lambda score: (score > run.threshold).sum(axis=-1)  # noqa: E731
    change = on_samples(head_samples(run.rows), first, last, "{:+.0f}".format, above)
    yield change_highlight("Retrieval heads", first, last, "value", note, change, "{:.0f}".format, ratio=False)


def scored_overlaps(run: Run) -> pd.DataFrame:
    """`rankings.overlaps` of a run that scored heads; else nothing, not even columns."""
    return run.frame(overlaps) if len(run.derived(head_scores)) else pd.DataFrame()


def scored_trajectories(run: Run) -> pd.DataFrame:
    """The same of `head_trajectories`."""
    return run.derived(head_trajectories) if len(run.derived(head_scores)) else pd.DataFrame()


def overlaps_table(run: Run):
    frame = scored_overlaps(run)
    if len(frame):
        pairs = zip(frame["tokens_from"], frame["tokens_to"], strict=True)
        floors = zip(frame["overlap_floor"], frame["overlap_floor_low"], frame["overlap_floor_high"], strict=True)
        frame = frame.assign(
            between=[f"{tokens_text(a)} → {tokens_text(b)}" for a, b in pairs],
            share=[f"{overlap:.0f}/{k:.0f}" for overlap, k in zip(frame["overlap"], frame["top_k"], strict=True)],
            floor=[f"{floor:.1f} [{low:.0f}, {high:.0f}]" for floor, low, high in floors],
            moved=frame["changed"].map({True: "yes", False: "within noise"}),
        ).tail(30)
    columns = (
        Column("checkpoints", "between", css="text"), Column("overlap", "share"),
        Column("same model, other samples", "floor"), Column("changed?", "moved", css="text"),
        Column("Spearman, all heads", "spearman", three_digits), Column("its floor", "spearman_floor", three_digits),
        Column("Spearman, top heads", "spearman_top", three_digits), Column("its floor", "spearman_top_floor", three_digits),
        whole_column("samples", "samples"),
    )  # fmt: skip
    note = (
        "Heads that are among the top ones at both of two consecutive checkpoints, beside the noise floor: how far one "
        "unchanged model overlaps with itself when its samples are drawn anew (mean, 5 % to 95 %). The ranking is "
        "known no better, and an overlap within that range is not called a change; head_overlap in the verdict "
        "compares the same samples, and sees smaller changes. Spearman: over all heads, and over those in either top."
    )
    return "Top heads from checkpoint to checkpoint (table 5)", frame, columns, note


def trajectories_table(run: Run):
    frame = scored_trajectories(run)
    if len(frame):
        frame = frame.sort_values("last_score", ascending=False, kind="stable").head(frames.TOP_HEADS)
    columns = (
        whole_column("layer", "layer"), whole_column("head", "head"), Column("what became of it", "kind", css="text"),
        Column("first score", "first_score", three_digits), Column("last score", "last_score", three_digits),
        Column("change", "change", lambda v: f"{v:+.3f}"), INTERVAL, Column("best score", "best_score", three_digits),
        Column("first above at", "appeared_tokens", tokens_text),
    )  # fmt: skip
    note = (
        f"Heads that were ever above {run.threshold:g}, at most the best {frames.TOP_HEADS} at the end, from the "
        "start of the LCCP. The change is paired over samples."
    )
    return "What became of the retrieval heads", with_interval(frame), columns, note


def head_scalars(run: Run) -> dict[str, float]:
    """The lines of Figure 5, and the mean over all heads, at the last checkpoint."""
    scores = run.derived(head_scores)
    if not len(scores):
        return {}
    last = checkpoints(scores).iloc[-1]
    summary = frames.at_checkpoint(run.derived(retrieval_summary), last)
    values = {f"heads/{line.quantity}": line.value for line in summary.itertuples()}
    return values | {"heads/mean_score": frames.at_checkpoint(scores, last)["score"].mean()}


SHOWN = Shown(
    place=50,
    claims=lambda measure: measure.metric.name == "retrieval_score" and {*measure.metric.axes} == {"head", "layer"},
    figures=(
        Figure("head-cells", "Retrieval score of every head", "mechanistic", head_maps, of_window=True),
        Figure("head-curves", "Number and strength of retrieval heads", "mechanistic", head_curves),
    ),
    tables=(head_tables,),
    highlights=(retrieval_heads_highlight,),
    signals=(head_signals,),
    blocks=(
        Block("t-overlap", "mechanistic", overlaps_table),
        Block("t-trajectories", "mechanistic", trajectories_table),
    ),
    frames={
        "overlaps": scored_overlaps, "trajectories": scored_trajectories,
    },
    scalars=head_scalars,
)  # fmt: skip
