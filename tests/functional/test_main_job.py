"""The main job end to end on two ranks, as a user starts it: torchrun, the command, the run directory it leaves.

The same code runs with gloo on the CPU and with NCCL where two GPUs are present.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from megatron_lccp.weights.checkpoint import checkpoints_in
from tests.commands.test_wandb_sink import history
from tests.distributed.ranks import ROOT, free_port

STEPS = 10  # tests/tiny.py


def start(tiny_yaml: Path, backend: str, *overrides: str, log: Path) -> subprocess.Popen:
    """The main job in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if backend == "gloo":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [
        sys.executable, "tools/torchrun.py", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "-m", "megatron_lccp.cli", "train", str(tiny_yaml), "--parallel.expert=2", *overrides,
    ]  # fmt: skip
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=stream, cwd=ROOT, env=environment, start_new_session=True
        )


def run(tiny_yaml: Path, backend: str, *overrides: str, log: Path) -> int:
    process = start(tiny_yaml, backend, *overrides, log=log)
    try:
        return process.wait(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def losses(run_dir: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["step"] for line in lines}), "a step is on record twice"
    return {line["step"]: line["loss"] for line in lines}


def rows(run_dir: Path) -> pd.DataFrame:
    """Rows of the windows."""
    files = sorted((run_dir / "rows").glob("step-*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files]).query("metric != 'window_time'").reset_index(drop=True)


def health(run_dir: Path) -> pd.DataFrame:
    """Rows of training health, each step once, in whatever files they are."""
    files = sorted((run_dir / "rows").glob("health-*.parquet"))
    found = pd.concat([pd.read_parquet(file) for file in files]).sort_values("step", kind="stable")
    assert not found.duplicated(["step", "metric", "layer", "expert"]).any()
    return found.reset_index(drop=True)


@pytest.fixture(scope="module")
def whole(tiny_yaml: Path, backend: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp(f"whole-{backend}")
    log = directory / "log"
    assert run(tiny_yaml, backend, f"--dir={directory / 'run'}", "--wandb.mode=offline", log=log) == 0, log.read_text()
    return directory / "run"


def test_main_job_trains_measures_and_reports(whole: Path) -> None:
    assert sorted(losses(whole)) == list(range(1, STEPS + 1))
    assert sorted(rows(whole).step.unique()) == [0, 3, 6, 9, 10]
    assert set(rows(whole).monitor) == {"CorpusPPL", "NeedleGrid", "RetrievalHeads"}
    assert sorted(health(whole).step.unique()) == list(range(1, STEPS + 1))
    assert "router_entropy" in json.loads((whole / "steps.jsonl").read_text().splitlines()[0])
    assert list((whole / "wandb").glob("offline-run-*"))
    page = (whole / "report.html").read_text()
    figures = re.findall(r'<figure class="chart" id="([^"]+)"', page)
    assert {"needle-cells", "corpus", "head-cells", "RetrievalHeads-content_score", "health"} <= {*figures}
    assert page.count('<section class="verdict') == 1 and " failed: " not in page
    log = (whole.parent / "log").read_text()
    assert f"lccp step 4/4  loss {losses(whole)[STEPS]:.3f}" in log and "step 3: measuring NeedleGrid" in log
    assert str(whole / "report.html") in log


def test_killed_again_and_again_equals_uninterrupted(
    tiny_yaml: Path, backend: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 in a save, the launcher in a window, a rank at the start; the same command ends as if nothing had happened:
    steps, rows and the last checkpoint, bit by bit, and nothing is left of it, no process and no file."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if backend == "gloo":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    kill_loop = importlib.import_module("kill_loop")
    aims = ["--aims", "save", "window", "start", "--victims", "rank 0", "launcher", "another rank"]
    often = ["--kills=3", "--kills-per-run=3", f"--work={tmp_path}", f"--undisturbed={whole}"]
    kill_loop.main([str(tiny_yaml), "--parallel.expert=2", *often, *aims])
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["differences"], record["leftovers"]) == ([], [])
    assert record["by_aim"] == {"save": 1, "window": 1, "start": 1} and record["runs"] >= 1


def test_interrupted_and_resumed_on_another_layout(tiny_yaml: Path, backend: str, whole: Path, tmp_path: Path) -> None:
    """Ctrl-C saves where it stands; TP2 goes on from what EP2 saved. A SIGTERM while it starts to is one line."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start(tiny_yaml, backend, f"--dir={run_dir}", log=log)
    _wait_for_step(run_dir, 4, process, log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert "the same command resumes after step" in log.read_text()
    done = max(losses(run_dir))
    started = start(tiny_yaml, backend, f"--dir={run_dir}", log=log)
    _wait_for(f"resumed after step {done}", started, log)
    os.killpg(started.pid, signal.SIGTERM)
    assert started.wait(timeout=120) == 143 and "Traceback" not in log.read_text(), log.read_text()
    assert re.search(r"lccp: stopped (after step|before the training)", log.read_text().partition("resumed after")[2])
    done = max(losses(run_dir))
    tp2 = ("--parallel.expert=1", "--parallel.tensor=2")
    assert run(tiny_yaml, backend, f"--dir={run_dir}", *tp2, log=log) == 0, log.read_text()
    assert f"resumed after step {done}" in log.read_text()
    ours, theirs = losses(run_dir), losses(whole)
    np.testing.assert_allclose([ours[s] for s in sorted(ours)], [theirs[s] for s in sorted(theirs)], rtol=2e-5)


def test_a_job_that_slurm_ends_saves_first(tiny_yaml: Path, backend: str, tmp_path: Path) -> None:
    """As examples/slurm/pretrain_lccp.sbatch asks for before the time is up: SIGTERM to torchrun, to every rank, and to
    what a rank has started whatever session that is in, such as W&B's service and Megatron-Core's writers. The launcher's
    time is named if it is too short."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    more = ["--monitors=[]", "--checkpoint.every.steps=2", "--checkpoint.keep=1", "--wandb.mode=offline"]
    more += ["--stages.base.tokens=512000"]  # 1,000 steps
    process = start(tiny_yaml, backend, f"--dir={run_dir}", *more, log=log)
    _wait_for_step(run_dir, 3, process, log)
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    assert any("wandb" in each.name() for each in everyone)
    for each in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):  # a writer may be done
            each.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    done = max(losses(run_dir))
    assert "Traceback" not in log.read_text(), log.read_text()
    assert "torchrun kills its ranks 30 s after the signal" in log.read_text()
    lines = [line for folder in (run_dir / "wandb").glob("offline-run-*") for line in history(folder)[0]]
    assert sorted(line["train/step"] for line in lines) == list(range(1, done + 1))
    assert f"the same command resumes after step {done}" in log.read_text()
    assert [path.name for path in checkpoints_in(run_dir / "checkpoints")] == [f"step-{done:08d}"]


def test_a_rank_that_does_not_answer_is_named(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and going on again; then rank 0, which the other names; and a SIGTERM ends what waits for it in vain."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    run_dir, log = tmp_path / "run", tmp_path / "log"
    more = ["--training.stall_s=4", "--training.stall_steps=3", "--monitors=[]", "--stages.base.tokens=5120000"]
    heard = f"--events.command=echo $LCCP_EVENT_KIND $LCCP_EVENT_STEP >>{tmp_path}/heard"
    process = start(tiny_yaml, "gloo", f"--dir={run_dir}", *more, heard, "--training.stop_within_s=5", log=log)
    try:
        _wait_for_step(run_dir, 3, process, log)
        first, other = sorted(_ranks_of(process), key=_rank_of)
        os.kill(other, signal.SIGSTOP)
        _wait_for(f"pid {other}) does not answer", process, run_dir / "events.jsonl")
        before = len(log.read_text())
        os.kill(other, signal.SIGCONT)
        _wait_for("goes on after", process, log, before)
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        (event, *_) = [event for event in events if f"pid {other}) does not answer" in event["text"]]
        assert event["kind"] == "stall" and re.match(r".*step \d+.*: nothing has moved for \d+ s", event["text"])
        _wait_for(f"stall {event['step']}", process, tmp_path / "heard")
        before = len(log.read_text())
        os.kill(first, signal.SIGSTOP)
        _wait_for("rank 0 does not answer for", process, log, before)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == 143
        assert "rank 0 does not answer, so nothing more could be saved; the same command resumes" in log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(value[5:]) for value in environment if value.startswith(b"RANK="))


def _wait_for(text: str, process: subprocess.Popen, log: Path, before: int = 0) -> None:
    """Until the job has said it, after so much `before`."""
    end = time.monotonic() + 200
    while not log.exists() or text not in log.read_text()[before:]:
        said = log.read_text() if log.exists() else ""
        assert time.monotonic() < end and process.poll() is None, f"{text!r} was not said:\n{said}"
        time.sleep(0.02)


def _wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        lines = (run_dir / "steps.jsonl").read_text().splitlines() if (run_dir / "steps.jsonl").exists() else []
        if len(lines) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached:\n{log.read_text()}")


def _ranks_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    trainers = [int(pid) for pid in children if b"megatron_lccp.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(trainers) == 2
    return trainers
