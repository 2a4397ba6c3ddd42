"""Signals that ask a training to stop.

In: SIGINT, SIGTERM and SIGHUP of this process. Out: whether one came, which and when; the training asks between two
pieces of its work, so that all ranks stop at the same place.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any


class Interrupted(Exception):
    """A signal asked to stop; everything is saved."""

    def __init__(self, text: str, exit_code: int = 128 + signal.SIGTERM):
        super().__init__(text)
        self.exit_code = exit_code
        """128 + the signal's number, as a shell has it."""


class StopSignals:
    """While open, SIGINT, SIGTERM and SIGHUP (a terminal that is gone) ask for a stop; a second SIGINT stops at once.
    Under nohup a SIGHUP stays ignored.

    A second SIGTERM does not: torchrun follows the terminal's Ctrl-C with a SIGTERM of its own.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of the first signal that came; 0: none."""
        self._at_s = 0.0
        self._old: dict[int, Any] = {}

    @property
    def open(self) -> bool:
        """Whether signals are heard here now."""
        return bool(self._old)

    def __enter__(self) -> StopSignals:
        heard = [signal.SIGINT, signal.SIGTERM]
        heard += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        # A byte for every signal, written at once: also while the main thread waits for other ranks in C++, where no
        # handler of Python's runs. The watch (training/watch.py) reads it.
        self.wakes, self._written = os.pipe()
        for end in (self.wakes, self._written):
            os.set_blocking(end, False)
        os.register_at_fork(after_in_child=self._forget)
        self._old_wakeup = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
        self._old = {int(number): signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        # After one, torchrun's echo of it may still come while the process ends, and is to find this handler.
        for number, handler in self._old.items() if not self.number else ():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._written)
        os.close(self.wakes)
        self._old = {}

    def _forget(self) -> None:
        """A child's signals, say those of a writer of checkpoints, are not this process's."""
        if self._old:
            signal.set_wakeup_fd(-1)

    def asked(self) -> bool:
        """Whether this rank was asked to stop."""
        return self.number > 0

    def heard(self, numbers: bytes) -> int:
        """The first of these signals that asks for a stop, also if its handler has not run yet; 0: none does."""
        return next((number for number in numbers if number in self._old), 0)

    @property
    def since_s(self) -> float:
        """Seconds since the signal; 0 without one."""
        return time.monotonic() - self._at_s if self.number else 0.0

    def _hear(self, number: int, frame: object) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._at_s = number, time.monotonic()
