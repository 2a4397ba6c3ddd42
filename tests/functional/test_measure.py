"""`lccp measure`: what it finds on a checkpoint is what training found there, and nothing is lost if it is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.distributed.ranks import lccp, start_lccp
from tests.functional.test_main_job import rows
from tests.suite import suite

SUITE = suite(every=5)


@pytest.fixture(scope="module")
def trained(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps with a checkpoint and a window of every monitor at the fifth and the tenth."""
    run = tmp_path_factory.mktemp("trained") / "run"
    found = lccp("train", str(tiny_yaml), f"--dir={run}", "--checkpoint.every.steps=5", "--checkpoint.keep=9", SUITE)
    assert found.returncode == 0, found.stderr
    return run


def assert_same(measured: pd.DataFrame, expected: pd.DataFrame, tolerance: float) -> None:
    """The same rows in the same order, but for the configuration they come from and the time they took."""
    measured, expected = (
        frame[frame.metric != "window_time"].drop(columns="config_hash").reset_index(drop=True)
        for frame in (measured, expected)
    )
    pd.testing.assert_frame_equal(measured.drop(columns="value"), expected.drop(columns="value"))
    np.testing.assert_allclose(measured.value, expected.value, rtol=tolerance, atol=tolerance)


def test_rows_are_those_of_the_training_and_a_second_call_measures_nothing(trained: Path, tiny_yaml: Path) -> None:
    command = ("measure", str(tiny_yaml), f"--dir={trained}", SUITE)
    found = lccp(*command)
    assert found.returncode == 0 and "2 measured, 0 were measured before" in found.stdout, found.stderr
    measured, expected = rows(trained / "measured"), rows(trained)
    assert_same(measured, expected[expected.step.isin([5, 10])], 1e-5)
    assert len(measured) > 1000 and set(measured.step) == {5, 10}
    events = [json.loads(line) for line in (trained / "measured/events.jsonl").read_text().splitlines()]
    assert {(event["kind"], event["text"].partition(":")[0]) for event in events} == {
        ("no_rows", f"{monitor}.wu2024") for monitor in ("InterferenceGrid", "RetrievalHeads")
    }, "what a model of ten steps writes passes no gate; that is no failure"
    assert not list((trained / "measured").glob(".journal*")) and (trained / "measured/report.html").is_file()
    written = {path: path.stat().st_mtime_ns for path in (trained / "measured/rows").iterdir()}
    assert "0 measured, 2 were measured before" in lccp(*command).stdout
    assert {path: path.stat().st_mtime_ns for path in (trained / "measured/rows").iterdir()} == written


def test_stopped_or_killed_in_the_middle_goes_on_with_the_rest(trained: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM say what is kept; killed without warning, a torn file in the journal is dropped."""
    checkpoint, out = trained / "checkpoints/step-00000010", tmp_path / "out"
    command = ["measure", str(tiny_yaml), f"--dir={trained}", SUITE, f"--checkpoint={checkpoint}", f"--out={out}"]
    said = f"lccp: stopped; what was measured is kept in {out}, and the same command goes on from there\n"
    kept: set[Path] = set()
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        before, err = kept, tmp_path / number.name
        process = start_lccp(*command, out=tmp_path / "said", err=err)
        deadline = time.monotonic() + 120
        while (kept := set(out.glob(".journal/*/*.safetensors"))) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, number)
        os.kill(process.pid, signal.SIGTERM)  # as torchrun does after the terminal's Ctrl-C
        process.join(60)
        assert process.exitcode == code and kept > before, "stopped too early or too late to show anything"
        assert not list(out.glob("rows/*")), number
        assert err.read_text() == ("" if number == signal.SIGKILL else said)
    some = min(kept)
    (some.parent / f"{some.name[:16]}-99999.safetensors").write_bytes(b"torn")
    found = lccp(*command)
    assert found.returncode == 0, found.stderr
    expected = rows(trained)
    assert_same(rows(out), expected[expected.step == 10], 1e-5)


def test_plan_is_printed_without_ranks_or_checkpoints(tiny_yaml: Path) -> None:
    found = lccp("measure", str(tiny_yaml), "--dry-run", SUITE)
    assert found.returncode == 0, found.stderr
    lines = {line.split()[0]: line.split() for line in found.stdout.splitlines()[1:]}
    assert list(lines) == ["CorpusPPL", "NeedleGrid", "InterferenceGrid", "RetrievalHeads", "HeadAblation", "CopyBack"]
    assert lines["CopyBack"][1:6] == ["2", "6", "3", "552", "360"]  # 2 lags x 3 texts of up to 102 tokens, copies of 9
    _, cells, samples, _, alone, run, gain, *_ = lines["InterferenceGrid"]
    assert (cells, samples) == ("6", "12")
    alone, run = (int(number.replace(",", "")) for number in (alone, run))
    assert alone > 1.5 * run and gain == f"{alone / run:.1f}x"
    assert run / int(lines["InterferenceGrid"][3]) <= 75  # its prefill_tok
    capacity = lccp(
        "measure", str(tiny_yaml), "--dry-run", SUITE, "--megatron.transformer.moe_expert_capacity_factor=1.0"
    )
    assert "not shared: moe_expert_capacity_factor" in capacity.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint=absent"], "--checkpoint: absent is neither"),
        (["--monitors=[]"], "monitors: is empty"),
        (["--dir=/absent"], "--checkpoint: /absent/checkpoints is neither"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(arguments: list[str], said: str, tiny_yaml: Path) -> None:
    found = lccp("measure", str(tiny_yaml), *arguments)
    assert found.returncode == 2 and said in found.stderr and found.stderr.count("\n") == 1


def test_what_monitors_cannot_do_refuses_the_start(trained: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    """All of it at once, a line each, before anything is written."""
    common = {"haystacks": ["code"]}
    parts = [
        ("HeadAblation", {**common, "top": [99], "heads": [[7, 0]]}), ("CopyBack", {"longest_tok": 120}),
        ("HeadAblation", {**common, "top": [], "heads": [[7, 0]]}),
        ("CopyBack", {"longest_tok": 4096, "segment_tok": 300}),
    ]  # fmt: skip
    monitors = [{"class_path": f"megatron_lccp.monitors.{name}", "init_args": fields} for name, fields in parts]
    said = [
        "monitors.0 (HeadAblation): top: 99 is no number of heads of a model that has 8",
        "monitors.0 (HeadAblation): heads: (7, 0) is not in a model of 2 layers with 4 heads",
        "monitors.2 (HeadAblation): heads: (7, 0) is not in a model of 2 layers with 4 heads",
        "monitors.3 (CopyBack): longest_tok: 4096 is more than the model's context of 128; lower it",
        "monitors.3 (CopyBack): segment_tok: two segments of 300 need as many ordinary ids; the tokenizer has 441; lower it",
    ]
    at = f"--checkpoint={trained / 'checkpoints/step-00000010'}"
    run, chosen = tmp_path / "run", "--monitors=" + json.dumps(monitors)
    for command in (["train"], ["train", "--dry-run"], ["measure", at], ["measure", "--dry-run"], ["plan"]):
        found = lccp(command[0], str(tiny_yaml), f"--dir={run}", chosen, *command[1:])
        lines = [line.partition(f"{tiny_yaml}: ")[2] for line in found.stderr.splitlines()]
        assert (found.returncode, lines) == (2, said), (command, found.stderr)
    assert not run.exists()


def test_other_monitors_need_another_directory(trained: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    command = ["measure", str(tiny_yaml), f"--dir={trained}", f"--out={tmp_path}"]
    assert lccp(*command, f"--checkpoint={trained / 'checkpoints/step-00000010'}").returncode == 0
    found = lccp(*command, SUITE)
    assert found.returncode == 2 and "with another configuration (monitors.0" in found.stderr
    (tmp_path / "measured.json").write_text("null")
    found = lccp(*command)
    assert found.returncode == 2 and "measured.json: cannot be read" in found.stderr
    assert len(found.stderr.splitlines()) == 1, found.stderr
    found = lccp("measure", str(tiny_yaml), f"--dir={trained}", f"--out={trained}")
    assert found.returncode == 2 and "is a training's run directory" in found.stderr


def test_end_of_a_stage_is_measured_as_training_does(tiny_yaml: Path, tmp_path: Path) -> None:
    """As the start of the next stage, with its RoPE base; a failed monitor is not taken for a measured one."""
    run, grid = tmp_path / "run", "--monitors.1.init_args.every.steps=1"
    trained = lccp("train", str(tiny_yaml), f"--dir={run}", "--checkpoint.every.steps=6", "--training.steps=7", grid)
    assert trained.returncode == 0, trained.stderr
    at, out = f"--checkpoint={run / 'checkpoints/step-00000006'}", f"--out={tmp_path / 'out'}"
    command = ["measure", str(tiny_yaml), f"--dir={run}", at, out, "--training.steps=7", grid]
    found = lccp(*command)
    assert found.returncode == 0, found.stderr
    measured, expected = rows(tmp_path / "out"), rows(run)
    assert set(measured.stage) == {"lccp"}
    of_grid = [frame[(frame.monitor == "NeedleGrid") & (frame.step == 6)] for frame in (measured, expected)]
    assert_same(*of_grid, 1e-5)
    # step 6 of other weights: refused, not called measured
    other = tmp_path / "other"
    other.mkdir()
    (run / "checkpoints/step-00000007").rename(other / "step-00000006")
    content = json.loads((other / "step-00000006/checkpoint.json").read_text())
    content["position"]["step"] = 6
    (other / "step-00000006/checkpoint.json").write_text(json.dumps(content))
    found = lccp(*command[:3], f"--checkpoint={other / 'step-00000006'}", *command[4:])
    assert found.returncode == 2 and "holds step 6 of other weights" in found.stderr


def test_a_monitor_that_fails_is_named_and_tried_again(trained: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    long = {"every": {"steps": 1}, "length_tok": 1_000_000}
    longer = {"class_path": "megatron_lccp.monitors.CorpusPPL", "init_args": long}
    corpus = {"class_path": "megatron_lccp.monitors.CorpusPPL", "init_args": {"every": {"steps": 1}, "length_tok": 64}}
    command = [
        "measure", str(tiny_yaml), f"--dir={trained}", f"--out={tmp_path}",
        "--monitors=" + json.dumps([longer, corpus]), f"--checkpoint={trained / 'checkpoints/step-00000010'}",
    ]  # fmt: skip
    for _ in range(2):
        found = lccp(*command)
        assert found.returncode == 1 and "held-out tokens are less than one window of 1000000" in found.stderr
        assert "1 measured" in found.stdout and set(rows(tmp_path).metric) >= {"nll", "position_nll"}
