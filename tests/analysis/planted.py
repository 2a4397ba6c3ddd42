"""Rows with known answers for the tests of what is concluded from rows.

In: numbers per sample or head. Out: Rows as a run would have written them, and the frame they are read as.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from megatron_lccp.analysis.run import Run, make_run
from megatron_lccp.records.store import RunStore, rows_frame, steps_frame
from megatron_lccp.schema import Metric, Monitor, Row


def declare(store: RunStore, monitor: str, *metrics: Metric) -> None:
    """Keep what a monitor of this name declares, as a training does before it measures."""
    kind = type(monitor, (Monitor,), {"metrics": metrics, "measure": lambda self, window: ()})
    store.write_metrics([kind()])


def row(monitor: str, metric: str, value: float, unit: str, *, tokens: int, n: int = 1, **where) -> Row:
    """A row of stage `lccp`; a step is a token."""
    place = dict(run="planted", config_hash="c0ffee", step=tokens, tokens=tokens, stage="lccp")
    return Row(**place, monitor=monitor, metric=metric, value=float(value), unit=unit, n=n, **where)


def needle_rows(value_s: Iterable[float], *, tokens: int, metric: str = "answer_nll", **cell) -> list[Row]:
    """One cell of the needle grid; `cell` is length_tok and depth_cell."""
    unit = "nat" if metric == "answer_nll" else "share"
    who = dict(family="biography", sample_set="5eed", depth=cell["depth_cell"])
    return [
        row("NeedleGrid", metric, value, unit, tokens=tokens, sample=sample, **who, **cell)
        for sample, value in enumerate(value_s)
    ]


def head_rows(score_lhs: np.ndarray, *, tokens: int) -> list[Row]:
    """Retrieval scores [layers, heads, samples]."""
    who = dict(family="biography", sample_set="b105", length_tok=1024, depth_cell=0.5)
    return [
        row("RetrievalHeads", "retrieval_score", value, "share", tokens=tokens, layer=layer, head=head, sample=s, **who)
        for (layer, head, s), value in np.ndenumerate(score_lhs)
    ]


def table(rows: Iterable[Row]) -> pd.DataFrame:
    """The frame that a store of these rows would give."""
    return rows_frame(rows)


def run_of(rows: pd.DataFrame) -> Run:
    """A run of which these rows are all that is known."""
    return make_run(rows, steps_frame([]))
