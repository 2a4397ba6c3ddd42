"""Progress of reading and writing weights, a line at most once a second.

In: bytes done and in all. Out: lines on stderr, also without a terminal.
"""

from __future__ import annotations

import sys
import time

from megatron_lccp.planning.plan_table import unit_of


class Printed:
    """Progress on stderr, at most once a second."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < self._done:  # files are checked, then read
            self._start = now
        self._done = done
        if now - self._last < 1 and done < total:
            return
        self._last = now
        (unit, unit_bytes), rate = unit_of(total), done / max(now - self._start, 1e-9)
        print(
            f"{done / unit_bytes:.2f} of {total / unit_bytes:.2f} {unit}, {rate / unit_bytes:.2f} {unit}/s",
            file=sys.stderr,
        )
