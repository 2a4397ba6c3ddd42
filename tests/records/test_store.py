"""The run directory: what is written is what is read, and nothing is ever half there or counted twice."""

import dataclasses
import json
import math
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from megatron_lccp.analysis.run import load_run
from megatron_lccp.records.store import EVENT_COLUMNS, STEP_COLUMNS, RunStore, row_schema, rows_frame
from megatron_lccp.schema import Metric, Row
from tests.analysis.planted import declare


def row(**other) -> Row:
    values = dict(
        run="r", config_hash="h", step=3, tokens=300, stage="lccp", monitor="M", metric="m", value=1.5, unit="nat", n=7
    )
    return Row(**(values | other))


def test_rows_come_back_as_they_were_written(run):
    frame = RunStore(run.dir).read_rows(health=False)
    assert list(frame.columns) == [field.name for field in dataclasses.fields(Row) if field.name != "own"]
    assert len(frame) == len(run.rows)
    for name in frame.columns:
        expected = [getattr(row, name) for row in run.rows]
        assert [None if pd.isna(value) else value for value in frame[name]] == expected, name
    assert str(frame["length_tok"].dtype) == "Int64"
    pd.testing.assert_frame_equal(frame, rows_frame(run.rows))


def test_only_coordinates_may_be_missing(tmp_path):
    assert [field.name for field in row_schema() if not field.nullable] == [
        "run", "config_hash", "step", "tokens", "stage", "monitor", "metric", "value", "unit", "n",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"Row\.stage is None in 1 of 2 rows"):
        RunStore(tmp_path).write_window([row(), row(stage=None)], 3)
    with pytest.raises(ValueError, match="a row of step 3 in the window of step 4"):
        RunStore(tmp_path).write_window([row()], 4)
    assert not RunStore(tmp_path).windows()


def test_numpy_numbers_and_unicode_are_taken_as_they_are(tmp_path):
    store = RunStore(tmp_path)
    store.write_window([row(value=np.float32(0.25), n=np.int64(2), layer=np.int32(1), corpus="中文")], 3)
    frame = store.read_rows()
    assert (frame["value"][0], frame["n"][0], frame["layer"][0], frame["corpus"][0]) == (0.25, 2, 1, "中文")


def test_coordinates_of_a_monitors_own_come_back_as_columns_of_their_kind(tmp_path):
    store = RunStore(tmp_path)
    own = [dict(lag_tok=np.int64(64), task="copy"), dict(lag_tok=128, heat=np.float32(0.5)), {}]
    store.write_window([row(own=each) for each in own], 3)
    frame = store.read_rows()
    assert str(frame["lag_tok"].dtype) == "Int64" and frame["lag_tok"].tolist() == [64, 128, pd.NA]
    assert [None if pd.isna(value) else value for value in frame["task"]] == ["copy", None, None]
    assert [None if pd.isna(value) else value for value in frame["heat"]] == [None, 0.5, None]
    assert "own" not in frame and store.read_table()["own"].to_pylist()[2] is None
    found = store.read_means(["metric", "own"])
    assert found["lag_tok"].tolist()[:2] == [64, 128] and found["n"].tolist() == [1, 1, 1]


def test_what_monitors_declare_is_kept_beside_what_earlier_ones_declared(tmp_path):
    store, before = RunStore(tmp_path), RunStore(tmp_path).read_metrics()
    one, two = Metric(name="m", unit="nat", about="One.", axes=("lag_tok",)), Metric(name="m", unit="nat", about="Two.")
    declare(store, "First", one)
    declare(store, "Second", one)
    declare(store, "Second", two)
    assert store.read_metrics() == before | {("First", "m"): one, ("Second", "m"): two}
    assert before["CorpusPPL", "nll"].judged  # of version 0.1, which kept no such file
    written = store.metrics_path.stat().st_mtime_ns
    declare(store, "Second", two)
    assert store.metrics_path.stat().st_mtime_ns == written


def test_of_a_later_version_what_is_not_known_is_left_out(tmp_path):
    store = RunStore(tmp_path)
    declare(store, "First", Metric(name="m", unit="nat", about=""))
    declared = json.loads(store.metrics_path.read_text())
    declared["First"][0]["colour"] = {"any": ["thing"]}
    store.metrics_path.write_text(json.dumps(declared))
    assert store.read_metrics()["First", "m"] == Metric(name="m", unit="nat", about="")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"M": 3}', '{"M": ["m"]}', '{"M": [{"name": "m"}]}', '{"M": [{"name": "m", "unit": "nat"',
             '{"M": [{"name": "m", "unit": "nat", "about": "", "axes": ["a", "b", "c"]}]}']
)  # fmt: skip
def test_a_file_of_metrics_that_is_broken_is_refused_in_one_line_with_the_remedy(tmp_path, text):
    store = RunStore(tmp_path)
    store.write_window([row()], 3)
    store.metrics_path.write_text(text)
    with pytest.raises(ValueError, match="does not hold metrics of monitors .*; remove it") as error:
        load_run(tmp_path)
    assert str(error.value).startswith(str(store.metrics_path)) and "\n" not in str(error.value)
    store.metrics_path.unlink()
    assert load_run(tmp_path).measures[0].metric.about


def test_a_window_measured_again_replaces_the_first(tmp_path):
    store = RunStore(tmp_path)
    path = store.write_window([row(), row(metric="other")], 3)
    assert path.name == "step-00000003.parquet"
    store.write_window([row(value=2.5)], 3)
    assert store.read_rows()["value"].tolist() == [2.5]
    assert [file.name for file in (tmp_path / "rows").iterdir()] == ["step-00000003.parquet"]


def test_a_run_without_anything_reads_as_empty_frames(tmp_path):
    store = RunStore(tmp_path / "none")
    assert not store.exists() and not (tmp_path / "none").exists()
    assert store.read_rows().empty and store.read_steps().empty and store.read_events().empty
    assert tuple(store.read_steps().columns) == STEP_COLUMNS and tuple(store.read_events().columns) == EVENT_COLUMNS


def test_steps_keep_extra_fields_and_write_strict_json(tmp_path):
    store = RunStore(tmp_path)
    store.append_step({"step": 1, "tokens": 10, "stage": "a", "loss": np.float32(2.0), "skipped": False})
    store.append_step({"step": 2, "tokens": 20, "stage": "a", "loss": math.nan, "skipped": np.True_, "moe_loss": 0.5})
    lines = store.steps_path.read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail)["loss"] is None
    steps = store.read_steps()
    assert steps["loss"].tolist()[0] == 2.0 and math.isnan(steps["loss"][1])
    assert steps["skipped"].tolist() == [False, True] and steps["moe_loss"][1] == 0.5


def test_events_have_time_step_kind_and_text(tmp_path):
    store = RunStore(tmp_path)
    store.append_event("resume", "from step 5\nsecond line", step=5)
    (event,) = store.read_events().to_dict("records")
    assert (event["step"], event["kind"], event["text"]) == (5, "resume", "from step 5\nsecond line")
    assert pd.Timestamp(event["time"]).tzinfo is not None


def test_rewind_forgets_what_is_trained_again(small_run):
    store = RunStore(small_run.dir)
    (store.rows_dir / "step-00000025.parquet.tmp").write_bytes(b"half")
    events = len(store.read_events())
    store.rewind(10)
    assert store.read_steps()["step"].max() == 10 and list(store.windows()) == [0, 5, 10]
    assert len(store.read_events()) == events
    assert not list(store.rows_dir.glob("*.tmp"))
    store.rewind(10)  # killed and started again
    for step in range(11, 21):
        store.append_step({"step": step, "tokens": step, "stage": "lccp"})
    assert store.read_steps()["step"].tolist() == list(range(1, 21))
    store.rewind(-1)
    assert store.read_steps().empty and not store.windows()


def health_rows(first: int, last: int, **other) -> list[Row]:
    return [
        row(step=step, tokens=10 * step, monitor="health", metric="router_entropy", layer=layer, **other)
        for step in range(first, last + 1)
        for layer in range(2)
    ]


def test_training_health_stands_beside_the_windows(tmp_path):
    store = RunStore(tmp_path)
    for first, last in ((1, 3), (4, 6), (7, 7)):
        path = store.write_health(health_rows(first, last))
        assert path.name == f"health-{first:08d}-{last:08d}.parquet"
        store.write_window([row(step=last)], last)
    store.write_window([row(step=0)], 0)
    frame = store.read_rows()
    assert frame.query("monitor == 'health'")["step"].tolist() == [step for step in range(1, 8) for _ in range(2)]
    assert frame.query("monitor == 'M'")["step"].tolist() == [0, 3, 6, 7] and frame["step"].is_monotonic_increasing
    assert frame.query("step == 3")["monitor"].tolist() == ["health", "health", "M"]  # in the order measured
    assert store.read_rows(first=3, last=5)["step"].tolist() == [3, 3, 3, 4, 4, 5, 5]
    assert store.read_rows(first=7)["step"].tolist() == [7] * 3 and store.read_rows(last=0)["step"].tolist() == [0]
    assert list(store.windows()) == [0, 3, 6, 7] and store.read_rows(health=False)["step"].tolist() == [0, 3, 6, 7]
    for empty_or_wrong in ([], [row(stage=None)]):
        with pytest.raises(ValueError, match=r"no rows|Row\.stage is None"):
            store.write_health(empty_or_wrong)


def test_windows_are_read_without_opening_training_health(tmp_path):
    store = RunStore(tmp_path)
    store.write_window([row()], 3)
    store.write_health(health_rows(1, 3)).write_bytes(b"torn")
    assert len(store.read_rows(health=False)) == 1  # and without a warning
    with pytest.warns(UserWarning, match="health-00000001-00000003.parquet: skipped, not a readable Parquet file"):
        assert len(store.read_rows()) == 1


def test_rewind_cuts_a_file_of_training_health_that_spans_the_step(tmp_path):
    store = RunStore(tmp_path)
    for first, last in ((1, 4), (5, 8), (9, 12)):
        store.write_health(health_rows(first, last))
    (store.rows_dir / "health-00000013-00000014.parquet.tmp").write_bytes(b"half")
    spanning = store.health_files()[5, 8].read_bytes()
    store.rewind(6)
    assert [path.name for path in sorted(store.rows_dir.iterdir())] == [
        "health-00000001-00000004.parquet", "health-00000005-00000006.parquet",
    ]  # fmt: skip
    assert store.read_rows()["step"].tolist() == [step for step in range(1, 7) for _ in range(2)]
    (store.rows_dir / "health-00000005-00000008.parquet").write_bytes(spanning)  # killed before the old file went
    store.rewind(6)
    assert list(store.health_files()) == [(1, 4), (5, 6)]
    store.write_health(health_rows(7, 9))  # trained again
    assert store.read_rows()["step"].tolist() == [step for step in range(1, 10) for _ in range(2)]
    store.rewind(4)
    assert list(store.health_files()) == [(1, 4)]
    store.rewind(-1)
    assert not store.health_files()


def test_rewind_leaves_a_torn_file_of_training_health_where_it_is(tmp_path):
    store = RunStore(tmp_path)
    store.write_health(health_rows(1, 4)).write_bytes(b"torn")
    with pytest.warns(UserWarning, match="skipped, not a readable Parquet file"):
        store.rewind(2)
    assert list(store.health_files()) == [(1, 4)]


def test_rewind_of_a_new_directory_does_nothing(tmp_path):
    RunStore(tmp_path / "new").rewind(0)
    assert not (tmp_path / "new").exists()


def test_a_torn_last_line_is_dropped_and_does_not_swallow_the_next(small_run):
    store = RunStore(small_run.dir)
    whole = store.steps_path.read_bytes()
    store.steps_path.write_bytes(whole[:-20])
    with pytest.warns(UserWarning, match=r"steps\.jsonl:20: dropped, not a whole JSON object"):
        assert store.read_steps()["step"].tolist() == list(range(1, 20))
    store.append_step({"step": 20, "tokens": 1, "stage": "lccp"})
    with pytest.warns(UserWarning, match=r"steps\.jsonl:20"):
        assert store.read_steps()["step"].tolist() == list(range(1, 21))
    with pytest.warns(UserWarning):
        store.rewind(20)
    assert len(store.read_steps()) == 20  # and without a warning: pytest.ini would not let it pass unseen


def test_a_torn_parquet_file_is_named_and_skipped(small_run):
    store = RunStore(small_run.dir)
    path = store.windows()[5]
    path.write_bytes(path.read_bytes()[:-30])
    (store.rows_dir / "step-00000015.parquet").write_bytes(b"")
    with pytest.warns(UserWarning) as caught:
        frame = store.read_rows(health=False)
    assert sorted(frame["step"].unique()) == [0, 10, 20]
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2 and all("skipped, not a readable Parquet file" in text for text in texts)
    assert "step-00000005.parquet" in texts[0] and "step-00000015.parquet" in texts[1]


def test_a_damaged_configuration_does_not_hide_what_was_measured(small_run):
    RunStore(small_run.dir).config_path.write_bytes(b"name: caf\xe9\n")
    run = load_run(small_run.dir)
    assert len(run.rows) and run.config_text.startswith("name: caf")


def test_rows_can_be_read_for_some_steps(small_run):
    store = RunStore(small_run.dir)
    assert sorted(store.read_rows(first=5, last=10)["step"].unique()) == [5, 6, 7, 8, 9, 10]
    assert sorted(store.read_rows(first=5, last=10, health=False)["step"].unique()) == [5, 10]


def test_the_files_are_plain_parquet_that_others_can_read(small_run):
    table = pq.ParquetFile(RunStore(small_run.dir).windows()[0]).read()
    assert table.schema.names == row_schema().names


def test_no_room_is_one_clear_line_and_leaves_the_old_files(tmp_path):
    """The kernel refuses to let a file grow past a limit: what a full disk does, without filling one."""
    script = textwrap.dedent("""
        import resource, sys
        from megatron_lccp.records.store import RunStore
        from megatron_lccp.schema import Row
        def rows(n):
            return [Row(run="r", config_hash="h", step=1, tokens=1, stage="s", monitor="M", metric=f"m{i * 7919}",
                        value=i**0.5, unit="nat", n=1) for i in range(n)]
        store = RunStore(sys.argv[1])
        store.write_window(rows(1), 1)
        store.append_step({"step": 1, "tokens": 1, "loss": 1.0})
        store.write_config("old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))
        for write in (lambda: store.write_window(rows(20000), 1),
                      lambda: store.append_step({"step": 2, "text": "x" * 15000}),
                      lambda: store.write_config("x" * 15000)):
            try:
                write()
            except OSError as error:
                print(error)
            else:
                print("no error")
    """)
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 3, result.stdout
    for line, name in zip(lines, ("step-00000001.parquet", "steps.jsonl", "config.yaml")):
        assert "cannot be written: File too large; the old file is kept" in line and name in line
    store = RunStore(tmp_path)
    assert len(store.read_rows()) == 1 and store.config_path.read_text() == "old"
    assert store.read_steps()["step"].tolist() == [1]
    assert not list(tmp_path.rglob("*.tmp"))


def test_columns_and_conditions_are_those_of_a_plain_selection(small_run):
    store = RunStore(small_run.dir)
    whole = store.read_rows()
    columns = ["step", "value", "layer"]
    found = store.read_rows(columns=columns, where=pc.field("metric") == "retrieval_score")
    expected = whole.loc[whole["metric"] == "retrieval_score", columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected)
    found = store.read_rows(
        first=10, last=15, health=False, where=pc.field("layer").is_valid() & (pc.field("head") == 1)
    )
    expected = whole[whole["step"].isin((10, 15)) & whole["layer"].notna() & (whole["head"] == 1)]
    assert found["value"].tolist() == expected["value"].tolist() and len(found)
    assert store.read_rows(where=pc.field("metric") == "nothing").columns.tolist() == whole.columns.tolist()


def test_means_are_those_of_a_plain_grouping_in_the_order_measured(small_run):
    by = ["step", "layer", "head"]
    found = RunStore(small_run.dir).read_means(by, pc.field("metric") == "retrieval_score", health=False)
    groups = {}
    for row in small_run.rows:
        if row.metric == "retrieval_score":
            groups.setdefault((row.step, row.layer, row.head), []).append(row.value)
    assert [tuple(key) for key in found[by].to_numpy().tolist()] == list(groups)
    assert found["value"].tolist() == pytest.approx([sum(values) / len(values) for values in groups.values()])
    assert found["low"].tolist() == [min(values) for values in groups.values()]
    assert found["high"].tolist() == [max(values) for values in groups.values()]
    assert found["n"].tolist() == [len(values) for values in groups.values()]


def test_means_of_more_rows_than_arrow_groups_at_once_stand_in_the_order_measured(tmp_path):
    store, metrics = RunStore(tmp_path), ("router_entropy", "grad_norm_router", "attention_logit_max", "dropped_share")
    for first in range(1, 1201, 300):
        store.write_health(
            row(step=step, tokens=10 * step, monitor="health", metric=metric, layer=layer, value=step + layer)
            for step in range(first, first + 300)
            for metric in metrics
            for layer in range(8)
        )
    found = store.read_means(["step", "tokens", "metric"], pc.field("monitor") == "health")
    expected = [(step, 10 * step, metric) for step in range(1, 1201) for metric in metrics]
    assert list(found[["step", "tokens", "metric"]].itertuples(index=False, name=None)) == expected
    assert found["value"].tolist() == [step + 3.5 for step in range(1, 1201) for _ in metrics]


def test_what_a_killed_rewind_left_twice_counts_once(tmp_path):
    store = RunStore(tmp_path)
    store.write_health(health_rows(1, 4))
    spanning = store.write_health(health_rows(5, 8)).read_bytes()
    store.rewind(6)
    (store.rows_dir / "health-00000005-00000008.parquet").write_bytes(spanning)
    assert store.read_rows()["step"].tolist() == [step for step in range(1, 9) for _ in range(2)]


def test_a_step_recorded_twice_counts_once(tmp_path):
    """A loop of others resumes without a rewind: the later record is the one that the model went on from."""
    store = RunStore(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.5), (3, 2.0), (2, 2.4), (3, 1.9), (4, 1.8)):
        store.append_step({"step": step, "tokens": step, "stage": "a", "loss": loss})
    steps = store.read_steps()
    assert steps["step"].tolist() == [1, 2, 3, 4] and steps["loss"].tolist() == [3.0, 2.4, 1.9, 1.8]


def test_a_killed_writer_leaves_the_windows_before_it_whole(tmp_path):
    """SIGKILL in the middle of writing windows: every file under its name is whole, and nothing else is read."""
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from megatron_lccp.records import store as records
        from tests.records.test_store import row
        store = records.RunStore(sys.argv[1])
        real = records.pq.write_table
        def write(table, path, **options):
            real(table, path, **options)
            if table["step"][0].as_py() == 5:
                with open(path, "r+b") as file:
                    file.truncate(100)
                os.kill(os.getpid(), signal.SIGKILL)
        records.pq.write_table = write
        for step in range(9):
            store.write_window([row(step=step)], step)
            store.append_step({"step": step, "tokens": step})
    """)
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    store = RunStore(tmp_path)
    assert store.read_rows()["step"].tolist() == [0, 1, 2, 3, 4]
    assert store.read_steps()["step"].max() == 4 and max(store.windows()) == 4
    store.rewind(4)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_new_training_finds_no_wandb_run_of_an_earlier_one(small_run):
    store = RunStore(small_run.dir)
    (small_run.dir / "wandb").mkdir()
    (small_run.dir / "wandb" / "run_id").write_text("abc\n")
    aside = store.set_aside()
    assert (aside / "wandb" / "run_id").read_text() == "abc\n" and not (small_run.dir / "wandb").exists()
    assert not store.exists() and RunStore(aside).exists()
