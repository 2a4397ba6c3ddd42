"""Who has not started yet: says so while the ranks wait for each other, where torch waits half an hour in silence.

In: torchrun's environment. Out: a line after a minute, and again after twice the time, four times, and so on.

A thread on each rank notes in the store of the job that the rank is there. It has a connection of its own, for the main
thread waits inside torch. Rank 0 reads the notes. A rank that reaches no store says that rank 0 is the one that lacks.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import torch.distributed as dist

WAIT_S = 60.0
"""So long it is silent."""
TRY_S = 1.0
"""Between two looks."""
NAMED = 8
"""Ranks that a line names; of the others it says how many."""


@contextlib.contextmanager
def naming_who_lacks(wait_s: float = WAIT_S) -> Iterator[None]:
    """While open, a line on standard error names the ranks that have not started; nothing where a rank runs alone."""
    if int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    joined = threading.Event()
    thread = threading.Thread(target=_watch, args=(joined, wait_s), name="lccp arrivals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        joined.set()
        thread.join(5.0)


def _watch(joined: threading.Event, wait_s: float) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    began, due_s, store = time.monotonic(), wait_s, None
    while not joined.wait(TRY_S):
        try:
            store = store or _store(rank)
            waited_s = time.monotonic() - began
            if waited_s > due_s and rank == 0:
                _say([each for each in range(ranks) if not store.check([_key(each)])], ranks, waited_s)
        except (OSError, RuntimeError, ValueError):  # nobody listens there (yet), or no more
            waited_s = time.monotonic() - began
            if waited_s > due_s and rank > 0:
                _say([0], ranks, waited_s)
            store = None
        if waited_s > due_s:
            due_s *= 2


def _store(rank: int) -> dist.Store:
    """A connection to the store of this job, in which this rank is noted. Raises OSError if nobody listens there."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    socket.create_connection((host, port), 5.0).close()  # torch would try long, and print traces
    brief = datetime.timedelta(seconds=5)
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=brief)
    store.set(_key(rank), "1")
    return store


def _key(rank: int) -> str:
    """torchrun starts the ranks again over the same store."""
    return f"lccp/started/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _say(missing: Sequence[int], ranks: int, waited_s: float) -> None:
    if not missing:
        text = f"all {ranks} ranks have started, and do not all connect to each other"
    else:
        names, more = ", ".join(map(str, missing[:NAMED])), len(missing) - NAMED
        names += f" and {more} more" if more > 0 else ""
        some, them = (f"rank {names} has", "it") if len(missing) == 1 else (f"ranks {names} have", "them")
        text = f"{some} not come; start {them}, or unset WORLD_SIZE and RANK to run alone"
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    print(f"lccp: {waited_s:.0f} s at {where}, where {ranks} ranks meet: {text}", file=sys.stderr, flush=True)
