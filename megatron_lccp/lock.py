"""One job at a time in a directory or at a file, wherever it runs and however the one before it ended.

In: the path of a lock. Out: a `with` block in which no other process has it, or one line that says who does.

Three things stand for a holder. The kernel's lock on the file (flock), which ends with the process: forks close their
copy. The identity in the file, which on the same machine says at once whether the holder lives. And a heartbeat, the
time of the file's last change, for those who can see neither: on another machine, on a file system without such locks.
It is told by the clock of the file system, so clocks of machines may differ. A holder that finds another's name in its
lock was taken for dead (it was stopped, say), and ends at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_lccp.processes import Process, this_process

HEARTBEAT_S = 10.0
"""Seconds between two signs of life."""
MISSED = 30
"""So many of them missing, and a holder that nobody here can see counts as dead: after 300 s, as Slurm takes a node for
lost by default (SlurmdTimeout). A long call into C++ may keep a living one silent for part of that."""
_UNNAMED_S = 2.0
"""How long a lock may be taken without a name of the living in it."""
_held: set[int] = set()
"""Descriptors of this process's locks."""


class Held(ValueError):
    """Another process has the lock; one line that says which, where and since when."""


@dataclass(frozen=True)
class Holder:
    """What a lock says of who has it."""

    process: Process
    since: str
    """UTC, ISO 8601."""

    def __str__(self) -> str:
        return f"on {self.process.host} (pid {self.process.pid}, since {self.since})"


@dataclass(frozen=True)
class _Seen:
    """A lock at one look."""

    locked: bool | None
    """True: the kernel gave it to us, False: another has it; None: this file system has no such locks."""
    holder: Holder | None
    """None: no name in it, for it is new, was given back, or is being taken; or it is of an earlier version."""
    changed_ns: int


@contextlib.contextmanager
def sole_user(path: Path, what: str, say: Callable[[str], object] | None = None, wait: bool = False) -> Iterator[None]:
    """Hold the lock at `path`, in a directory that exists, for this process.

    `what` is what the lock is about, as a line begins ("runs/a"). If another process holds it, raises Held, or waits
    where `wait`; `say` gets a line when there is something to wait for. A holder on another machine is waited for until
    it is heard of, or has been silent for HEARTBEAT_S x MISSED: then it is followed. Raises OSError where the lock
    cannot be written.
    """
    descriptor = _acquire(path, what, say or _to_stderr, wait)
    mine, given_back = _read(descriptor), threading.Event()
    beat = threading.Thread(target=_beat, args=(path, what, descriptor, mine, given_back), daemon=True)
    beat.start()
    try:
        yield
    finally:
        given_back.set()
        beat.join()
        with contextlib.suppress(OSError):
            if _is_at(descriptor, path) and _read(descriptor) == mine:
                path.unlink()
        _close(descriptor)


def _acquire(path: Path, what: str, say: Callable[[str], object], wait: bool) -> int:
    first, since, said = None, 0.0, False  # what this holder looked like at first, and when that was
    while True:
        descriptor, seen = _look(path)
        if first is None or (seen.holder, seen.locked) != (first.holder, first.locked):
            first, since = seen, time.monotonic()
            silent_s = _silent_s(path, seen)
        silence_s = silent_s + time.monotonic() - since
        state = _state(seen, first, silence_s, time.monotonic() - since)
        if state == "free":
            descriptor, contested = _take(path, descriptor, seen)
            if not contested:
                return descriptor
            time.sleep(1.0)  # another process may have come to the same end, and written its name after this one
            if _is_at(descriptor, path) and (found := _read(descriptor)) and found.process == this_process():
                return descriptor
            _close(descriptor)
            continue
        _close(descriptor)
        if state == "held" and not wait:
            raise Held(
                f"{what}: another job {seen.holder or 'of an earlier version'} works here; wait for it, or stop it"
            )
        if not said and (state == "held" or seen.holder):
            most = "" if state == "held" else f", {HEARTBEAT_S * MISSED - silence_s:.0f} s at most"
            said = True
            say(f"lccp: {what}: waits for another job {seen.holder or 'of an earlier version'}{most}")
        time.sleep(0.1 if seen.holder is None else 1.0)


def _state(seen: _Seen, first: _Seen, silence_s: float, looked_s: float) -> str:
    """`free`, `held`, or `unclear`, which time will decide."""
    here = this_process()
    lives = seen.holder.process.lives() if seen.holder else False
    if lives:
        return "held"
    if lives is False:  # nobody, or one that is dead
        if seen.locked is not False:
            return "free"
        if looked_s < _UNNAMED_S:
            return "unclear"
        return "free" if seen.holder else "held"  # what has it outlived the holder, and is no job
    assert seen.holder
    if (
        seen.holder.process.kernel == here.kernel and seen.locked is not None
    ):  # in another container: one kernel's locks
        return "free" if seen.locked else "held"
    if seen.changed_ns != first.changed_ns:
        return "held"
    return "free" if silence_s >= HEARTBEAT_S * MISSED else "unclear"


def _look(path: Path) -> tuple[int, _Seen]:
    """Open the lock, and take the kernel's if it is to be had: the descriptor, and what is seen."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _close_in_forks()
        _held.add(descriptor)
        locked = _flock(descriptor)
        if _is_at(descriptor, path):
            return descriptor, _Seen(locked, _read(descriptor), os.fstat(descriptor).st_mtime_ns)
        _close(descriptor)  # it was given back, or replaced, between opening and locking


def _flock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # Lustre without `-o flock`, some network file systems
        return None
    return True


def _read(descriptor: int) -> Holder | None:
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return Holder(Process(**found["process"]), found["since"])
    except (OSError, ValueError, KeyError, TypeError):  # TypeError: json may also be a list, a number
        return None


def _take(path: Path, descriptor: int, seen: _Seen) -> tuple[int, bool]:
    """Write this process's name: the descriptor of the lock, and whether another one may do the same just now.

    Where the kernel's lock stays with one that is gone, a new file takes the place of the old one.
    """
    holder = Holder(this_process(), datetime.now(timezone.utc).isoformat(timespec="seconds"))
    text = json.dumps(dataclasses.asdict(holder)).encode() + b"\n"
    if seen.locked is not False:
        _write(descriptor, text, path)
        return descriptor, seen.locked is None
    _close(descriptor)
    draft = path.with_name(f"{path.name}.{holder.process.name}.tmp")
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    _held.add(descriptor)
    _flock(descriptor)
    _write(descriptor, text, draft)
    os.replace(draft, path)
    return descriptor, True


def _write(descriptor: int, text: bytes, path: Path) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
        os.fsync(descriptor)
    except OSError as error:  # a full disk, say
        path.unlink(missing_ok=True)
        _close(descriptor)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _silent_s(path: Path, seen: _Seen) -> float:
    """Seconds since the lock was last changed, by the clock that told that time: the file system's."""
    probe = path.with_name(f"{path.name}.{this_process().name}.tmp")
    try:
        probe.touch()
        now_ns = probe.stat().st_mtime_ns
        probe.unlink()
    except OSError:
        return 0.0
    return max(0.0, (now_ns - seen.changed_ns) / 1e9)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


@functools.cache
def _close_in_forks() -> None:
    """A fork has copies of this process's descriptors, and would hold its locks for as long as it lives."""

    def in_child() -> None:
        for descriptor in _held:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        _held.clear()

    os.register_at_fork(after_in_child=in_child)


def _beat(path: Path, what: str, descriptor: int, mine: Holder | None, given_back: threading.Event) -> None:
    """Say now and then that the holder lives; end the process if another one has taken its place."""
    pause_s = 1.0  # at first: two jobs on two machines, each with locks of its own, may have come at once
    while not given_back.wait(pause_s):
        pause_s = HEARTBEAT_S
        with contextlib.suppress(OSError):  # a disk that is full or away: no reason to stop
            os.utime(descriptor)
        try:
            now = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # removed with its directory, which whoever writes there will say
        other = _read(now)
        os.close(now)
        if other not in (None, mine) and not given_back.is_set():
            text = f"lccp: {what}: was silent for so long that the job {other} took its place; this one ends\n"
            os.write(sys.stderr.fileno(), text.encode())
            os._exit(1)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
