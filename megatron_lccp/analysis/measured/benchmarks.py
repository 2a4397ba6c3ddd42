"""Benchmark scores after a light fine-tuning (section 4 of the paper), from rows or from a CSV.

In: rows of probes, a CSV of scores measured elsewhere. Out: frames by benchmark, Figure 1, tables and signals.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from megatron_lccp.analysis.charts.chart import Chart, Curves
from megatron_lccp.analysis.charts.parts import (
    PAPER,
    Runs,
    checkpoints_text,
    lines_of_runs,
    over_tokens,
    whole,
)
from megatron_lccp.analysis.frames import CHECKPOINT, checkpoints, means, stage_spans
from megatron_lccp.analysis.measured.columns import WHERE, Column, number_cell, table
from megatron_lccp.analysis.measured.panels import generic_scalars, generic_signals, numbers
from megatron_lccp.analysis.measured.shown import Figure, Shown
from megatron_lccp.analysis.measured.signal import Signal, at_checkpoints
from megatron_lccp.analysis.run import HEAD_COLUMNS, Run
from megatron_lccp.records.store import EVENT_COLUMNS, rows_frame, steps_frame

SCORE_UNIT = ""
"""Of a score from a CSV: its unit is the file's."""

MOST_TOKENS = 1 << 62
"""More than any training has."""


def benchmarks(run: Run) -> pd.DataFrame:
    """Scores that monitors declare to be benchmarks (section 4, Figure 1): benchmark, score, n.

    A benchmark is named by its metric, and by its series if it has several: `pass_at_1 (mrcr)`.
    """
    parts = [
        numbers(run, measure).assign(benchmark=measure.metric.name)
        for measure in run.measures if measure.metric.benchmark
    ]  # fmt: skip
    if not parts:
        return pd.DataFrame(columns=[*CHECKPOINT, "benchmark", "score", "n"])
    found = pd.concat(parts, ignore_index=True)
    named = found["benchmark"] + " (" + found["label"].astype(str) + ")"
    found = found.assign(benchmark=found["benchmark"].where(found["label"] == "", named), score=found["value"])
    return means(found, [*CHECKPOINT, "benchmark"], ["score"])


def benchmark_scores(run: Run) -> pd.DataFrame:
    """`benchmarks` of a run, and the scores that were measured elsewhere."""
    parts = [part for part in (run.derived(benchmarks), run.scores) if part is not None]
    return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)


def with_scores(runs: Runs, path: str | Path | None) -> Runs:
    """The runs with the scores of a CSV, as `read_scores` reads it, if one is given. Raises ValueError as that does,
    and if it names a run that is not there."""
    if path is None:
        return runs
    points = pd.concat([checkpoints(run.rows) for run in runs], ignore_index=True)
    scores, names = read_scores(path, points), [run.name for run in runs]
    if strange := [name for name in scores["run"] if name not in names]:
        raise ValueError(f"{path}: run {strange[0]!r} is not among the runs of this report: {', '.join(names)}")
    return [replace(run, scores=scores[scores["run"] == run.name]) for run in runs]


def read_scores(path: str | Path, points: pd.DataFrame) -> pd.DataFrame:
    """Scores measured elsewhere, as `benchmarks`: a CSV with columns tokens, benchmark, score, and run where there are
    several. `points` are the checkpoints of the runs; a score belongs to the nearest one within 1 % of its tokens, if
    any, and of two at the same tokens to the later one.

    Raises ValueError in one line that names the file, and the column if one is wrong.
    """
    scores = _table(path)
    for column in ("tokens", "benchmark", "score"):
        if column not in scores:
            raise ValueError(f"{path}: no column {column}; a file of scores has tokens, benchmark, score (and run)")
    for column in ("tokens", "score"):
        found = pd.to_numeric(scores[column], errors="coerce")
        wrong = ~np.isfinite(found) | ((found < 0) | (found >= MOST_TOKENS) if column == "tokens" else False)
        if wrong.any():
            line, what = int(wrong.idxmax()), "number of tokens" if column == "tokens" else "number"
            raise ValueError(f"{path}:{line + 2}: {column} should be a {what}, is {str(scores[column][line])!r}")
    if (empty := scores["benchmark"].isna()).any():
        raise ValueError(f"{path}:{int(empty.idxmax()) + 2}: benchmark is empty; give it a name")
    if "run" not in scores:
        if len(names := points["run"].unique()) > 1:
            raise ValueError(
                f"{path}: no column run, which says to which of {len(names)} runs a score belongs: {', '.join(names)}"
            )
        scores["run"] = points["run"].iloc[0] if len(points) else ""
    found = []
    for score in scores.to_dict("records"):
        own = points[points["run"] == score["run"]]
        away = (own["tokens"] - score["tokens"]).abs()
        near = own[(away == away.min()) & (away <= 0.01 * abs(score["tokens"]))]
        place = near.iloc[-1] if len(near) else {"step": -1, "tokens": int(score["tokens"]), "stage": ""}
        found.append({"run": score["run"]} | {name: place[name] for name in CHECKPOINT[1:]}
                     | {"benchmark": str(score["benchmark"]), "score": float(score["score"]), "n": 1})  # fmt: skip
    found = pd.DataFrame(found, columns=[*CHECKPOINT, "benchmark", "score", "n"])
    return found.sort_values(["run", "tokens"], kind="stable", ignore_index=True)


def _table(path: str | Path) -> pd.DataFrame:
    """A CSV file as it is. Raises ValueError in one line for what is none, and for lines of more fields than columns,
    whose first ones pandas would take for an index."""
    if not Path(path).is_file():  # pandas would ask a server for an address
        why = (
            "is no file; name a CSV file of scores"
            if Path(path).exists()
            else "cannot be read: No such file or directory"
        )
        raise ValueError(f"{path}: {why}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            scores = pd.read_csv(path, dtype={"run": str, "benchmark": str}, index_col=False)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, pd.errors.ParserWarning) as error:
        raise ValueError(f"{path}: not a CSV file ({str(error).splitlines()[0]})") from error
    if twice := [name for name in scores if re.fullmatch(r"(tokens|benchmark|score|run)\.1", str(name))]:
        raise ValueError(f"{path}: has two columns {twice[0][:-2]}; give each a name of its own")
    if not len(scores):
        raise ValueError(f"{path}: has no scores; a line is tokens, benchmark, score (and run)")
    return scores


def benchmark_signals(run: Run) -> Iterator[Signal]:
    """Benchmarks that were measured, and those of a CSV, as signals of their own; of these, higher is better."""
    for measure in run.measures:
        if measure.metric.benchmark:
            yield from generic_signals(run, measure)
    if run.scores is not None:
        for name, part in run.scores.groupby("benchmark", sort=False):
            part = part.sort_values("tokens", kind="stable")
            values = part["score"].to_numpy(dtype=float)
            yield at_checkpoints(part, str(name), "behavioural", SCORE_UNIT, 1, values, judged=False, benchmark=True)


def scores_alone(path: str | Path) -> Run:
    """A run of which the scores of a CSV are all that is known, under the name of the file. Raises ValueError as
    `read_scores` does, and for scores of several runs."""
    scores = read_scores(path, pd.DataFrame(columns=CHECKPOINT))
    name = Path(path).stem
    if len(several := scores["run"].unique()) > 1:
        raise ValueError(f"{path}: holds {len(several)} runs ({', '.join(several)}); keep the lines of one")
    rows = rows_frame([])
    return Run(
        name=name, config_hash="", rows=rows, head_means=pd.DataFrame(columns=HEAD_COLUMNS), steps=steps_frame([]),
        spans=stage_spans(rows), lccp_from=0, health_means=pd.DataFrame(columns=CHECKPOINT),
        events=pd.DataFrame(columns=EVENT_COLUMNS), metrics={}, scores=scores.assign(run=name),
    )  # fmt: skip


def probe_benchmarks(runs: Runs) -> Chart:
    """Figure 1: scores of SFT probes, or of any benchmark given as a CSV, over training tokens."""
    frame = whole(
        (run.derived(benchmark_scores) for run in runs),
        "benchmark scores (Figure 1; --scores FILE.csv)",
    )
    names = frame["benchmark"].unique()
    lines = []
    for color, name in enumerate(names):
        lines += lines_of_runs(runs, frame[frame["benchmark"] == name], "score", name, color)
    caption = (
        f"Figure 1 of {PAPER}. Score of each benchmark after a light fine-tuning of the checkpoint, over the training "
        f"tokens of the checkpoint; {checkpoints_text(frame)}. Scores of a --scores file are shown as they are given."
    )
    return Curves("", "", caption, frame, (over_tokens(runs, lines, "benchmark score"),))


def benchmark_tables(run: Run) -> Iterator[str]:
    columns = (*WHERE, Column("benchmark", "benchmark", css="text"), Column("score", "score", number_cell))
    yield table("t-benchmarks", "Benchmark scores (Figure 1)", run.derived(benchmark_scores), columns)


SHOWN = Shown(
    place=10,
    claims=lambda measure: measure.metric.benchmark,
    figures=(Figure("probe-benchmarks", "Benchmarks after SFT probes", "behavioural", probe_benchmarks),),
    tables=(benchmark_tables,),
    signals=(benchmark_signals,),
    scalars=lambda run: {
        name: value
        for measure in run.measures if measure.metric.benchmark
        for name, value in generic_scalars(run, measure).items()
    },
)  # fmt: skip
