"""A run directory as the frames that the report is made from.

In: directories that `lccp train` wrote (or any loop, through RunStore), or W&B's folders of such runs, which hold the
same. Out: a RunFrames for each. Only reads.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc

from megatron_lccp.analysis import frames, measures
from megatron_lccp.records.store import EVENT_COLUMNS, RunStore
from megatron_lccp.records.wandb import RECORD, find_records, folder_name


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
    interference: pd.DataFrame
    positions: pd.DataFrame
    ablations: pd.DataFrame
    health: pd.DataFrame
    benchmarks: pd.DataFrame
    """Scores of SFT probes: from rows, and from a CSV if one was given."""
    changed_sets: tuple[str, ...]
    """Metrics whose sample set is not the same at all checkpoints, so that differences are not paired."""
    rows: pd.DataFrame
    """Rows of all windows, but for head scores that nothing here is made from (OTHER_HEAD_SCORES)."""
    threshold: float = frames.RETRIEVAL_THRESHOLD
    """Score above which a head is a retrieval head."""


OTHER_HEAD_SCORES = ("content_score", "wu2024", "mass_minus_null")


def load_runs(run_dirs: Sequence[str | Path], scores: str | Path | None = None) -> list[RunFrames]:
    """Read several run directories (or folders, as run_folders takes them) under names that tell them apart.

    `scores` is a CSV as in `measures.read_scores`. Raises ValueError as load_run does, or if the CSV names a run that
    is not there.
    """
    found = run_folders(run_dirs)
    runs = [load_run(path) for path in found]
    count, folders = Counter(run.name for run in runs), _names(found)
    runs = [
        run if count[run.name] == 1 else load_run(path, name=f"{run.name} ({folder})")
        for run, path, folder in zip(runs, found, folders, strict=True)
    ]
    return runs if scores is None else _with_scores(runs, scores)


def _names(folders: Sequence[Path]) -> list[str]:
    """The name of each folder, or where it is from what all have in common if that name is another's too."""
    names, whole = [folder_name(folder) for folder in folders], [folder.resolve() for folder in folders]
    common = os.path.commonpath(whole)
    return [
        name if names.count(name) == 1 else path.relative_to(common).as_posix()
        for name, path in zip(names, whole, strict=True)
    ]


def run_folders(run_dirs: Sequence[str | Path]) -> list[Path]:
    """The run directories meant, each once: of a folder that is none itself, those right in it; of W&B's folder `wandb`
    or `offline-run-*`, or of one that holds such, the record of each W&B run."""
    return list(dict.fromkeys(path for folder in map(Path, run_dirs) for path in _runs_in(folder)))


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself if it is a run directory, else those in it that measured something; else itself, to be
    refused."""
    if RunStore(folder).exists() or not folder.is_dir():
        return [folder]
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    return find_records(folder) or [
        path for each in inside for path in ([each] if RunStore(each).windows() else find_records(each))
    ] or [folder]  # fmt: skip


def _with_scores(runs: list[RunFrames], path: str | Path) -> list[RunFrames]:
    points = pd.concat([frames.checkpoints(run.rows) for run in runs], ignore_index=True)
    scores, names = measures.read_scores(path, points), [run.name for run in runs]
    if strange := [name for name in scores["run"] if name not in names]:
        raise ValueError(f"{path}: run {strange[0]!r} is not among the runs of this report: {', '.join(names)}")
    parts = [scores[scores["run"] == name] for name in names]
    return [
        replace(run, benchmarks=pd.concat([run.benchmarks, part], ignore_index=True) if len(run.benchmarks) else part)
        for run, part in zip(runs, parts, strict=True)
    ]


def load_run(run_dir: str | Path, threshold: float = frames.RETRIEVAL_THRESHOLD, name: str | None = None) -> RunFrames:
    """Read a run directory, or a folder that holds one run, and call the run `name`. Raises ValueError in one line if
    there is none, or several, or if nothing was measured in it yet."""
    found = run_folders([run_dir])
    if len(found) > 1:
        raise ValueError(f"{run_dir}: holds {len(found)} runs ({', '.join(map(folder_name, found))}); give one of them")
    store = RunStore(found[0])
    if not store.exists():
        raise ValueError(
            f"{run_dir}: not a run directory (no rows/, no steps.jsonl), nor W&B's folder of one (no offline-run-*/"
            f"{RECORD}); give the `dir` of a run's configuration, or its wandb folder"
        )
    rows = store.read_rows(health=False, where=~pc.field("metric").isin(OTHER_HEAD_SCORES))
    if not len(rows):
        raise ValueError(f"{run_dir}: no rows in rows/; a run measures the first at step 0 if its `monitors` name any")
    healthy = store.read_means([*frames.CHECKPOINT, "metric"], pc.field("monitor") == "health")
    rows["run"] = healthy["run"] = name or str(rows["run"].iloc[-1])  # a directory is one run, also if it was renamed
    config = store.config_path.read_text(encoding="utf-8", errors="replace") if store.config_path.is_file() else ""
    run = make_run(rows, store.read_steps(), healthy, threshold)
    return replace(run, events=store.read_events(), config_text=config)


def make_run(
    rows: pd.DataFrame,
    steps: pd.DataFrame,
    healthy: pd.DataFrame | None = None,
    threshold: float = frames.RETRIEVAL_THRESHOLD,
) -> RunFrames:
    """What rows (at least one), steps, and averages of training health by step say; no events, no configuration."""
    if healthy is None:
        healthy = pd.DataFrame(columns=[*frames.CHECKPOINT, "metric", "value", "low", "high", "n"])
    spans = frames.stage_spans(steps if len(steps) else rows)
    start, cells, scores = frames.lccp_from(spans), frames.needle_cells(rows), frames.head_scores(rows)
    return RunFrames(
        name=str(rows["run"].iloc[-1]),
        config_hash=", ".join(rows["config_hash"].unique()),
        config_text="",
        spans=spans,
        lccp_from=start,
        steps=steps,
        events=pd.DataFrame(columns=EVENT_COLUMNS),
        cells=cells,
        averages=frames.needle_averages(cells),
        scores=scores,
        heads=frames.head_summary(scores, threshold, tokens_from=start),
        corpora=frames.corpus_ppl(rows),
        windows=frames.window_times(rows),
        others=frames.other_scalars(rows, but=measures.BENCHMARK_MONITORS),
        interference=measures.interference_cells(rows),
        positions=measures.position_ppl(rows),
        ablations=measures.ablations(rows),
        health=measures.health(healthy),
        benchmarks=measures.benchmarks(rows),
        changed_sets=tuple(frames.changed_sample_sets(rows)),
        rows=rows,
        threshold=threshold,
    )
