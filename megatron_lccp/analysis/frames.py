"""Rows -> the tidy frames that every figure, table and statement is made from.

In: frames as `RunStore.read_rows` returns them. Out: new frames, one line per checkpoint and coordinate, in the order
measured; empty frames with the right columns where nothing was measured. Pure functions. Of millions of rows with some
thirty columns each, every function takes the rows and the columns that it needs in one go.
A checkpoint is CHECKPOINT: where one stage ends and the next begins, the same step may be two checkpoints. A number
that is not finite stays visible: a mean over it is not finite either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyarrow as pa

from megatron_lccp.schema import COORDINATES

CHECKPOINT = ["run", "step", "tokens", "stage"]
RETRIEVAL_THRESHOLD = 0.1  # appendix A.1 of the paper
TOP_HEADS = 30  # table 5 of the paper


def checkpoints(frame: pd.DataFrame) -> pd.DataFrame:
    """The checkpoints of any frame here, in order."""
    return frame[CHECKPOINT].drop_duplicates().reset_index(drop=True)


def at_checkpoint(frame: pd.DataFrame, checkpoint: pd.Series) -> pd.DataFrame:
    """The lines of `frame` that belong to one line of `checkpoints(frame)`."""
    return frame[(frame[CHECKPOINT] == checkpoint[CHECKPOINT]).all(axis=1)]


def needle_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells of the needle grid (section 5.1, Figure 2) by checkpoint, length_tok and depth_cell.

    mean_ppl: mean over samples of exp(answer NLL), as in the paper. exp_mean_nll: exp of the mean answer NLL; a
    single bad sample weighs less in it. exact_share: share of samples whose every answer token is the argmax; NaN
    where it was not measured. n: samples.
    """
    return answer_cells(rows, rows["length_tok"].notna() & rows["depth_cell"].notna(), ["length_tok", "depth_cell"])


def answer_cells(rows: pd.DataFrame, where: pd.Series, axes: list[str]) -> pd.DataFrame:
    """Rows `answer_nll` and `exact`, of those that are meant, as cells over two coordinates; columns as in
    `needle_cells`."""
    by = [*CHECKPOINT, *axes]
    nll = rows.loc[where & (rows["metric"] == "answer_nll"), [*by, "value"]]
    with np.errstate(over="ignore"):
        cells = means(nll.assign(mean_ppl=np.exp(nll["value"]), mean_nll=nll["value"]), by, ["mean_ppl", "mean_nll"])
        cells["exp_mean_nll"] = np.exp(cells.pop("mean_nll"))
    exact = rows.loc[where & (rows["metric"] == "exact"), [*by, "value"]].rename(columns={"value": "exact_share"})
    cells = cells.merge(means(exact, by, ["exact_share"]).drop(columns="n"), on=by, how="left")
    return cells[[*by, "mean_ppl", "exp_mean_nll", "exact_share", "n"]]


def needle_averages(cells: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Averages of `needle_cells`, each cell weighing the same, per checkpoint (section 5.2, Figure 3).

    `by=["length_tok"]` gives one line per length, `by=["depth_cell"]` the depth curve of section 7.2. exp_mean_nll is
    exp of the mean NLL. cells: how many were averaged; n: their samples.
    """
    by = [*CHECKPOINT, *by]
    with np.errstate(divide="ignore"):
        cells = cells.assign(mean_nll=np.log(cells["exp_mean_nll"].astype(float)))
    averages = means(cells, by, ["mean_ppl", "mean_nll", "exact_share"]).rename(columns={"n": "cells"})
    averages["exp_mean_nll"] = np.exp(averages.pop("mean_nll"))
    samples = cells.groupby(by, sort=False, as_index=False)["n"].sum()
    averages = averages.merge(samples, on=by, how="left")
    return averages[[*by, "mean_ppl", "exp_mean_nll", "exact_share", "cells", "n"]]


def head_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Retrieval score of every head by checkpoint, layer and head (section 6.1, appendix A.1, Figure 4).

    score: mean over samples of the share of answer tokens that the head copies from the needle, in [0, 1], no success
    gate. needle_mass: mean attention on the needle, in [0, 1]; NaN where it was not measured. n: samples.
    """
    by = [*CHECKPOINT, "layer", "head"]
    of_head = rows["layer"].notna() & rows["head"].notna()
    if (own := of_head & (rows["monitor"] == "RetrievalHeads")).any():
        of_head = own  # a grid may score heads too, on other samples and at other checkpoints
    score, mass = (
        rows.loc[of_head & (rows["metric"] == metric), [*by, "value"]].rename(columns={"value": name})
        for metric, name in (("retrieval_score", "score"), ("needle_mass", "needle_mass"))
    )
    heads = means(score, by, ["score"])
    heads = heads.merge(means(mass, by, ["needle_mass"]).drop(columns="n"), on=by, how="left")
    return heads[[*by, "score", "needle_mass", "n"]]


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


def corpus_ppl(rows: pd.DataFrame) -> pd.DataFrame:
    """Perplexity of each held-out corpus by checkpoint (section 7.1, Figure 6): nll in nat per token, ppl, n tokens.

    length_tok is the tokens of a sequence; `label` tells the series apart, the corpus and, if there are several, the
    length.
    """
    rows = rows[(rows["metric"] == "nll") & rows["corpus"].notna()]
    rows = rows.sort_values(["run", "tokens", "step"], kind="stable").reset_index(drop=True)
    label = rows["corpus"]
    if rows["length_tok"].nunique(dropna=False) > 1:
        label = label + " (" + rows["length_tok"].astype("string").fillna("?") + " tok)"
    with np.errstate(over="ignore"):
        rows = rows.assign(nll=rows["value"], ppl=np.exp(rows["value"]), label=label)
    return rows[[*CHECKPOINT, "corpus", "length_tok", "label", "nll", "ppl", "n"]]


def window_times(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds each monitor took by checkpoint: monitor, time_s."""
    rows = rows[rows["metric"] == "window_time"].sort_values(["run", "tokens", "step"], kind="stable")
    return rows[[*CHECKPOINT, "monitor", "value"]].rename(columns={"value": "time_s"}).reset_index(drop=True)


def other_scalars(rows: pd.DataFrame, but: Sequence[str] = ()) -> pd.DataFrame:
    """Numbers of monitors that nothing here knows, whole or by corpus: monitor, metric, value, unit, n; not those of
    the monitors `but`.

    The metric of a corpus carries its name, as in `top_one (code)`.
    """
    coordinates = [name for name in COORDINATES if name != "corpus"]
    whole = rows["metric"].ne("window_time") & ~rows["monitor"].isin(but)
    for name in coordinates:
        whole &= rows[name].isna()
    rows = rows[whole]
    rows = rows.sort_values(["run", "tokens", "step"], kind="stable")
    of_corpus = rows["metric"].astype(str) + " (" + rows["corpus"].astype(str) + ")"
    rows = rows.assign(metric=rows["metric"].astype(str).where(rows["corpus"].isna(), of_corpus))
    return rows[[*CHECKPOINT, "monitor", "metric", "value", "unit", "n"]].reset_index(drop=True)


def changed_sample_sets(rows: pd.DataFrame) -> list[str]:
    """Metrics whose samples (by hash of their set) are not the same ones at all checkpoints that measured them."""
    by = ["monitor", "metric", *CHECKPOINT]
    sets = rows.loc[rows["sample_set"].notna(), [*by, "sample_set"]].assign(one=1.0)
    sets = means(sets, [*by, "sample_set"], ["one"]).groupby(by)["sample_set"].agg(frozenset)
    changed = [metric for (_, metric), found in sets.groupby(level=["monitor", "metric"]) if len(set(found)) > 1]
    return sorted(map(str, set(changed)))


def stage_spans(frame: pd.DataFrame) -> pd.DataFrame:
    """The stages of a run in order, from steps or rows: stage, tokens_from, tokens_to (all training so far).

    A stage begins where the one before it ended, the first at 0.
    """
    spans = frame.groupby("stage", sort=False)["tokens"].agg(["min", "max"]).sort_values(["max", "min"], kind="stable")
    ends = spans["max"].tolist()
    starts = [0, *ends][: len(ends)]
    return pd.DataFrame({"stage": spans.index, "tokens_from": starts, "tokens_to": ends})


def lccp_from(spans: pd.DataFrame) -> int:
    """Tokens at which the long-context continual pre-training begins: with the first stage that has `lccp` in its name,
    otherwise with the last stage."""
    if not len(spans):
        return 0
    named = spans[spans["stage"].str.lower().str.contains("lccp", regex=False)]
    return int((named if len(named) else spans.tail(1))["tokens_from"].iloc[0])


def start_checkpoint(frame: pd.DataFrame, tokens_from: int) -> pd.DataFrame:
    """The model that the LCCP started from, "0B" in the paper: one line, or none for an empty frame.

    It is the last checkpoint at or before `tokens_from`, or the first one if all are later.
    """
    points = checkpoints(frame)
    before = points[points["tokens"] <= tokens_from]
    return before.tail(1) if len(before) else points.head(1)


def pick_checkpoints(frame: pd.DataFrame, tokens_from: int = 0, limit: int = 8) -> pd.DataFrame:
    """At most `limit` (>= 2) checkpoints of `frame`, evenly over their order, from `start_checkpoint` to the last."""
    points = checkpoints(frame)
    points = points.loc[start_checkpoint(points, tokens_from).index.min() :] if len(points) else points
    chosen = np.unique(np.linspace(0, len(points) - 1, min(limit, len(points))).round().astype(int))
    return points.iloc[chosen].reset_index(drop=True)


def means(frame: pd.DataFrame, by: list[str], columns: list[str]) -> pd.DataFrame:
    """Means of `columns` and the number of lines `n` per group, checkpoints in order; NaN in, NaN out.

    By Arrow: a long run has a line per sample and head, millions of them.
    """
    table = pa.table({name: pa.array(frame[name], from_pandas=False) for name in [*by, *columns]})
    wanted = [*((name, "mean") for name in columns), ([], "count_all")]
    grouped = table.group_by(by, use_threads=False).aggregate(wanted).to_pandas()
    grouped = grouped.rename(columns={f"{name}_mean": name for name in columns} | {"count_all": "n"})
    grouped = grouped.astype({name: frame[name].dtype for name in by}).sort_values(
        ["run", "tokens", "step"], kind="stable"
    )
    order = grouped.groupby(CHECKPOINT, sort=False).ngroup()
    rest = [name for name in by if name not in CHECKPOINT]
    grouped = grouped.assign(order=order).sort_values(["order", *rest], kind="stable", ignore_index=True)
    return grouped.astype(dict.fromkeys(columns, "float64"))[[*by, *columns, "n"]]
