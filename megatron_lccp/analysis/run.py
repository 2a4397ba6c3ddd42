"""A run directory as the frames that the report is made from.

In: a directory that `lccp train` wrote (or any loop, through RunStore). Out: one RunFrames. Only reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from megatron_lccp.analysis import frames
from megatron_lccp.records import RunStore


@dataclass(frozen=True)
class RunFrames:
    """What a run measured; each frame is described where it is made, in `records` and `frames`."""

    name: str
    """Name of the run."""
    config_hash: str
    """Hash of the configuration; several, in order, if it was changed on the way."""
    config_text: str
    """The resolved configuration, YAML; empty if it was not kept."""
    spans: pd.DataFrame
    """Stages in order: stage, tokens_from, tokens_to."""
    lccp_from: int
    """Tokens at which the LCCP begins."""
    steps: pd.DataFrame
    events: pd.DataFrame
    cells: pd.DataFrame
    averages: pd.DataFrame
    scores: pd.DataFrame
    heads: pd.DataFrame
    corpora: pd.DataFrame
    windows: pd.DataFrame
    others: pd.DataFrame
    changed_sets: tuple[str, ...]
    """Metrics whose sample set is not the same at all checkpoints, so that differences are not paired."""
    rows: pd.DataFrame
    """All rows of the windows, as measured: what the other frames are averages of."""
    threshold: float = frames.RETRIEVAL_THRESHOLD
    """Score above which a head is a retrieval head."""


def load_run(run_dir: str | Path, threshold: float = frames.RETRIEVAL_THRESHOLD) -> RunFrames:
    """Read a run directory. Raises ValueError in one line if it is none, or if nothing was measured in it yet."""
    store = RunStore(run_dir)
    if not store.exists():
        raise ValueError(
            f"{run_dir}: not a run directory (no rows/, no steps.jsonl); give the `dir` of a run's configuration"
        )
    rows = store.read_rows(health=False)
    if not len(rows):
        raise ValueError(f"{run_dir}: no rows in rows/; a run measures the first at step 0 if its `monitors` name any")
    steps = store.read_steps()
    spans = frames.stage_spans(steps if len(steps) else rows)
    start, cells, scores = frames.lccp_from(spans), frames.needle_cells(rows), frames.head_scores(rows)
    return RunFrames(
        name=str(rows["run"].iloc[-1]),
        config_hash=", ".join(rows["config_hash"].unique()),
        config_text=store.config_path.read_text(encoding="utf-8") if store.config_path.is_file() else "",
        spans=spans,
        lccp_from=start,
        steps=steps,
        events=store.read_events(),
        cells=cells,
        averages=frames.needle_averages(cells),
        scores=scores,
        heads=frames.head_summary(scores, threshold, tokens_from=start),
        corpora=frames.corpus_ppl(rows),
        windows=frames.window_times(rows),
        others=frames.other_scalars(rows),
        changed_sets=tuple(frames.changed_sample_sets(rows)),
        rows=rows,
        threshold=threshold,
    )
