"""The watch: says which rank has not arrived when nothing moves, and lets a signal end a job that waits in vain.

In: marks of the main thread, one whenever it has come further; the signals of this process. Out: a line (and an event)
once nothing has moved for `training.stall_steps` times the usual step and `training.stall_s` seconds.

A thread on each rank sends a datagram to rank 0 every few seconds: how far its main thread is, since when, and in which
line of which file it is. It does so whatever the main thread waits for: another rank, a disk, a network file system. So
a process that was stopped or lost is silent, one that is slow is behind or not in a collective, and rank 0 can tell.
Rank 0 answers, so the others know when it is the one that is silent. Nothing here is a collective but the start.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import select
import socket
import statistics
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lccp.config.tree import TrainingConfig
from megatron_lccp.training.signals import StopSignals

PACKAGE = Path(__file__).parents[1]
LIBRARIES = (sysconfig.get_paths()["stdlib"], "site-packages", "dist-packages", "<frozen")
WAITING = ("torch/distributed", "megatron/core/pipeline_parallel", "megatron/core/distributed", "tensor_parallel")
"""Where a main thread is that waits for others."""
BEATS_S = 5.0
"""Seconds between two datagrams, at most."""
NAMED = 4
"""Ranks that a line names; of the others it says how many."""


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself."""

    rank: int
    count: int
    """Marks passed: all ranks pass the same ones."""
    mark: str
    """The last of them."""
    at: str
    """File, line and function that the main thread is in."""
    waits: bool
    """Whether that is a collective of torch's or Megatron-Core's."""
    signal_s: float
    """Seconds since a signal asked to stop; 0: none did."""
    host: str
    pid: int

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


class Watch:
    """Open it once the ranks are connected: every rank does. A watch that was not opened takes marks and says nothing.

    `tell(kind, text)` is called from a thread: on rank 0, or on the first rank of a node if rank 0 is the silent one.
    """

    def __init__(
        self, settings: TrainingConfig, signals: StopSignals | None = None,
        tell: Callable[[str, str], None] = lambda kind, text: None,
    ):  # fmt: skip
        self._settings, self._signals, self._tell = settings, signals, tell
        self._count, self._mark, self._moved_s = 0, "the start", time.monotonic()
        self._steps_s: deque[float] = deque(maxlen=20)
        self._signal, self._signal_s = 0, 0.0
        self._late_said = self._stopping = False
        self._told, self._quiet_since_s = 0, 0.0
        self._heard: dict[int, tuple[float, Beat]] = {}
        self._missing: list[str] = []  # as rank 0 last said
        self.saved_step = 0
        """Of the newest checkpoint."""
        self._thread: threading.Thread | None = None

    def mark(self, what: str) -> None:
        """The main thread has come further, and now does `what`. All ranks pass the same marks."""
        self._count, self._mark, self._moved_s = self._count + 1, what, time.monotonic()

    def step_took(self, seconds: float) -> None:
        """How long a step took, or what else comes again and again."""
        self._steps_s.append(seconds)

    def stopping(self) -> None:
        """The save that a signal asked for begins."""
        self._stopping = True

    def __enter__(self) -> Watch:
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._beat_s = min(BEATS_S, self._settings.stall_s / 6)
        self._main, self._host = threading.get_ident(), socket.gethostname()
        self._key, self._rank_0_s = "", math.inf  # not heard yet
        self._ended, self._end = os.pipe()
        self._socket = self._connected() if self._ranks > 1 else None
        self._thread = threading.Thread(target=self._run, name="lccp watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._thread is not None
        os.write(self._end, b".")
        self._thread.join(5.0)
        self._send({"leaves": self._rank})  # it will be silent, and that is right
        for end in (self._ended, self._end):
            os.close(end)
        if self._socket is not None:
            self._socket.close()

    def _connected(self) -> socket.socket | None:
        """A socket between this rank and rank 0, whose address the collective hands on; None if there can be none."""
        end: socket.socket | None = None
        what: list[Any] = [None]
        try:
            family, _, _, _, to = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
            end = socket.socket(family, socket.SOCK_DGRAM)
            end.setblocking(False)
            if self._rank == 0:
                end.bind(("", 0))
                what = [(end.getsockname()[1], secrets.token_hex(8))]
        except OSError:
            pass  # then nobody is called silent
        dist.broadcast_object_list(what)
        if end is not None and what[0] is not None:
            port, self._key = what[0]
            self._to = (to[0], port, *to[2:])
            return end
        return None

    def _run(self) -> None:
        read: list[Any] = [self._ended]
        read += [] if self._signals is None else [self._signals.wakes]
        read += [] if self._socket is None else [self._socket]
        next_s = time.monotonic()
        while True:
            wait_s = max(0.0, next_s - time.monotonic())
            ready, _, _ = select.select(read, [], [], wait_s)
            if self._ended in ready:
                return
            if self._signals is not None and self._signals.wakes in ready:
                self._take_signal(os.read(self._signals.wakes, 64))
            if self._socket is not None and self._socket in ready:
                self._take_datagrams()
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + self._beat_s
                self._send(dataclasses.asdict(self._beat()))
                self._look()

    def _take_signal(self, numbers: bytes) -> None:
        assert self._signals is not None
        if not self._signal and (number := self._signals.heard(numbers)):
            self._signal, self._signal_s = number, time.monotonic()

    def _take_datagrams(self) -> None:
        assert self._socket is not None
        while True:
            try:
                data, sender = self._socket.recvfrom(4096)
                said = json.loads(data)
                if said.pop("key", None) != self._key:  # a stranger's
                    continue
                if self._rank == 0 and "leaves" in said:
                    self._heard.pop(said["leaves"], None)
                elif self._rank == 0:
                    beat = Beat(**said)
                    self._heard[beat.rank] = time.monotonic(), beat
                    self._send({"missing": [each.name for each in self._silent(self._settings.stall_s)]}, sender)
                else:
                    self._rank_0_s, self._missing = time.monotonic(), said["missing"]
            except BlockingIOError:
                return
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                continue  # torn, or nobody listens at the other end

    def _send(self, what: dict[str, Any], to: Any = None) -> None:
        if self._socket is None or (self._rank == 0 and to is None):
            return
        try:
            self._socket.sendto(json.dumps({**what, "key": self._key}).encode(), to or self._to)
        except OSError:
            pass  # the next one may arrive

    def _beat(self) -> Beat:
        at, waits = _place(sys._current_frames().get(self._main))
        asked_s = time.monotonic() - self._signal_s if self._signal else 0.0
        return Beat(self._rank, self._count, self._mark[:200], at[:200], waits, asked_s, self._host[:64], os.getpid())

    def _silent(self, for_s: float) -> list[Beat]:
        """Ranks that were heard once, and not since."""
        now = time.monotonic()
        return [beat for _, (at_s, beat) in sorted(self._heard.items()) if now - at_s > for_s]

    def _look(self) -> None:
        """Tell what is to be told, and end a process that a signal was to end and that waits in vain."""
        if self._rank == 0:
            self._look_at_all()
        elif self._rank_0_is_silent() and self._speaks:
            self._say_when_due(f"rank 0 does not answer for {time.monotonic() - self._rank_0_s:.0f} s")
        self._leave()

    @property
    def _speaks(self) -> bool:
        """Whether this rank says what is to be said while rank 0 is silent: the first one of each node does."""
        return self._rank == 1 or os.environ.get("LOCAL_RANK") == "0"

    def _rank_0_is_silent(self) -> bool:
        return self._rank > 0 and time.monotonic() - self._rank_0_s > self._settings.stall_s

    def _look_at_all(self) -> None:
        everyone = [self._beat(), *(beat for _, beat in self._heard.values())]
        self._say_when_due(lambda: self._who(everyone))
        asked_s, most_s = max(beat.signal_s for beat in everyone), self._settings.stop_within_s
        if asked_s > most_s and not (self._late_said or self._stopping):
            self._late_said = True
            text = f"the save has not begun {asked_s:.0f} s after the signal (training.stop_within_s: {most_s:g})"
            self._tell("stop_late", f"{text}: {self._mark}; {self._who(everyone)}")

    def _say_when_due(self, who: str | Callable[[], str]) -> None:
        usual_s = statistics.median(self._steps_s) if self._steps_s else 0.0
        quiet_s = time.monotonic() - self._moved_s
        limit_s = max(self._settings.stall_s, self._settings.stall_steps * usual_s)
        if self._told and self._moved_s != self._quiet_since_s:
            waited_s = self._moved_s - self._quiet_since_s
            print(f"lccp: goes on after {waited_s:.0f} s", file=sys.stderr, flush=True)
            self._told = 0
        if quiet_s > limit_s * 2**self._told:
            while quiet_s > limit_s * 2**self._told:
                self._told += 1
            self._quiet_since_s = self._moved_s
            usual = f" (usually {usual_s:.3g} s)" if usual_s else ""
            name = who if isinstance(who, str) else who()
            self._tell("stall", f"{self._mark}: nothing has moved for {quiet_s:.0f} s{usual}; {name}")

    def _who(self, everyone: list[Beat]) -> str:
        if silent := self._silent(self._settings.stall_s / 2):
            return f"{_names(silent)} {'does' if len(silent) == 1 else 'do'} not answer: stopped, or lost with the node"
        furthest = max(beat.count for beat in everyone)
        late = [beat for beat in everyone if beat.count < furthest]
        late = late or [beat for beat in everyone if not beat.waits]
        if late and len(late) < len(everyone):
            has = "has" if len(late) == 1 else "have"
            return f"{_names(late)} {has} not arrived, in {late[0].mark} at {late[0].at}"
        return f"{'all ranks are' if len(everyone) > 1 else 'it is'} at {everyone[0].at}"

    def _leave(self) -> None:
        """A signal asked to stop, but this rank waits for one that does not answer: no handler will run any more."""
        if not self._signal or time.monotonic() - self._signal_s < 2 * self._beat_s:
            return
        names = [beat.name for beat in self._silent(self._settings.stall_s)] if self._rank == 0 else self._missing
        names = ["rank 0"] if self._rank_0_is_silent() else names
        if names and self._moved_s < self._signal_s:
            if self._rank == 0 or ("rank 0" in names and self._speaks):
                text = f"{', '.join(names[:NAMED])} does not answer, so nothing more could be saved"
                resumes = f"the same command resumes after step {self.saved_step}"
                print(f"lccp: {self._mark}: stopped; {text}; {resumes}", file=sys.stderr, flush=True)
            os._exit(128 + self._signal)


def _names(beats: list[Beat]) -> str:
    names, more = ", ".join(beat.name for beat in beats[:NAMED]), len(beats) - NAMED
    return names if more <= 0 else f"{names} and {more} more"


def _place(frame: Any) -> tuple[str, bool]:
    """(file, line and function of ours or of the user's that a thread is in, whether it waits for other ranks there)."""
    if frame is None:
        return "its end", False
    waits = any(part in frame.f_code.co_filename for part in WAITING)
    inner = frame
    while frame is not None:
        name = frame.f_code.co_filename
        if Path(name).is_relative_to(PACKAGE):
            return f"{Path(name).relative_to(PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})", waits
        if not any(part in name for part in LIBRARIES):
            return f"{Path(name).name}:{frame.f_lineno} ({frame.f_code.co_name})", waits
        frame = frame.f_back
    return f"{Path(inner.f_code.co_filename).name}:{inner.f_lineno}", waits
