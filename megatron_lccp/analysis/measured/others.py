"""What has no file of its own here.

In: rows of any monitor. Out: frames and tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from megatron_lccp.analysis.frames import CHECKPOINT
from megatron_lccp.analysis.measured.benchmarks import BENCHMARK_MONITORS
from megatron_lccp.analysis.run import Run
from megatron_lccp.schema import COORDINATES


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


def other_numbers(run: Run) -> pd.DataFrame:
    """`other_scalars` of a run, without benchmarks."""
    return other_scalars(run.rows, but=BENCHMARK_MONITORS)
