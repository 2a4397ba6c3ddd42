"""The interference grid: how much text before the needle disturbs, at a fixed distance (section 7.3 of the paper).

In: rows of InterferenceGrid. Out: cells by before and after, Figures 8 and 9, tables and signals.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from megatron_lccp.analysis.charts.chart import Chart, Curves, Maps, Panel
from megatron_lccp.analysis.charts.parts import (
    PAPER,
    SHOWN_CURVES,
    Runs,
    checkpoints_text,
    is_wide,
    lines_of_checkpoints,
    n_text,
    panels_of_runs,
    picked,
    starts_of,
    whole,
)
from megatron_lccp.analysis.measured.columns import (
    VALUES,
    WHERE,
    Column,
    count_cell,
    table,
)
from megatron_lccp.analysis.measured.needles import ANSWERS, AVERAGED, MEAN_PPL, answer_cells, needle_averages
from megatron_lccp.analysis.measured.shown import Figure, Shown
from megatron_lccp.analysis.measured.signal import Signal, of_samples
from megatron_lccp.analysis.run import Run
from megatron_lccp.analysis.statistics.paired import paired
from megatron_lccp.text import length_text

MONITOR = "InterferenceGrid"


def interference_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells of the interference grid (section 7.3, Figure 8) by before_tok and after_tok; columns as needle_cells."""
    return answer_cells(rows[rows["monitor"] == MONITOR], ["before_tok", "after_tok"])


def interference_maps(runs: Runs) -> Chart:
    """Figure 8: answer PPL by absolute distance and interference."""
    missing = "interference maps (Figure 8; InterferenceGrid)"
    frame = whole((run.frame(interference_cells) for run in runs), missing)
    caption = (
        f"Figure 8 of {PAPER}. A cell is {MEAN_PPL}, n = {n_text(frame)} samples. Across: tokens between needle and "
        "question (absolute distance). Down: tokens of text before the needle (interference). One logarithmic colour "
        f"scale for {checkpoints_text(frame, 'all ')}."
    )
    return Maps(
        "", "", caption, frame, "after_tok", "before_tok", "mean_ppl", "tokens after the needle",
        "tokens before the needle", "answer PPL", "length", "length", log=True, starts=starts_of(runs),
    )  # fmt: skip


def interference_curves(runs: Runs) -> Chart:
    """Figure 9: answer PPL over interference at one distance."""
    missing = "interference curves (Figure 9; InterferenceGrid)"
    measured = whole((run.frame(interference_cells) for run in runs), missing)
    distances = np.sort(measured["after_tok"].unique().astype(int))
    distance = 16384 if 16384 in distances else int(distances[len(distances) // 2])

    def cells_of(run: Run) -> pd.DataFrame:
        cells = run.frame(interference_cells)
        return cells[cells["after_tok"] == distance]

    def panels_of(run: Run, part: pd.DataFrame) -> Iterator[Panel]:
        lines, log = lines_of_checkpoints(part, "mean_ppl"), is_wide(part["mean_ppl"])
        yield Panel("before_tok", "tokens before the needle", "answer PPL", lines, "", "length", log_y=log)

    frame, panels = panels_of_runs(runs, cells_of, panels_of)
    caption = (
        f"Figure 9 of {PAPER}. Answer PPL is {MEAN_PPL}, n = {n_text(measured)} samples, with the question always "
        f"{length_text(distance)} tokens behind the needle and more and more text before it: a flat line is a model "
        f"that is not distracted. {SHOWN_CURVES}"
    )
    return Curves("", "", caption, frame, panels)


def interference_tables(run: Run) -> Iterator[str]:
    columns = (
        *WHERE,
        Column("before", "before_tok", length_text),
        Column("after", "after_tok", length_text),
        *VALUES,
        Column("samples", "n", count_cell),
    )
    shown = picked(run, run.frame(interference_cells))
    yield table("t-interference", "Interference cells of the checkpoints shown (Figures 8 and 9)", shown, columns)


def interference_signals(run: Run) -> Iterator[Signal]:
    """Exact answers and the answer's NLL over the whole grid; both of names and values."""
    for name in ANSWERS:
        rows = run.rows[(run.rows["monitor"] == MONITOR) & (run.rows["metric"] == name)]
        if (MONITOR, name) in run.metrics and len(found := paired(rows, ["before_tok", "after_tok"])):
            yield of_samples(f"{MONITOR}.{name}", run.metric(MONITOR, name), found)


def interference_scalars(run: Run) -> dict[str, float]:
    """Averages over the grid at the last checkpoint."""
    averages = needle_averages(run.frame(interference_cells))
    if not len(averages):
        return {}
    return {f"interference/{name}": averages[name].iloc[-1] for name in AVERAGED}


SHOWN = Shown(
    place=30,
    claims=lambda measure: measure.monitor == MONITOR and measure.metric.name in ANSWERS,
    figures=(
        Figure(
            "interference-cells", "Answer PPL by distance and interference", "probabilistic", interference_maps,
            of_window=True,
        ),
        Figure("interference-curves", "Robustness to interference", "probabilistic", interference_curves),
    ),
    tables=(interference_tables,),
    signals=(interference_signals,),
    scalars=interference_scalars,
)  # fmt: skip
