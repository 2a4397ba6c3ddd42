"""Processes that end with another: nothing outlives a rank, and no rank its launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_lccp.processes import is_running, this_process


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pid: int, start: int) -> None:
    end = time.monotonic() + 60
    while is_running(pid, start):
        assert time.monotonic() < end, f"{pid} is still there"
        time.sleep(0.05)


def test_a_process_is_told_from_a_later_one_with_its_pid() -> None:
    me = this_process()
    assert me.lives() and is_running(me.pid, 0) and not is_running(me.pid, me.start + 1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(ended.pid, 0), "a zombie runs no more"
    ended.wait()


def test_forks_end_with_their_process() -> None:
    script = """
import multiprocessing, time
from megatron_lccp.processes import forks_end_with_this
forks_end_with_this()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
child.start()
print(child.pid, flush=True)
child.join()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        start = int(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[19])
        process.kill()
    wait_until_gone(child, start)


RANK = """
import signal, sys, time
from megatron_lccp import processes
processes.GRACE_S = 1.0
processes.leave_with_launcher()
def stop(number, frame):
    print("asked", flush=True)
    if sys.argv[1] == "leaves":
        sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""
LAUNCHER = """
import os, subprocess, sys, time
from megatron_lccp.processes import name_launcher
name_launcher()
os.environ["TORCHELASTIC_RUN_ID"] = "none"
subprocess.Popen(sys.argv[1:])
time.sleep(600)
"""


@pytest.mark.parametrize("through", [[], ["bash", "-c", '"$@"; true', "wrapper"]], ids=["direct", "in a script"])
@pytest.mark.parametrize("way", ["leaves", "hangs"])
def test_a_rank_whose_launcher_is_killed_is_asked_to_leave(through: list[str], way: str) -> None:
    command = [sys.executable, "-c", LAUNCHER, *through, sys.executable, "-c", RANK, way]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stdout and launcher.stderr and launcher.stdout.readline() == "ready\n"
    os.kill(launcher.pid, signal.SIGKILL)
    said, complaints = launcher.communicate(timeout=60)  # ends when the rank has closed what it inherited
    assert said.startswith("asked\n")
    assert f"the launcher (pid {launcher.pid}) is gone; its ranks stop" in complaints or not through
    assert ("has not stopped 1 s after its launcher" in complaints) == (way == "hangs")


def test_a_process_without_a_launcher_is_left_alone() -> None:
    script = "from megatron_lccp.processes import leave_with_launcher as f; import threading; f(); print(threading.active_count())"
    environment = {key: value for key, value in os.environ.items() if key != "TORCHELASTIC_RUN_ID"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert found.stdout == "1\n"
