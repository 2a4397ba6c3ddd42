"""A run directory as what the report is made from.

In: directories that `lccp train` wrote (or any loop, through RunStore), or W&B's folders of such runs, which hold the
same. Out: a Run for each, which makes frames of its rows when they are asked for. Only reads.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc

from megatron_lccp.analysis import frames
from megatron_lccp.records.store import EVENT_COLUMNS, RunStore
from megatron_lccp.records.wandb import RECORD, find_records, folder_name

OTHER_HEAD_SCORES = ("content_score", "wu2024", "mass_minus_null")


@dataclass(frozen=True)
class Run:
    """What a run recorded, and the frames made from it, each made once."""

    name: str
    """Name of the run."""
    config_hash: str
    """Hash of the configuration; several, in order, if it was changed on the way."""
    rows: pd.DataFrame
    """Rows of all windows, but for head scores that nothing here is made from (OTHER_HEAD_SCORES)."""
    steps: pd.DataFrame
    """Optimizer steps, as `records.store.steps_frame` makes them."""
    spans: pd.DataFrame
    """Stages in order: stage, tokens_from, tokens_to."""
    lccp_from: int
    """Tokens at which the LCCP begins."""
    health_means: pd.DataFrame
    """Training health averaged by step: CHECKPOINT, metric, value, low, high, n."""
    events: pd.DataFrame
    config_text: str = ""
    """The resolved configuration, YAML; empty if it was not kept."""
    scores: pd.DataFrame | None = None
    """Benchmark scores measured elsewhere, as `measured.benchmarks.read_scores` reads them."""
    threshold: float = frames.RETRIEVAL_THRESHOLD
    """Score above which a head is a retrieval head."""
    _made: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def frame(self, maker: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
        """What `maker` makes of the rows."""
        if maker not in self._made:
            self._made[maker] = maker(self.rows)
        return self._made[maker]

    def derived(self, maker: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
        """What `maker` makes of the run, where the rows alone do not say it."""
        if maker not in self._made:
            self._made[maker] = maker(self)
        return self._made[maker]

    @property
    def changed_sets(self) -> tuple[str, ...]:
        """Metrics whose sample set is not the same at all checkpoints, so that differences are not paired."""
        return tuple(frames.changed_sample_sets(self.rows))


Runs = Sequence[Run]


def load_runs(run_dirs: Sequence[str | Path]) -> list[Run]:
    """Read several run directories (or folders, as run_folders takes them) under names that tell them apart.

    Raises ValueError as load_run does.
    """
    found = run_folders(run_dirs)
    runs = [load_run(path) for path in found]
    count, folders = Counter(run.name for run in runs), _names(found)
    return [
        run if count[run.name] == 1 else load_run(path, name=f"{run.name} ({folder})")
        for run, path, folder in zip(runs, found, folders, strict=True)
    ]


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


def load_run(run_dir: str | Path, threshold: float = frames.RETRIEVAL_THRESHOLD, name: str | None = None) -> Run:
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
) -> Run:
    """What rows (at least one), steps, and averages of training health by step say; no events, no configuration."""
    if healthy is None:
        healthy = pd.DataFrame(columns=[*frames.CHECKPOINT, "metric", "value", "low", "high", "n"])
    spans = frames.stage_spans(steps if len(steps) else rows)
    return Run(
        name=str(rows["run"].iloc[-1]),
        config_hash=", ".join(rows["config_hash"].unique()),
        rows=rows,
        steps=steps,
        spans=spans,
        lccp_from=frames.lccp_from(spans),
        health_means=healthy,
        events=pd.DataFrame(columns=EVENT_COLUMNS),
        threshold=threshold,
    )
