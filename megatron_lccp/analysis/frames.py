"""Rows -> the tidy frames that every figure, table and statement is made from.

In: frames as `RunStore.read_rows` returns them. Out: new frames, one line per checkpoint and coordinate, in the order
measured; empty frames with the right columns where nothing was measured. Pure functions. Of millions of rows with some
thirty columns each, every function takes the rows and the columns that it needs in one go.
A checkpoint is CHECKPOINT: where one stage ends and the next begins, the same step may be two checkpoints. A number
that is not finite stays visible: a mean over it is not finite either.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

CHECKPOINT = ["run", "step", "tokens", "stage"]
RETRIEVAL_THRESHOLD = 0.1  # appendix A.1 of the paper
TOP_HEADS = 30  # table 5 of the paper
MOST_SHOWN = 8
"""Checkpoints of a run that a table or a heat map shows."""


def checkpoints(frame: pd.DataFrame) -> pd.DataFrame:
    """The checkpoints of any frame here, in order."""
    return frame[CHECKPOINT].drop_duplicates().reset_index(drop=True)


def at_checkpoint(frame: pd.DataFrame, checkpoint: pd.Series) -> pd.DataFrame:
    """The lines of `frame` that belong to one line of `checkpoints(frame)`."""
    return frame[(frame[CHECKPOINT] == checkpoint[CHECKPOINT]).all(axis=1)]


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


def pick_checkpoints(frame: pd.DataFrame, tokens_from: int = 0, limit: int = MOST_SHOWN) -> pd.DataFrame:
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
    grouped = grouped.assign(_order=order).sort_values(["_order", *rest], kind="stable", ignore_index=True)
    return grouped.astype(dict.fromkeys(columns, "float64"))[[*by, *columns, "n"]]
