"""The lock of a directory: whoever held it and however that ended, the next one comes in, and no two are in at once."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lccp import lock
from megatron_lccp.lock import Held, sole_user
from megatron_lccp.processes import this_process

HOLD = """
import os, sys, time
from pathlib import Path
from megatron_lccp import lock
lock.HEARTBEAT_S = 0.2
with lock.sole_user(Path(sys.argv[1]), "runs/a"):
    if sys.argv[2:] == ["fork"] and os.fork() == 0:
        os.close(1)
        time.sleep(600)
    print("held", flush=True)
    time.sleep(600)
"""
ELSEWHERE = {"host": "node7", "pid": 4711, "start": 99, "kernel": "another boot", "pids": "pid:[1]"}
SINCE = "2026-11-30T08:00:00+00:00"


@contextlib.contextmanager
def another(path: Path, *how: str) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(path), *how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.5)
    monkeypatch.setattr(lock, "MISSED", 4)


def write_elsewhere(path: Path, silent_s: float = 0.0) -> None:
    path.write_text(json.dumps({"process": ELSEWHERE, "since": SINCE}))
    os.utime(path, (time.time() - silent_s,) * 2)


def holder(path: Path) -> int:
    return json.loads(path.read_text())["process"]["pid"]


def test_the_second_one_hears_who_holds_it(path: Path) -> None:
    with another(path) as first:
        with pytest.raises(Held) as refused, sole_user(path, "runs/a"):
            pass
        host = re.escape(this_process().host)
        line = rf"runs/a: another job on {host} \(pid {first.pid}, since 20\d\d-\S+\+00:00\) works here; .*"
        assert re.fullmatch(line, str(refused.value))
        first.send_signal(signal.SIGKILL)
        first.wait()
        with sole_user(path, "runs/a"):  # at once: nothing here waits
            assert holder(path) == os.getpid()
    assert not path.exists() and not list(path.parent.iterdir())


def test_a_fork_of_the_one_that_was_killed_holds_nothing(path: Path) -> None:
    """As a writer of a checkpoint did, which outlived its rank."""
    with another(path, "fork") as first:
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        inode = path.stat().st_ino
        first.kill()
        first.wait()
        try:
            with sole_user(path, "runs/a"):
                assert path.stat().st_ino == inode, "the kernel gave it at once: no new file had to take its place"
                assert all(Path(f"/proc/{child}").exists() for child in children) and children
        finally:
            for child in children:
                os.kill(int(child), signal.SIGKILL)


@pytest.mark.usefixtures("quick")
def test_a_holder_elsewhere_that_is_heard_of_is_left_alone(path: Path) -> None:
    write_elsewhere(path)
    ended, said = threading.Event(), []

    def beat() -> None:
        while not ended.wait(0.3):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(Held, match=r"on node7 \(pid 4711, since 2026-11-30T08"), sole_user(path, "a", said.append):
            pass
    finally:
        ended.set()
        heart.join()
    assert len(said) == 1 and "waits for another job on node7" in said[0] and "s at most" in said[0]
    assert holder(path) == 4711


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("silent_s", [0.0, 3600.0])
def test_a_holder_elsewhere_that_is_not_heard_of_is_followed(path: Path, silent_s: float) -> None:
    write_elsewhere(path, silent_s)
    said: list[str] = []
    with sole_user(path, "runs/a", said.append):
        assert holder(path) == os.getpid()
    assert len(said) == (silent_s == 0)  # what was silent for long enough is not waited for


@pytest.mark.usefixtures("quick")
def test_a_lock_that_a_lost_machine_left_with_the_file_server_is_replaced(path: Path) -> None:
    write_elsewhere(path, silent_s=3600)
    with path.open() as left:
        fcntl.flock(left, fcntl.LOCK_EX)
        with sole_user(path, "runs/a"):
            assert holder(path) == os.getpid() and not os.path.samestat(os.fstat(left.fileno()), path.stat())


def test_what_outlived_a_dead_holder_does_not_keep_the_lock(path: Path) -> None:
    with another(path) as first:
        text = path.read_text()
    path.write_text(text)
    with path.open() as left:
        fcntl.flock(left, fcntl.LOCK_EX)
        with sole_user(path, "runs/a"):
            assert holder(path) == os.getpid() != first.pid


def test_where_the_kernel_has_no_locks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    with another(path) as first:
        with pytest.raises(Held, match=f"pid {first.pid},"), sole_user(path, "runs/a"):
            pass
        first.kill()
        first.wait()
        with sole_user(path, "runs/a"):
            assert holder(path) == os.getpid()


def test_a_later_process_with_the_same_pid_is_not_the_holder(path: Path) -> None:
    before = dataclasses.replace(this_process(), start=this_process().start - 1)
    path.write_text(json.dumps({"process": dataclasses.asdict(before), "since": SINCE}))
    with sole_user(path, "runs/a"):
        assert holder(path) == os.getpid()


def test_a_container_on_this_machine_is_told_by_the_kernel(path: Path) -> None:
    """Its pids mean nothing here, its locks do."""
    there = dataclasses.replace(this_process(), pids="pid:[1]", pid=1)
    path.write_text(json.dumps({"process": dataclasses.asdict(there), "since": SINCE}))
    with path.open() as its:
        fcntl.flock(its, fcntl.LOCK_EX)
        with pytest.raises(Held, match=r"pid 1,"), sole_user(path, "runs/a"):
            pass
    with sole_user(path, "runs/a"):
        assert holder(path) == os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_lock_without_a_name(path: Path, text: str) -> None:
    """Left by an earlier version, or by one that was killed while it took the lock; or held by an earlier version."""
    path.write_text(text)
    with path.open() as its:
        fcntl.flock(its, fcntl.LOCK_EX)
        with pytest.raises(Held, match="another job of an earlier version"), sole_user(path, "runs/a"):
            pass
    with sole_user(path, "runs/a"):
        assert holder(path) == os.getpid()


def test_one_that_waits_comes_in_when_the_first_has_left(path: Path) -> None:
    said: list[str] = []
    with another(path) as first:
        threading.Timer(0.5, first.kill).start()
        with sole_user(path, "data", said.append, wait=True):
            assert holder(path) == os.getpid()
    assert len(said) == 1 and f"data: waits for another job on {this_process().host} (pid {first.pid}" in said[0]


def test_one_that_was_taken_for_dead_ends(path: Path) -> None:
    """Stopped for a while, it finds another's name in its lock."""
    with another(path) as first:
        first.send_signal(signal.SIGSTOP)
        draft = path.with_name("new")
        write_elsewhere(draft)
        draft.replace(path)
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=60) == 1
        assert first.stderr and "runs/a: was silent for so long that the job on node7" in first.stderr.read()
    assert holder(path) == 4711


def test_many_at_once_come_in_one_after_the_other(path: Path, tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from megatron_lccp.lock import sole_user
inside = Path(sys.argv[2])
with sole_user(Path(sys.argv[1]), "data", say=lambda text: None, wait=True):
    inside.touch(exist_ok=False)
    time.sleep(0.05)
    inside.unlink()
"""
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "inside")]
    several = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(6)]
    assert [process.communicate(timeout=120)[1] for process in several] == [b""] * 6
    assert not list(tmp_path.iterdir())
