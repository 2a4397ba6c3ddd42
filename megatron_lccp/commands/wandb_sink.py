"""Weights & Biases as a second sink of what the run directory holds.

In: the dicts of optimizer steps and the Rows of windows, as RunStore gets them. Out: a W&B run with scalars over
training tokens, heat maps and a table per window, when the training is done the report's figures and tables, and among
its files the record itself (records/wandb.py), from which `lccp report` works as from the run directory. The rows on disk
are the record; whatever fails here is said once, in one line, and training goes on. wandb is imported on the first use
only.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow.compute as pc

from megatron_lccp.analysis.charts.chart import Chart, Curves, NothingToDraw
from megatron_lccp.analysis.charts.draw import draw
from megatron_lccp.analysis.charts.style import figure_png
from megatron_lccp.analysis.measured.registry import figures_of, make_charts, run_scalars
from megatron_lccp.analysis.run import Run, load_run, make_run
from megatron_lccp.files import write_whole
from megatron_lccp.records.store import RunStore, rows_frame, steps_frame
from megatron_lccp.records.wandb import RECORD, keep_record
from megatron_lccp.schema import COORDINATES, KEY_COLUMNS, Metric, Row

Mode = Literal["offline", "online", "disabled"]
HEAD_SCORE = "retrieval_score"
# What tells the samples of one cell apart: averaged away in the table of a window.
_WITHIN_A_CELL = ("sample", "depth")


class WandbSink:
    """One W&B run per training: its id is kept in the run directory (wandb/run_id), so a restart goes on with it.

    mode is `offline`, `online` or `disabled`; entity None takes the account's default. Offline makes no network call;
    each restart writes one more folder wandb/offline-run-*, all with the same id, and `wandb sync` joins them.
    `recorded`: the last step and window that the run directory held before it was rewound for this start. What is
    trained again up to there W&B has already, and it is not logged a second time. A training that begins anew finds no
    id and gets one of its own. (Of a node that went down, W&B may lack the last moments; the rows do not.)
    """

    def __init__(
        self, mode: Mode, project: str, entity: str | None, name: str, dir: str | Path, config_tree: Mapping[str, Any],
        recorded: tuple[int, int] = (-1, -1),
    ):  # fmt: skip
        self._dir, self._run, self._first_heads = Path(dir), None, None
        self._store = RunStore(dir)
        self._notes = self._dir / "wandb" / "logged.json"
        self._logged_step = self._logged_window = self._logged_figures = -1
        if mode == "disabled":
            return
        with self._or_give_up():
            self._run = self._start(mode, project, entity, name, config_tree, recorded)
            self._record = Path(self._run.dir).parent / RECORD
            self._keep_record(starting=True)

    def log_step(self, values: Mapping[str, Any]) -> None:
        """Scalars of one optimizer step, as given to `RunStore.append_step`."""
        if self._run is None:
            return
        with self._or_give_up():
            if not (self._record / self._store.steps_path.name).is_file():
                self._keep_record()
            if values["step"] <= self._logged_step:
                return
            numbers = {
                key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "tokens"
            }
            self._run.log({f"train/{key}": value for key, value in numbers.items()} | {"tokens": values["tokens"]})

    def log_window(self, rows: Iterable[Row], step: int) -> None:
        """Averages, heat maps and a table of one window's rows, as given to `RunStore.write_window`."""
        if self._run is None:
            return
        with self._or_give_up():
            self._keep_record()
            if step <= self._logged_window:
                return
            frame = rows_frame(rows)
            if len(frame):
                if self._first_heads is None and (frame["metric"] == HEAD_SCORE).any():
                    self._first_heads = self._read_first_heads(step)
                media = _window_media(make_run(frame, steps_frame([]), metrics=self._metrics))
                values = window_scalars(frame, self._first_heads, self._metrics)
                self._run.log(values | media | {"tokens": int(frame["tokens"].iloc[0])})

    def alert(self, title: str, text: str) -> None:
        """An alert, which W&B sends as its user has set it up there; what goes wrong is the caller's to say."""
        if self._run is not None:
            self._run.alert(title=title, text=text)

    def close(self, done: bool = False) -> None:
        """Finish the W&B run, of a training that is `done` with the report's figures and tables, unless a start before
        this one had logged them after the same window; the next sink of this directory resumes it."""
        if self._run is not None:
            with self._or_give_up():
                last = max(self._store.windows(), default=-1)
                due = done and last > self._logged_figures
                try:
                    self._keep_record()
                    if due:
                        run = load_run(self._dir)
                        self._run.log(_report_media(run) | {"tokens": int(run.rows["tokens"].max())})
                finally:  # a figure that cannot be drawn loses no scalar
                    self._run.finish()
                if due:
                    step, window, _ = self._noted()
                    self._note(step, window, last)
            self._run = None

    def _start(
        self, mode: Mode, project: str, entity: str | None, name: str, config_tree: Mapping[str, Any],
        recorded: tuple[int, int],
    ) -> Any:  # fmt: skip
        home = self._dir / "wandb"
        home.mkdir(parents=True, exist_ok=True)
        # Tables are staged in the data directory until they are synced: keep them with the run, not in the user's home.
        os.environ.setdefault("WANDB_DATA_DIR", str(home.resolve()))
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb reports its own crashes over the network
        import wandb

        id_path = home / "run_id"
        run_id = id_path.read_text().strip() if id_path.is_file() else ""
        if not run_id:
            run_id = secrets.token_hex(4)
            write_whole(id_path, lambda draft: draft.write_text(run_id + "\n"))
        else:
            noted = self._noted()
            step, window = (max(before, now) for before, now in zip(noted[:2], recorded, strict=True))
            self._note(step, window, noted[2])
            self._logged_step, self._logged_window, self._logged_figures = self._noted()
        settings = wandb.Settings(
            console="off", quiet=True, silent=mode == "offline", disable_git=True, disable_code=True
        )
        run = wandb.init(
            mode=mode, project=project, entity=entity, name=name, dir=str(self._dir), id=run_id, settings=settings,
            config=dict(config_tree),
            # offline there is no server to ask whether the run exists; the same id joins the parts when they are synced
            resume="allow" if mode == "online" else None,
        )  # fmt: skip
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
        return run

    def _keep_record(self, starting: bool = False) -> None:
        """Have in W&B's files what the run directory has by now. W&B sends it when the run ends or is synced, files of
        rows with the start that wrote them alone."""
        run = self._run
        assert run is not None
        for path in keep_record(self._store, self._record):
            if not starting or path.parent == self._record:
                run.save(str(path), base_path=run.dir, policy="end")

    @property
    def _metrics(self) -> Mapping[tuple[str, str], Metric]:
        return self._store.read_metrics()

    def _read_first_heads(self, step: int) -> pd.DataFrame | None:
        """Rows of the first window on record, before this one, that scored heads; a restarted sink has not seen it."""
        for earlier in self._store.windows():
            if earlier < step:
                found = self._store.read_rows(earlier, earlier, health=False, where=pc.field("metric") == HEAD_SCORE)
                if len(found):
                    return found
        return None

    def _noted(self) -> list[int]:
        """The last step and window that starts before this one have logged, and the window after which they have
        logged the report's figures; -1: none."""
        found = json.loads(self._notes.read_text()) if self._notes.is_file() else []
        return found + [-1] * (3 - len(found))  # of an older version: two

    def _note(self, step: int, window: int, figures: int) -> None:
        write_whole(self._notes, lambda draft: draft.write_text(json.dumps([step, window, figures])))

    @contextmanager
    def _or_give_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a missing key, a lost server, a full disk: none may stop a training
            self._run = None
            why = " ".join(str(error).split()) or type(error).__name__
            print(f"wandb: no longer recording to W&B, training goes on: {why[:300]}", file=sys.stderr, flush=True)


def _window_media(run: Run) -> dict[str, Any]:
    """The heat maps of a window, and its rows with the samples of a cell averaged."""
    keys = {figure.key for figure in figures_of([run]) if figure.of_window}
    return _images(run, keys, "window") | {"window/rows": _table(window_table(run.rows))}


def _report_media(run: Run) -> dict[str, Any]:
    """Every figure of the report as an image, and as a table where it has not a line for every head or cell."""
    from megatron_lccp.analysis.report.findings import find

    media = _images(run, None, "figures")
    for figure, chart in make_charts([run]):
        if isinstance(chart, Curves):
            media[f"tables/{figure.key}"] = _table(chart.frame)
    for key, table in find(run).tables.items():
        if len(table):
            media[f"tables/{key}"] = _table(table)
    return media


def _images(run: Run, keys: Container[str] | None, place: str) -> dict[str, Any]:
    charts = {figure.key: chart for figure, chart in make_charts([run], keys)}
    return {f"{place}/{key}": _image(chart) for key, chart in charts.items() if not isinstance(chart, NothingToDraw)}


def _image(chart: Chart) -> Any:
    import wandb
    from PIL import Image

    return wandb.Image(Image.open(io.BytesIO(figure_png(draw(chart), dpi=110))), caption=chart.caption)


def _table(frame: pd.DataFrame) -> Any:
    import wandb

    columns = {name: _plain(column) for name, column in frame.items()}
    return wandb.Table(dataframe=pd.DataFrame(columns))


def _plain(column: pd.Series) -> pd.Series:
    """As W&B takes it: numbers with NaN where one is missing, anything else with None."""
    if pd.api.types.is_bool_dtype(column.dtype):
        return column
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column.astype("float64") if column.hasnans else column.astype(column.dtype.kind + "8")
    return column.astype(object).where(column.notna(), None)


def window_scalars(
    frame: pd.DataFrame,
    first_heads: pd.DataFrame | None = None,
    metrics: Mapping[tuple[str, str], Metric] | None = None,
) -> dict[str, float]:
    """Rows of one window -> what is worth a curve; names are paths, averages are named as in the report.

    `first_heads` are rows of the first window that scored heads: which heads were retrieval heads is known from there.
    """
    rows = frame if first_heads is None else pd.concat([first_heads, frame], ignore_index=True)
    return run_scalars(make_run(rows, steps_frame([]), metrics=metrics))


def window_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of one window with the samples of a cell averaged: coordinates, metric, unit, mean value, number of rows."""
    # a length x depth cell has samples of several before and after; a before x after cell of several lengths
    by_depth = frame["depth_cell"].notna()
    frame = frame.assign(
        before_tok=frame["before_tok"].mask(by_depth), after_tok=frame["after_tok"].mask(by_depth),
        length_tok=frame["length_tok"].mask(~by_depth & frame["before_tok"].notna()),
    )  # fmt: skip
    own = [name for name in frame if name not in (*KEY_COLUMNS, "value", "unit", "n", *COORDINATES)]
    by = ["monitor", "metric", "unit", *(name for name in COORDINATES if name not in _WITHIN_A_CELL), *own]
    by = [name for name in by if frame[name].notna().any()]
    return frame.groupby(by, sort=False, dropna=False)["value"].agg(mean="mean", rows="size").reset_index()
