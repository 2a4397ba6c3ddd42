"""A run directory as what the report is made from.

In: directories that `lccp train` wrote (or any loop, through RunStore), or W&B's folders of such runs, which hold the
same. Out: a Run for each, which makes frames of its rows when they are asked for. Only reads.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc

from megatron_lccp.analysis import frames
from megatron_lccp.records.earlier import declared_by_0_1
from megatron_lccp.records.store import EVENT_COLUMNS, RunStore, metrics_of
from megatron_lccp.records.wandb import RECORD, find_records, folder_name
from megatron_lccp.schema import COORDINATES, PUBLISHED, WINDOW_TIME, Metric

HEAD_COLUMNS = (*frames.CHECKPOINT, "monitor", "metric", "unit", "layer", "head")
OF_A_HEAD = {"layer", "head"}
_OF_A_HEAD = pc.field("layer").is_valid() & pc.field("head").is_valid() & pc.field("ablated").is_null()


@dataclass(frozen=True)
class Measure:
    """One metric of one monitor, as a run has it."""

    monitor: str
    metric: Metric
    """As the monitor declares it."""


@dataclass(frozen=True)
class Run:
    """What a run recorded, and the frames made from it, each made once."""

    name: str
    """Name of the run."""
    config_hash: str
    """Hash of the configuration; several, in order, if it was changed on the way."""
    rows: pd.DataFrame
    """Rows of all windows, but for scores of heads that are not judged: there may be millions of them, and their averages do."""
    head_means: pd.DataFrame
    """Everything measured by layer and head, averaged over samples: HEAD_COLUMNS, what else tells its series apart, value,
    n (how many rows)."""
    steps: pd.DataFrame
    """Optimizer steps, as `records.store.steps_frame` makes them."""
    spans: pd.DataFrame
    """Stages in order: stage, tokens_from, tokens_to."""
    lccp_from: int
    """Tokens at which the LCCP begins."""
    health_means: pd.DataFrame
    """Training health averaged by step: CHECKPOINT, metric, value, low, high, n."""
    events: pd.DataFrame
    metrics: Mapping[tuple[str, str], Metric]
    """(monitor, metric) -> what the monitor declares."""
    config_text: str = ""
    """The resolved configuration, YAML; empty if it was not kept."""
    scores: pd.DataFrame | None = None
    """Benchmark scores measured elsewhere, as `measured.benchmarks.read_scores` reads them."""
    threshold: float = frames.RETRIEVAL_THRESHOLD
    """Score above which a head is a retrieval head."""
    _made: dict[tuple[Hashable, ...], pd.DataFrame] = field(default_factory=dict, init=False, repr=False, compare=False)

    def frame(self, maker: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
        """What `maker` makes of the rows."""
        if (key := (maker,)) not in self._made:
            self._made[key] = maker(self.rows)
        return self._made[key]

    def derived(self, maker: Callable[..., pd.DataFrame], *about: Hashable) -> pd.DataFrame:
        """What `maker` makes of the run (and of `about`), where the rows alone do not say it."""
        if (key := (maker, *about)) not in self._made:
            self._made[key] = maker(self, *about)
        return self._made[key]

    @cached_property
    def measures(self) -> tuple[Measure, ...]:
        """What was measured, in the order first met; what no monitor declares is taken as a number by corpus."""
        both = ["monitor", "metric", "unit"]
        met = pd.concat([self.rows[both].drop_duplicates(), self.head_means[both].drop_duplicates()])
        met = met[met["metric"] != WINDOW_TIME.name].drop_duplicates(both[:2])
        return tuple(
            Measure(monitor, self.metrics.get((monitor, metric)) or _undeclared(metric, unit))
            for monitor, metric, unit in met.itertuples(index=False)
        )

    def metric(self, monitor: str, name: str) -> Metric:
        """The declaration of a metric. Raises KeyError if its monitor declares none."""
        return self.metrics[monitor, name]

    @property
    def is_published(self) -> bool:
        """Whether it is a published model's measurement, and no training's."""
        return bool((self.rows["stage"] == PUBLISHED).all()) and not len(self.steps)

    @property
    def changed_sets(self) -> tuple[str, ...]:
        """Metrics whose sample set is not the same at all checkpoints, so that differences are not paired."""
        return tuple(frames.changed_sample_sets(self.rows))


Runs = Sequence[Run]


def _undeclared(name: str, unit: str) -> Metric:
    return Metric(name=name, unit=unit, about="Its monitor does not say what it is.", series=("corpus",))


def _of_heads(metrics: Mapping[tuple[str, str], Metric]) -> list[Metric]:
    return [metric for metric in metrics.values() if OF_A_HEAD <= {*metric.axes}]


def _head_series(metrics: Mapping[tuple[str, str], Metric]) -> list[str]:
    """The coordinates that tell series of what is measured by head apart."""
    return list(dict.fromkeys(name for metric in _of_heads(metrics) for name in metric.series))


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
    names, whole = [folder_name(folder) for folder in folders], [Path(os.path.realpath(folder)) for folder in folders]
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
    metrics = store.read_metrics()
    judged = [metric.name for metric in _of_heads(metrics) if metric.judged]
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always")
        rows = store.read_rows(health=False, where=~_OF_A_HEAD | pc.field("metric").isin(judged))
    if not len(rows):
        raise ValueError(f"{run_dir}: {_why_no_rows(store)}")
    for warning in skipped:
        warnings.warn(warning.message, stacklevel=2)
    healthy = store.read_means([*frames.CHECKPOINT, "metric"], pc.field("monitor") == "health")
    own = ["own"] if any(metric.own for metric in _of_heads(metrics)) else []
    series = [name for name in _head_series(metrics) if name in COORDINATES]
    by_head = store.read_means([*HEAD_COLUMNS, *series, *own], _OF_A_HEAD, health=False)
    one = name or str(rows["run"].iloc[-1])  # a directory is one run, also if it was renamed
    rows["run"] = healthy["run"] = by_head["run"] = one
    config = store.config_path.read_text(encoding="utf-8", errors="replace") if store.config_path.is_file() else ""
    run = make_run(rows, store.read_steps(), healthy, threshold, by_head, metrics)
    return replace(run, events=store.read_events(), config_text=config)


def _why_no_rows(store: RunStore) -> str:
    """What is wrong with a run of which no row can be read, and what to do."""
    if damaged := store.damaged():
        return (
            f"no rows can be read of {len(damaged)} files in rows/; copy them again from where the run is, or measure "
            f"its checkpoints by `lccp measure` (the first: {damaged[0]})"
        )
    if store.windows():
        return "no rows in rows/; every monitor failed: events.jsonl says why"
    return "no rows in rows/; a run measures the first at step 0 if its `monitors` name any"


def make_run(
    rows: pd.DataFrame,
    steps: pd.DataFrame,
    healthy: pd.DataFrame | None = None,
    threshold: float = frames.RETRIEVAL_THRESHOLD,
    by_head: pd.DataFrame | None = None,
    metrics: Mapping[tuple[str, str], Metric] | None = None,
) -> Run:
    """What rows (at least one), steps, and averages of training health by step and of heads say; no events, no
    configuration. Without `by_head` it is made from the rows; without `metrics`, monitors are those of version 0.1."""
    metrics = metrics_of(declared_by_0_1()) if metrics is None else metrics
    if by_head is None:
        of_head = rows[rows["layer"].notna() & rows["head"].notna() & rows["ablated"].isna()]
        series = [name for name in _head_series(metrics) if name in of_head]
        by_head = frames.means(of_head, [*HEAD_COLUMNS, *series], ["value"])
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
        head_means=by_head,
        health_means=healthy,
        events=pd.DataFrame(columns=EVENT_COLUMNS),
        metrics=metrics,
        threshold=threshold,
    )
