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
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow.compute as pc

from megatron_lccp.analysis.charts.chart import Chart, Curves, NothingToDraw
from megatron_lccp.analysis.charts.draw import draw
from megatron_lccp.analysis.charts.style import figure_png
from megatron_lccp.analysis.measured.registry import figures_of, make_charts, run_scalars
from megatron_lccp.analysis.run import Run, load_run, make_run
from megatron_lccp.commands.wandb_log import held_in
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
    each start writes one more folder wandb/offline-run-*, all with the same id, and `wandb sync` joins them.
    What the run directory holds and W&B lacks is logged at a start: of a training that was killed, or that had no W&B
    before. What is trained again W&B has already, and it is not logged a second time. Where W&B's service dies beneath
    a training, as of a signal that every process of a job gets, another one goes on in the same way.
    A training that begins anew finds no id and gets one of its own.
    """

    TRIES = 3
    """Services that one call starts at most."""

    def __init__(
        self, mode: Mode, project: str, entity: str | None, name: str, dir: str | Path, config_tree: Mapping[str, Any]
    ):
        self._dir, self._store = Path(dir), RunStore(dir)
        self._run: Any = None
        self._first_heads: pd.DataFrame | None = None
        self._notes = self._dir / "wandb" / "logged.json"
        self._logged_step = self._logged_window = self._logged_figures = self._logged_window_tok = -1
        self._mode = mode
        self._of: dict[str, Any] = {"project": project, "entity": entity, "name": name, "config": dict(config_tree)}
        self._off, self._started_s = mode == "disabled", 0.0
        self._do(lambda: None)

    def log_step(self, values: Mapping[str, Any]) -> None:
        """Scalars of one optimizer step, as given to `RunStore.append_step` before."""
        self._do(lambda: self._log_step(values))

    def log_window(self, rows: Iterable[Row], step: int) -> None:
        """Averages, heat maps and a table of one window's rows, as given to `RunStore.write_window` before."""
        self._do(lambda: self._log_window(rows_frame(rows), step))

    def alert(self, title: str, text: str) -> None:
        """An alert, which W&B sends as its user has set it up there; what goes wrong is the caller's to say."""
        if self._run is not None:
            self._run.alert(title=title, text=text)

    def close(self, done: bool = False) -> None:
        """Finish the W&B run, of a training that is `done` with the report's figures and tables, unless a start before
        this one had logged them after the same window; the next sink of this directory resumes it."""
        self._do(lambda: self._finish(done))
        self._off, self._run = True, None

    def _log_step(self, values: Mapping[str, Any]) -> None:
        if not (self._record / self._store.steps_path.name).is_file():
            self._keep_record()
        if values["step"] <= self._logged_step:
            return
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and key != "tokens"}
        self._run.log({f"train/{key}": value for key, value in numbers.items()} | {"tokens": values["tokens"]})
        self._logged_step = values["step"]

    def _log_window(self, frame: pd.DataFrame, step: int) -> None:
        self._keep_record()
        tokens = int(frame["tokens"].iloc[0]) if len(frame) else -1
        if step <= self._logged_window or tokens <= self._logged_window_tok:
            return
        if self._first_heads is None and (frame["metric"] == HEAD_SCORE).any():
            self._first_heads = self._read_first_heads(step)
        media = _window_media(make_run(frame, steps_frame([]), metrics=self._metrics))
        values = window_scalars(frame, self._first_heads, self._metrics)
        self._run.log(values | media | {"tokens": tokens})
        self._logged_window = step

    def _finish(self, done: bool) -> None:
        last = max(self._store.windows(), default=-1)
        due = done and last > self._logged_figures
        try:
            self._keep_record()
            if due:
                run = load_run(self._dir)
                self._run.log(_report_media(run) | {"tokens": int(run.rows["tokens"].max())})
        finally:  # a figure that cannot be drawn loses no scalar
            self._run.finish()
        self._note(last if due else self._logged_figures)
        _forget_service()  # what is to come, such as the report, takes longer than a signal needs to end it

    def _do(self, act: Callable[[], None]) -> None:
        """Do this with a W&B run. Where its service is gone, another is started; what else fails ends the recording."""
        error: Exception | None = None
        for _ in range(self.TRIES):
            if self._off:
                return
            try:
                if self._run is None:
                    self._start(again=error is not None)
                act()
                return
            except Exception as caught:  # a missing key, a lost server, a full disk: none may stop a training
                error = caught
            if _service_runs():
                break
            _forget_service()
            self._run = None
        self._off, self._run = True, None
        why = " ".join(str(error).split()) or type(error).__name__
        print(f"wandb: no longer recording to W&B, training goes on: {why[:300]}", file=sys.stderr, flush=True)

    def _start(self, again: bool) -> None:
        """Start W&B's run, or go on with it, and log what it lacks of the run directory."""
        home = self._dir / "wandb"
        home.mkdir(parents=True, exist_ok=True)
        for draft in home.glob(f"*/{RECORD}.tmp"):  # of a start that was killed; this one will have it all
            shutil.rmtree(draft, ignore_errors=True)
        # Tables are staged in the data directory until they are synced: keep them with the run, not in the user's home.
        os.environ.setdefault("WANDB_DATA_DIR", str(home.resolve()))
        if self._mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb reports its own crashes over the network
        import wandb

        id_path = home / "run_id"
        run_id = id_path.read_text().strip() if id_path.is_file() else ""
        whole = True
        if not run_id:
            run_id = secrets.token_hex(4)
            write_whole(id_path, lambda draft: draft.write_text(run_id + "\n"))
        else:
            whole = self._read_logged(run_id)
        time.sleep(max(0.0, self._started_s + 1.1 - time.time()))  # the folder of a start is named by its second
        settings = wandb.Settings(
            console="off", quiet=True, silent=self._mode == "offline", disable_git=True, disable_code=True
        )
        self._started_s = time.time()
        self._run = wandb.init(
            mode=self._mode, dir=str(self._dir), id=run_id, settings=settings, **self._of,
            # offline there is no server to ask whether the run exists; the same id joins the parts when they are synced
            resume="allow" if self._mode == "online" else None,
        )  # fmt: skip
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        self._record = Path(self._run.dir).parent / RECORD
        self._keep_record(starting=whole)
        if again:
            print("wandb: its service had ended; another one goes on with the run", file=sys.stderr, flush=True)
        self._log_what_is_missing()

    def _read_logged(self, run_id: str) -> bool:
        """Find out up to where W&B has been told, and its files have it; False if a start was not closed."""
        step, window, self._logged_figures = self._noted()
        window_tok, whole = -1, True
        noted_ns = self._notes.stat().st_mtime_ns if self._notes.is_file() else -1
        for path in self._notes.parent.glob(f"*run-*-{run_id}*/run-{run_id}.wandb"):
            if path.stat().st_mtime_ns > noted_ns:
                held, whole = held_in(path), False
                step, window_tok = max(step, held.step), max(window_tok, held.window_tok)
        self._logged_step, self._logged_window, self._logged_window_tok = step, window, window_tok
        return whole

    def _log_what_is_missing(self) -> None:
        """Steps and windows of the run directory after the last that W&B has, in order."""
        lines = {line["step"]: line for line in self._store.read_steps().to_dict("records")}
        windows = self._store.windows()
        for step in sorted({*lines, *windows}):
            if step in lines and step > self._logged_step:
                self._log_step({key: value for key, value in lines[step].items() if value == value})  # NaN: none
            if step in windows and step > self._logged_window:
                self._log_window(self._store.read_rows(step, step, health=False), step)

    def _keep_record(self, starting: bool = False) -> None:
        """Have in W&B's files what the run directory has by now. W&B sends it when the run ends or is synced, files of
        rows with the start that wrote them alone."""
        for path in keep_record(self._store, self._record):
            if not starting or path.parent == self._record:
                self._run.save(str(path), base_path=self._run.dir, policy="end")

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

    def _note(self, figures: int) -> None:
        self._logged_figures = figures
        logged = [self._logged_step, self._logged_window, figures]
        write_whole(self._notes, lambda draft: draft.write_text(json.dumps(logged)))


def _service_runs() -> bool:
    """True if W&B's service of this process is alive."""
    import psutil

    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name().startswith("wandb-core") and child.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _forget_service() -> None:
    """Let go of a service that is gone: wandb would take leave of it at exit, with a trace."""
    with suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


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
