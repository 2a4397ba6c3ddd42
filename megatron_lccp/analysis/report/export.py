"""A run as files for others: figures, tables, rows, and retrieval heads in the public format.

In: run directories. Out, in one folder: figures/KEY.png, .svg and .csv (the frame that the figure shows), tables/*.csv
(tables 3 to 7 of the paper and the verdict), rows.parquet (a row per number, all runs; `pandas.read_parquet` takes it)
and measures.csv (the same with samples averaged), heads/RUN/step-N.json ({"layer-head": [score of each sample]}, as
public retrieval-head code writes it; null is a score that is not a number). Every file is whole or absent, and what an
earlier export wrote that this one did not is removed once its kind is written.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_lccp.analysis.charts.chart import NothingToDraw
from megatron_lccp.analysis.charts.draw import draw
from megatron_lccp.analysis.charts.parts import Runs
from megatron_lccp.analysis.charts.style import figure_png, figure_svg
from megatron_lccp.analysis.measured.benchmarks import with_scores
from megatron_lccp.analysis.measured.registry import make_charts
from megatron_lccp.analysis.report.findings import find
from megatron_lccp.analysis.run import load_runs, run_folders
from megatron_lccp.analysis.verdict.judge import margins_of
from megatron_lccp.files import write_whole
from megatron_lccp.records.store import RunStore, row_schema
from megatron_lccp.schema import COORDINATES, KEY_COLUMNS

KINDS = ("figures", "tables", "rows", "heads")
INDEX = "export.json"
"""In the folder of an export: the files of each kind that it wrote. Other files are somebody else's."""
WITHIN_A_CELL = ("sample", "depth", "sample_set")
"""What tells the samples of one cell apart: averaged away in measures.csv."""


def export(
    run_dirs: Sequence[str | Path], out: str | Path | None = None, scores: str | Path | None = None,
    margins: Mapping[str, float] | None = None, only: Sequence[str] = (),
) -> Iterator[Path]:  # fmt: skip
    """Write the files of some KINDS (all by default) into `out` and yield the path of each as it is written.

    Without `out` they go to `export` in the run directory, of several runs beside the first. Raises ValueError as
    load_runs and verdict.margins_of do and for another kind, OSError if a file cannot be written.
    """
    if strange := [kind for kind in only if kind not in KINDS]:
        raise ValueError(f"only: {strange[0]!r} is not among {', '.join(KINDS)}")
    runs = with_scores(load_runs(run_dirs), scores)
    margins_by_run = margins_of(runs, margins or {})  # what is wrong with them is said before anything is written
    first = Path(run_dirs[0])
    out = (
        Path(out)
        if out is not None
        else (first if len(run_dirs) == 1 else Path(os.path.realpath(first)).parent) / "export"
    )
    folders = run_folders(run_dirs)
    for kind in only or KINDS:
        written = []
        for path in _files_of(kind, runs, folders, out, margins_by_run):
            written.append(path.relative_to(out).as_posix())
            yield path
        before = _index(out)
        for name in {*before.get(kind, ())} - {*written}:
            (out / name).unlink(missing_ok=True)
        text = json.dumps(before | {kind: written}, indent=1, ensure_ascii=False)
        write_bytes(out / INDEX, text.encode())


def _index(out: Path) -> dict[str, list[str]]:
    """What the exports before this one wrote; nothing if it cannot be read."""
    try:
        found = json.loads((out / INDEX).read_text(encoding="utf-8"))
        return {kind: [name for name in found[kind] if _is_inside(name)] for kind in KINDS if kind in found}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _is_inside(name: object) -> bool:
    """Whether a name leads into the folder of the export, and to nothing else."""
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _files_of(
    kind: str, runs: Runs, folders: Sequence[Path], out: Path, margins: Sequence[Mapping[str, float]]
) -> Iterator[Path]:
    if kind == "figures":
        yield from _figures(runs, out / "figures")
    elif kind == "tables":
        yield from _tables(runs, out / "tables", margins)
    elif kind == "rows":
        yield from _rows(runs, folders, out)
    else:
        for run, folder in zip(runs, folders, strict=True):
            yield from _heads(RunStore(folder), out / "heads" / file_name(run.name))


def _figures(runs: Runs, folder: Path) -> Iterator[Path]:
    for figure, chart in make_charts(runs):
        if isinstance(chart, NothingToDraw):
            continue
        drawn = draw(chart)
        yield write_bytes(folder / f"{figure.key}.png", figure_png(drawn))
        yield write_bytes(folder / f"{figure.key}.svg", figure_svg(drawn).encode())
        yield _csv(folder / f"{figure.key}.csv", chart.frame)


def _tables(runs: Runs, folder: Path, margins: Sequence[Mapping[str, float]]) -> Iterator[Path]:
    found: dict[str, list[pd.DataFrame]] = {}
    for run, own in zip(runs, margins, strict=True):
        for key, frame in find(run, own).tables.items():
            if len(frame):
                found.setdefault(key, []).append(frame.assign(run=run.name))
    for key, parts in found.items():
        yield _csv(folder / f"{key}.csv", pd.concat(parts, ignore_index=True))


def _rows(runs: Runs, folders: Sequence[Path], out: Path) -> Iterator[Path]:
    path = out / "rows.parquet"

    def write(draft: Path) -> None:
        with pq.ParquetWriter(draft, row_schema(), compression="zstd") as writer:
            for run, folder in zip(runs, folders, strict=True):
                for step in RunStore(folder).windows():
                    rows = RunStore(folder).read_table(first=step, last=step, health=False)
                    names = pa.array([run.name] * len(rows), pa.string())
                    rows = rows.set_column(rows.schema.get_field_index("run"), row_schema().field("run"), names)
                    writer.write_table(rows.cast(row_schema()))

    write_whole(path, write)
    yield path
    parts = [_measures(RunStore(folder)).assign(run=run.name) for run, folder in zip(runs, folders, strict=True)]
    yield _csv(out / "measures.csv", pd.concat(parts, ignore_index=True).dropna(axis="columns", how="all"))


def _measures(store: RunStore) -> pd.DataFrame:
    """Rows of all windows with the samples of a cell averaged: coordinates, mean, low, high, rows (how many)."""
    by_depth, by_distance = pc.field("depth_cell").is_valid(), pc.field("before_tok").is_valid()
    parts = []
    for where, of_sample in (  # needles differ in length, and so do these coordinates within a cell
        (by_depth, ("before_tok", "after_tok")), (~by_depth & by_distance, ("length_tok",)),
        (~by_depth & ~by_distance, ()),
    ):  # fmt: skip
        by = [*KEY_COLUMNS, "unit", *(name for name in COORDINATES if name not in (*WITHIN_A_CELL, *of_sample)), "own"]
        parts.append(store.read_means(by, where, health=False).rename(columns={"value": "mean", "n": "rows"}))
    found = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    values = ["mean", "low", "high", "rows"]
    own = [name for name in found if name not in (*KEY_COLUMNS, "unit", *COORDINATES, *values)]
    return found.reindex(columns=[*KEY_COLUMNS, "unit", *COORDINATES, *own, *values]).sort_values(
        ["tokens", "step"], kind="stable"
    )


def _heads(store: RunStore, folder: Path) -> Iterator[Path]:
    """A file for every window with head scores; the samples of a head stand in the order of their set."""
    wanted = (pc.field("metric") == "retrieval_score") & pc.field("head").is_valid()
    for step in store.windows():
        columns = ["monitor", "layer", "head", "length_tok", "depth_cell", "sample", "value"]
        rows = store.read_rows(first=step, last=step, health=False, columns=columns, where=wanted)
        if (own := rows["monitor"] == "RetrievalHeads").any():
            rows = rows[own]
        if len(rows):
            rows = rows.sort_values(["layer", "head", "length_tok", "depth_cell", "sample"], kind="stable")
            groups = rows.groupby(["layer", "head"])["value"]
            scores = {
                f"{layer}-{head}": [value if math.isfinite(value) else None for value in values]
                for (layer, head), values in groups
            }
            text = json.dumps(scores, allow_nan=False)
            yield write_bytes(folder / f"step-{step:08d}.json", text.encode())


def file_name(text: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_.") or "run"


def write_bytes(path: Path, data: bytes) -> Path:
    write_whole(path, lambda draft: draft.write_bytes(data))
    return path


def _csv(path: Path, frame: pd.DataFrame) -> Path:
    write_whole(path, lambda draft: frame.to_csv(draft, index=False))
    return path
