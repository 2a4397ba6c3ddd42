"""What measuring has in common, whatever engine runs the model: one window, its record, and how it is stopped.

In: a window and monitors. Out: rows in a run directory, and measured.json, which says of which weights they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lccp.files import error_text, require_format, write_whole
from megatron_lccp.measuring.pieces import Pieces
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.parallel.gather import first_text
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import PUBLISHED, Monitor
from megatron_lccp.training.progress import Progress

FORMAT = 1
"""Version of measured.json's format that is written, and the newest that is read."""


PIECE_S = 5.0
"""Seconds between two words of progress, as far as prefills allow."""


class _Stopped(KeyboardInterrupt):
    """A signal asked to stop. No ordinary exception: a monitor's failure is recorded, and the next one runs."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def stoppable(directory: Path, work: Callable[[], int]) -> int:
    """The exit code of `work`, or of the signal that stopped it: then a line says that `directory` keeps what it found."""
    try:
        with _stopped_by_signals():
            return work()
    except _Stopped as stop:
        # Where it struck, an object may be half made, and its finalizer would complain after our line.
        sys.unraisablehook = lambda unraisable: None
        if os.environ.get("RANK", "0") == "0":
            kept = f"what was measured is kept in {directory}, and the same command goes on from there"
            print(f"lccp: stopped; {kept}", file=sys.stderr, flush=True)
        return 128 + stop.number


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM stop at once, for what is finished is on disk. A SIGTERM that follows, until the process ends,
    is torchrun's echo of the terminal's Ctrl-C."""
    asked: list[int] = []

    def stop(number: int, frame: object) -> None:
        if not asked or number == signal.SIGINT:
            asked.append(number)
            raise _Stopped(number)

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items() if not asked else ():
            signal.signal(number, handler)


@dataclass
class Record:
    """What `--out` holds: `measured.json` says which weights its windows are of."""

    store: RunStore
    config_hash: str
    done: dict[str, str]
    """Step -> identity of the weights, for windows that are complete."""

    def before(self) -> tuple[dict[str, str], str] | None:
        """(done, hash of the configuration) that the directory holds; None if nothing was measured into it.

        Raises ValueError for the directory of a training, and for a file that cannot be read.
        """
        path = self.store.dir / "measured.json"
        try:
            found = json.loads(path.read_text())
            version = found.get("format")
        except FileNotFoundError as error:
            if self.store.exists():
                raise ValueError(f"--out: {self.store.dir} is a training's run directory; name another") from error
            return None
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: cannot be read: {error}; name another --out") from error
        require_format(path, version, FORMAT)
        try:
            return dict(found["done"]), found["config_hash"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {error}; name another --out") from error

    def save(self) -> None:
        """Write it, whole or not at all. Raises OSError."""
        text = json.dumps({"format": FORMAT, "config_hash": self.config_hash, "done": self.done}, indent=1)
        write_whole(self.store.dir / "measured.json", lambda draft: draft.write_text(text))


def measure_one(
    window: EvalWindow, monitors: Sequence[Monitor], record: Record, identity: str, progress: Progress
) -> list[str]:
    """Measure and write; what failed, in one line each. A window in which a monitor failed is measured again."""
    events: list[tuple[str, str]] = []
    with window.opened():
        rows = window.measure(monitors, lambda kind, text: events.append((kind, text)))
    where = window.run if window.stage == PUBLISHED else f"step {window.step}"
    failures = [f"{where}: {text}" for kind, text in events if kind == "monitor_error"]
    problem = None
    if window.groups.is_main:
        try:
            for kind, text in events:
                progress.say(f"{where}: {text}")
                record.store.append_event(kind, text, step=window.step)
            if rows:
                record.store.write_window(rows, window.step)
            if not failures:
                record.done[str(window.step)] = identity
                record.save()
                window.journal.discard()
        except OSError as error:
            problem = error_text(error)
    if problem := first_text(problem):
        raise OSError(problem)
    return failures


def small_pieces(device: torch.device) -> Pieces:
    """Few prefills at a time, so that progress is told often; no signal waits for their end."""
    return Pieces(lambda: False, PIECE_S, device)


def alarm(kind: str, text: str) -> None:
    print(f"lccp: {kind}: {text}", file=sys.stderr, flush=True)
