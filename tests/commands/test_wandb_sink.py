"""The real wandb package, offline: what is logged and where, that a restart goes on, that a failure stops nothing."""

import dataclasses
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import textwrap

import pandas as pd
import pytest

from megatron_lccp.analysis.charts.chart import Curves, NothingToDraw
from megatron_lccp.analysis.measured.heads import head_scores, head_summary
from megatron_lccp.analysis.measured.interference import interference_cells
from megatron_lccp.analysis.measured.needles import needle_averages, needle_cells
from megatron_lccp.analysis.measured.registry import make_charts, run_scalars
from megatron_lccp.analysis.report.report import write_report
from megatron_lccp.analysis.run import load_run, load_runs, make_run
from megatron_lccp.analysis.verdict.judge import judge
from megatron_lccp.cli import main
from megatron_lccp.commands.wandb_sink import WandbSink, _report_media, _window_media, window_scalars, window_table
from megatron_lccp.records.store import RunStore, rows_frame, steps_frame
from megatron_lccp.records.wandb import keep_record
from tests.analysis.planted import run_of
from tests.analysis.stranger import make_stranger

RESTARTS = textwrap.dedent("""
    import sys
    from pathlib import Path
    from megatron_lccp.commands.wandb_sink import WandbSink
    from megatron_lccp.records.wandb import RECORD
    from megatron_lccp.records.store import RunStore
    from megatron_lccp.schema import Row
    from tests.synthetic_run import make_run

    run_dir, source = Path(sys.argv[1]), Path(sys.argv[2])
    rows = make_run(source, steps=20, lccp_from=10, every=10, lengths=(1024,), samples=2, layers=2, heads=3, skip=())
    # From step 1 to 13; from the checkpoint at 5 again, until it dies at 12; from that at 10 once more, to the end.
    for start, end in ((0, 13), (5, 12), (10, 20)):
        store, health = RunStore(run_dir), []
        store.rewind(start if start else -1)
        store.write_config(f"name: from {start}")
        store.append_event("resume", f"resumed after step {start}", step=start)
        sink = WandbSink("offline", "project", None, "name", run_dir, {"model": {"family": "tiny"}})
        for step in range(start, end + 1):
            if step > start:
                values = {"step": step, "tokens": 7 * step, "stage": "lccp", "loss": 2.5 / step, "skipped": False}
                store.append_step(values)
                where = dict(run="name", config_hash="0", step=step, tokens=7 * step, stage="lccp", monitor="health")
                health.append(Row(**where, metric="router_entropy", value=end + step, unit="nat", n=1, layer=0))
                sink.log_step(values)
            if health and step in (5, 8, end):
                store.write_health(health)  # of steps 9 to 12 from the second start, cut by the third
                health = []
            window = [row for row in rows if row.step == step]
            if window and (step > start or step == 0):
                store.write_window(window, step)
                sink.log_window(window, step)
        record = sink._record  # a node may go down before it is closed
        assert RunStore(record).read_steps().equals(store.read_steps()) and len(store.read_steps()) == end
        assert RunStore(record).windows().keys() == store.windows().keys()
        sink.close(done=end == 20)
        if start == 0:  # as if it had been killed while it made its record
            (record.parent / "record.tmp" / "rows").mkdir(parents=True)
""")


def offline_environment(home):
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return kept | {
        "HOME": str(home),
        "PYTHONPATH": os.getcwd(),
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(home)),
    }


@pytest.fixture(scope="module")
def restarted(tmp_path_factory):
    """A run directory after three starts of the sink, in a process of its own as wandb keeps a service beside it."""
    run_dir, home, source = (tmp_path_factory.mktemp(name) for name in ("run", "home", "source"))
    result = subprocess.run(
        [sys.executable, "-c", RESTARTS, str(run_dir), str(source)],
        env=offline_environment(home),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0 and "no longer recording" not in result.stderr, result.stderr
    return run_dir


def log_records(data):
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def history(folder):
    """What wandb wrote for one start: history lines as dicts, in order, the run's settings, and files to send."""
    from wandb.proto import wandb_internal_pb2

    lines, runs, saved = [], [], []
    for data in log_records(next(folder.glob("run-*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "files":
            saved += [item.path for item in record.files.files]
        elif record.WhichOneof("record_type") == "history":
            lines.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        elif record.WhichOneof("record_type") == "run":
            runs.append(record.run)
    return lines, runs[0] if runs else None, saved  # none of a service that was killed before it wrote


def test_a_restart_goes_on_with_the_same_run(restarted):
    folders = sorted((restarted / "wandb").glob("offline-run-*"))
    run_id = (restarted / "wandb" / "run_id").read_text().strip()
    assert len(folders) == 3 and all(run_id in folder.name for folder in folders)
    assert not list((restarted / "wandb").rglob("*.tmp"))
    for folder in folders:
        _, run, _ = history(folder)
        assert (run.run_id, run.project, run.display_name) == (run_id, "project", "name")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["model"] == {"family": "tiny"}


@pytest.fixture(scope="module")
def lines(restarted):
    """The history lines of all starts, in the order of the starts."""
    folders = sorted((restarted / "wandb").glob("offline-run-*"), key=lambda folder: folder.stat().st_mtime_ns)
    return [line for folder in folders for line in history(folder)[0]]


def test_a_step_that_was_trained_again_is_there_once(lines):
    steps = [line for line in lines if "train/loss" in line]
    assert sorted(line["train/step"] for line in steps) == list(range(1, 21))
    assert all(
        line["train/loss"] == 2.5 / line["train/step"] and line["tokens"] == 7 * line["train/step"] for line in steps
    )


def test_a_window_that_was_measured_again_is_there_once_with_its_maps_and_rows(restarted, lines):
    windows = [line for line in lines if "niah/mean_ppl" in line]
    averages = needle_averages(needle_cells(RunStore(restarted).read_rows()))
    assert [line["tokens"] for line in windows] == averages["tokens"].tolist() and len(windows) == 3
    assert [line["niah/mean_ppl"] for line in windows] == pytest.approx(averages["mean_ppl"].tolist())
    for line in windows:
        for key in ("needle-cells", "interference-cells", "head-cells"):
            assert line[f"window/{key}/_type"] == "image-file"
        assert line["window/rows/_type"] == "table-file" and line["window/rows/nrows"] > 0


def test_the_figures_and_tables_of_the_report_are_logged_when_the_training_is_done(restarted, lines):
    charts = {figure.key: chart for figure, chart in make_charts([load_run(restarted)])}
    drawn = {key: chart for key, chart in charts.items() if not isinstance(chart, NothingToDraw)}
    (last,) = [line for line in lines if any(key.startswith("figures/") for key in line)]
    assert {key.split("/")[1] for key in last if key.startswith("figures/")} == set(drawn)
    tables = {key.split("/")[1] for key in last if key.startswith("tables/")}
    assert tables >= {key for key, chart in drawn.items() if isinstance(chart, Curves)} | {"verdict", "overlaps"}
    assert last["tables/needle-averages/nrows"] == 3


def test_a_training_that_was_done_logs_no_figures_again_and_one_that_went_on_does(small_run, monkeypatch):
    """Of the sink alone: what it logs is kept in a list, and no wandb is started."""
    logged = []

    class Run:
        dir, log = str(small_run.dir / "wandb/offline-run-1/files"), logged.append

        def finish(self):
            pass

        def __getattr__(self, name):
            return lambda *_, **__: None

    monkeypatch.setattr("wandb.init", lambda **_: Run())
    monkeypatch.setattr("megatron_lccp.commands.wandb_sink._report_media", lambda run: {"figures/corpus": 1})
    store = RunStore(small_run.dir)

    def start(done: bool) -> int:
        before = len(logged)
        sink = WandbSink("offline", "p", None, "n", small_run.dir, {})
        sink.close(done=done)
        return sum("figures/corpus" in line for line in logged[before:])

    assert [start(False), start(True), start(True), start(False), start(True)] == [0, 1, 0, 0, 0]
    assert [line["train/step"] for line in logged if "train/step" in line] == store.read_steps()["step"].tolist()
    assert sum("window/rows" in line for line in logged) == len(store.windows())
    last, before = [row for row in small_run.rows if row.step == 20], len(logged)
    store.write_window([dataclasses.replace(row, step=25, tokens=10**9) for row in last], 25)
    assert [start(True), start(True)] == [1, 0] and {line["tokens"] for line in logged[before:]} == {10**9}
    (small_run.dir / "wandb/logged.json").write_text("[20, 20]")  # of an older version
    assert start(True) == 1


KILLED = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path
    import psutil
    from megatron_lccp.commands.wandb_sink import WandbSink
    from megatron_lccp.records.store import RunStore
    from tests.synthetic_run import make_run

    run_dir, source, part = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rows = make_run(source, steps=20, lccp_from=10, every=10, lengths=(1024,), samples=1, layers=1, heads=2, skip=())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    store = RunStore(run_dir)
    store.write_config("name: killed")

    def step(number, sink=None):
        values = {"step": number, "tokens": 7 * number, "stage": "lccp", "loss": 2.5 / number, "skipped": False}
        store.append_step(values)
        if sink:
            sink.log_step(values)

    def window(number, sink):
        window = [row for row in rows if row.step == number]
        store.write_window(window, number)
        sink.log_window(window, number)

    def kill_all(number):
        # as Slurm does: every process of the job, whatever session it is in
        me = psutil.Process()
        alive = [child for child in me.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
        (service,) = [child for child in alive if child.name() == "wandb-core"]
        for process in [*me.children(recursive=True), me]:
            process.send_signal(number)
        psutil.wait_procs([service], timeout=20)

    def start():
        return WandbSink("offline", "project", None, "name", run_dir, {})

    if part == 0:
        for number in (1, 2):  # W&B is turned on later
            step(number)
        sink = start()
        window(0, sink)
        step(3, sink)
        kill_all(signal.SIGTERM)
        step(4, sink)
        kill_all(signal.SIGINT)
        window(10, sink)
        step(5, sink)
        kill_all(signal.SIGTERM)
        sink.close()
        os.kill(os.getpid(), signal.SIGTERM)
    elif part == 1:
        sink = start()
        step(6, sink)
        window(20, sink)
        step(7, sink)
        for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
            process.kill()
    else:
        sink = start()
        step(8, sink)
        sink.close()
""")


def test_a_signal_to_every_process_of_a_job_loses_nothing_in_wandb(tmp_path):
    """Its service ends on any of them, with what it held back; steps from before W&B was on are there, too."""
    run_dir, home, source = (tmp_path / name for name in ("run", "home", "source"))
    home.mkdir()
    said = []
    for part in range(3):
        command = [sys.executable, "-c", KILLED, str(run_dir), str(source / str(part)), str(part)]
        environment = offline_environment(home)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == (-9 if part == 1 else 0), done.stderr
        said += done.stderr.splitlines()
    assert said == ["wandb: its service had ended; another one goes on with the run"] * 3
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 6
    lines = [line for folder in folders for line in history(folder)[0]]
    assert sorted(line["train/step"] for line in lines if "train/step" in line) == list(range(1, 9))
    assert all(line["train/loss"] == 2.5 / line["train/step"] for line in lines if "train/step" in line)
    assert len([line for line in lines if "window/rows/_type" in line]) == 3
    sent = {name for folder in folders[3:] for name in history(folder)[2]}
    assert {f"record/rows/step-{step:08d}.parquet" for step in (0, 10, 20)} <= sent


def test_wandb_itself_finds_three_parts_to_sync(restarted, tmp_path):
    """Without a network: `wandb sync` takes the folders as they are; sending them is the server's part."""
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, (restarted / "wandb").glob("offline-run-*"))],
        env=offline_environment(tmp_path), cwd=restarted, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    run_id = (restarted / "wandb" / "run_id").read_text().strip()
    assert done.returncode == 0 and output.count(run_id) >= 3, output


def test_tables_are_staged_with_the_run_and_not_in_the_home(restarted):
    assert (restarted / "wandb" / "artifacts" / "staging").is_dir()


@pytest.fixture
def copied(restarted, tmp_path):
    """W&B's folder alone, as it comes to a laptop."""
    return shutil.copytree(restarted / "wandb", tmp_path / "from the cluster")


def starts(folder):
    return sorted(folder.glob("offline-run-*"), key=lambda start: next(start.glob("run-*.wandb")).stat().st_mtime_ns)


def test_the_folder_of_wandb_gives_what_the_run_directory_gives(restarted, copied, tmp_path):
    ours, (theirs,) = load_run(restarted), load_runs([copied])
    for field in (field for field in dataclasses.fields(ours) if field.compare):
        one, two = getattr(ours, field.name), getattr(theirs, field.name)
        same = one.equals(two) if isinstance(one, pd.DataFrame) else one == two
        assert same, field.name
    assert len(ours.steps) == 20 and len(ours.events) == 3 and len(ours.rows) and len(ours.head_means)
    assert len(ours.health_means) and ours.metrics
    assert judge(ours).to_json() == judge(theirs).to_json()
    page = write_report(copied, tmp_path / "page.html").read_text()
    assert page == write_report(restarted, tmp_path / "page.html").read_text()
    alone = shutil.copytree(starts(copied)[-1], tmp_path / "alone" / starts(copied)[-1].name)
    for folder in (alone, alone.parent, tmp_path / "alone"):
        assert load_run(folder).rows.equals(ours.rows)


def test_files_of_the_record_are_sent_by_the_start_that_wrote_them(copied):
    sent = [{name for name in history(start)[2] if name.startswith("record/rows/step-")} for start in starts(copied)]
    assert sent == [{f"record/rows/step-{step:08d}.parquet" for step in steps} for steps in ((0, 10), (10,), (20,))]
    assert all({"record/steps.jsonl", "record/config.yaml"} <= set(history(start)[2]) for start in starts(copied))


def test_an_earlier_start_holds_what_was_on_record_when_it_ended(copied):
    first = load_run(starts(copied)[0])
    assert first.steps["step"].tolist() == list(range(1, 14)) and first.rows["step"].max() == 10
    assert first.config_text == "name: from 0"


def test_the_command_takes_it_and_a_torn_file_is_named_and_skipped(copied, capsys):
    assert main(["verdict", str(copied)]) == 11
    assert "synthetic <run>: " in capsys.readouterr().out
    torn = starts(copied)[-1] / "files/record/rows/step-00000010.parquet"
    torn.write_bytes(torn.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=f"{re.escape(str(torn))}: skipped, not a readable Parquet file"):
        assert set(load_run(copied).rows["step"]) == {0, 20}


def test_runs_in_one_folder_of_wandb_are_told_apart_by_their_ids(copied, capsys):
    one = starts(copied)[-1]
    other = shutil.copytree(one, one.with_name("offline-run-20260101_000000-0123abcd"))
    assert {run.name for run in load_runs([copied])} == {f"synthetic <run> ({each.name})" for each in (one, other)}
    assert main(["verdict", str(copied)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"holds 2 runs ({other.name}, {one.name}); give one of them" in error


@pytest.mark.parametrize("command", ["report", "verdict", "export"])
def test_a_folder_that_holds_neither_is_refused_in_one_line(copied, capsys, command):
    for start in starts(copied):
        shutil.rmtree(start / "files/record")
    assert main([command, str(copied)]) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and f"{copied}: not a run directory" in error and "offline-run-*/files/record" in error
    )


def test_where_no_links_can_be_made_the_record_is_copied_again_at_each_window(small_run, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    store, record = RunStore(small_run.dir), tmp_path / "files/record"
    assert len(keep_record(store, record)) == len(list(small_run.dir.rglob("*.*")))
    assert not keep_record(store, record)
    store.append_step({"step": 21, "tokens": 1})
    assert keep_record(store, record) == [record / "steps.jsonl"]
    assert RunStore(record).read_steps().equals(store.read_steps()) and RunStore(record).windows().keys() == {
        0, 5, 10, 15, 20}  # fmt: skip
    assert RunStore(record).read_rows().equals(store.read_rows())


def test_scalars_are_those_of_the_frames(run):
    rows = [row for row in run.rows if row.step == 300]
    frame, first = rows_frame(rows), rows_frame([row for row in run.rows if row.step == 100])
    scores = head_scores(run_of(frame))
    values = window_scalars(frame, first)
    whole = head_summary(head_scores(run_of(rows_frame([row for row in run.rows if row.step in (100, 300)]))))
    expected = whole[whole["step"] == 300].set_index("quantity")["value"]
    for name in ("retrieval_heads", "initial_mean_score", "top_mean_score"):
        assert values[f"heads/{name}"] == pytest.approx(expected[name])
    assert values["heads/mean_score"] == pytest.approx(scores["score"].mean())
    for row in rows:
        if row.metric == "nll":
            assert values[f"ppl/{row.corpus}"] == pytest.approx(math.exp(row.value))
    assert values["RetrievalHeads/needle_mass"] == pytest.approx(scores["needle_mass"].mean())
    interference = needle_averages(interference_cells(frame)).iloc[0]
    for name in ("mean_ppl", "exp_mean_nll", "exact_share"):
        assert values[f"interference/{name}"] == pytest.approx(interference[name])
    changes = [row.value for row in rows if row.metric == "nll_change" and row.ablated == "top2"]
    assert values["ablation/top2_nll_change"] == pytest.approx(sum(changes) / len(changes))
    assert values["UserMonitor/router_entropy"] == 1.0 and values["window/NeedleGrid_s"] == 70.0
    assert values["niah/exact_share"] == needle_averages(needle_cells(frame))["exact_share"].iloc[0]
    assert all(type(value) is float for value in values.values())


def test_a_monitor_of_others_has_scalars_maps_and_its_coordinates_in_the_table(tmp_path):
    truth, store = make_stranger(tmp_path), RunStore(tmp_path)
    last = truth[truth["step"] == 12]
    frame = store.read_rows(12, 12)
    values = window_scalars(frame, metrics=store.read_metrics())
    assert values == pytest.approx(run_scalars(load_run(tmp_path)))
    assert values["Stranger/recall"] == pytest.approx(last[last["metric"] == "recall"]["value"].mean())
    media = _window_media(make_run(frame, steps_frame([]), metrics=store.read_metrics()))
    maps = ("recall", "spread", "tilt-en", "tilt-zh", "pull-en", "pull-zh")
    assert set(media) == {"window/rows", *(f"window/Stranger-{key}" for key in maps)}
    lines = media["window/rows"].get_dataframe().query("metric == 'tilt'")
    tilt = last[last["metric"] == "tilt"]
    assert lines[["temperature", "lag_tok", "language", "mean"]].to_numpy().tolist() == tilt[
        ["temperature", "lag_tok", "language", "value"]].to_numpy().tolist()  # fmt: skip
    report = _report_media(load_run(tmp_path))
    assert {"figures/Stranger-calm", "tables/Stranger-calm", "tables/Stranger-by_task", "tables/verdict"} <= set(report)
    assert {f"figures/Stranger-{key}" for key in maps} <= set(report) and "tables/Stranger-spread" not in report


def test_the_table_averages_samples_and_keeps_other_coordinates(run):
    table = window_table(rows_frame([row for row in run.rows if row.step == 300]))
    nll = table[(table["metric"] == "answer_nll") & (table["monitor"] == "NeedleGrid")]
    assert len(nll) == 4 * 6 and set(nll["rows"]) == {3} and "sample" not in table
    assert len(table[table["metric"] == "retrieval_score"]) == 64


def test_the_table_keeps_cells_of_before_and_after_apart(run):
    """Two samples of a cell have needles, and so lengths, of their own; another cell is another line."""
    from dataclasses import replace

    sample = next(row for row in run.rows if row.metric == "answer_nll")
    rows = [
        replace(sample, monitor="InterferenceGrid", depth_cell=None, before_tok=before, after_tok=after,
                length_tok=1100 + number, sample=number, value=value)
        for before, after, number, value in [(0, 1024, 0, 1.0), (0, 1024, 1, 3.0), (1024, 0, 0, 9.0)]
    ]  # fmt: skip
    table = window_table(rows_frame(rows))
    assert table[["before_tok", "after_tok", "mean", "rows"]].values.tolist() == [[0, 1024, 2.0, 2], [1024, 0, 9.0, 1]]


def test_disabled_does_nothing_and_does_not_import_wandb(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import fails, which the sink would say
    sink = WandbSink("disabled", "p", None, "n", tmp_path / "run", {})
    sink.log_step({"step": 1, "tokens": 1, "loss": 2.0})
    sink.log_window([], 0)
    sink.close(done=True)
    assert not (tmp_path / "run").exists() and capsys.readouterr().err == ""


def test_a_figure_that_cannot_be_drawn_leaves_the_run_finished(tmp_path, capsys, small_run, monkeypatch):
    class Run:
        finished, log = 0, None

        def finish(self):
            self.finished += 1

    def fail(*_):
        raise ValueError("nothing to draw\nhere")

    sink = WandbSink("disabled", "p", None, "n", small_run.dir, {})
    sink._run, sink._off = (run := Run()), False
    monkeypatch.setattr(sink, "_keep_record", lambda: None)
    monkeypatch.setattr("megatron_lccp.commands.wandb_sink._service_runs", lambda: True)
    monkeypatch.setattr("megatron_lccp.commands.wandb_sink._report_media", fail)
    sink.close(done=True)
    sink.close(done=True)
    error = capsys.readouterr().err
    assert run.finished == 1 and error.count("\n") == 1 and error.endswith("training goes on: nothing to draw here\n")


def test_a_failure_to_start_is_one_line_and_the_training_goes_on(tmp_path, capsys, run):
    (tmp_path / "wandb").write_text("a file where a folder should be")
    sink = WandbSink("offline", "p", None, "n", tmp_path, {})
    sink.log_step({"step": 1, "tokens": 1, "loss": 2.0})
    sink.log_window(run.rows[:1], 0)
    sink.close()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("wandb: no longer recording to W&B, training goes on: ")
