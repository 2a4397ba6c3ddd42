"""Processes: which one this is, whether another still lives, and ends that follow the end of another.

In: process ids, and what torchrun leaves in the environment. Out: an identity that no later process shares; signals.
Linux says all of it in /proc. Elsewhere identities are less sure, and nothing ends by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

LAUNCHER = "LCCP_LAUNCHER"
"""Variable in which tools/torchrun.py tells the ranks who it is: pid and start."""
GRACE_S = 60.0
"""How long a rank without a launcher may take to save and leave, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT gives more."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Process:
    """A process, as told apart from every other one on any machine, the next one with its pid included."""

    host: str
    pid: int
    start: int
    """Clock ticks from the start of its kernel to its own; 0: not known."""
    kernel: str
    """The kernel that runs it, from one boot to the next."""
    pids: str
    """The namespace in which `pid` counts: a container has its own."""

    @property
    def name(self) -> str:
        """Short, for names of files."""
        place = hashlib.sha256(f"{self.kernel} {self.pids}".encode()).hexdigest()[:8]
        return f"{place}-{self.pid}-{self.start}"

    def lives(self) -> bool | None:
        """Whether it still runs; None where that cannot be seen from here, on another machine or in a container."""
        here = this_process()
        if (self.kernel, self.pids) != (here.kernel, here.pids):
            return None
        return is_running(self.pid, self.start)


@functools.cache
def _place() -> tuple[str, str, str]:
    host = socket.gethostname()
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return host, kernel, os.readlink("/proc/self/ns/pid")
    except OSError:
        return host, host, ""


def this_process() -> Process:
    """The process that asks; a fork of it is another one."""
    host, kernel, pids = _place()
    return Process(host, os.getpid(), _start(os.getpid()) or 0, kernel, pids)


def _start(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks; None if there is none, or none but what its parent has
    not yet taken note of."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if state in (b"Z", b"X") else int(fields[18])  # field 22 of proc(5)


def is_running(pid: int, start: int) -> bool:
    """Whether the process of this machine that had `pid` since `start` (0: not known) still runs."""
    if Path("/proc/self/stat").exists():
        found = _start(pid)
        return found is not None and start in (0, found)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that started it ends."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


@functools.cache
def forks_end_with_this() -> None:
    """From now on, what this process forks off in its main thread is killed when this process ends, however it does:
    a writer of a save, say, which else would wait for ever for one that is gone."""
    parent: list[int] = []

    def before() -> None:
        parent[:] = [os.getpid()] if threading.current_thread() is threading.main_thread() else []

    def in_child() -> None:
        if parent:
            end_with_parent()
            if os.getppid() != parent[0]:  # it ended before the kernel was told
                os._exit(128 + signal.SIGKILL)

    os.register_at_fork(before=before, after_in_child=in_child)


def name_launcher() -> None:
    """Tell what this process starts that it is its launcher."""
    here = this_process()
    os.environ[LAUNCHER] = f"{here.pid}:{here.start}"


def leave_with_launcher() -> None:
    """A rank of torchrun gets SIGTERM when its launcher is gone, as it does when the launcher is told to stop, and is
    ended if it has not left some time later, as the launcher would have done. Anything else is left as it is."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    pid, _, start = os.environ.get(LAUNCHER, "").partition(":")
    launcher = (int(pid), int(start)) if pid.isdigit() and start.isdigit() else (os.getppid(), 0)
    end_with_parent(signal.SIGTERM)
    grace_s = max(GRACE_S, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 0)))
    threading.Thread(target=_follow, args=(*launcher, grace_s), name="lccp-launcher", daemon=True).start()


def _follow(launcher: int, start: int, grace_s: float) -> None:
    start = start or _start(launcher) or 0
    while is_running(launcher, start):
        time.sleep(1.0)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"lccp: the launcher (pid {launcher}) is gone; its ranks stop", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)  # where a process stands between the two, the kernel has sent none
    time.sleep(grace_s)
    print(
        f"lccp: rank {os.environ.get('RANK', '0')}: has not stopped {grace_s:.0f} s after its launcher; ended",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(128 + signal.SIGTERM)
