"""How far a window is, and how long the rest of it will take.

In: what the monitors of a window say that they will run, and tokens as they are done. Out: counts and the time left, as
text. A token of one monitor counts like one of another: the time left is a guess that gets better as the work goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from megatron_lccp.text import duration_text


class Pace:
    """The work of one window, monitor after monitor; what it learns of a model's speed counts for this window alone."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.plan([])

    def plan(self, tokens: Sequence[int]) -> None:
        """A window begins whose monitors will run about so many `tokens` each; 0 for one that does not say."""
        self._tokens = list(tokens)
        self._number, self._before = -1, 0
        self._run = 0
        self._start = self._clock()

    def next(self) -> None:
        """The next monitor begins."""
        self._number, self._before = self._number + 1, 0

    def moved(self, done: int, total: int, new: int) -> str:
        """Of a run of some samples: `done` of its `total` tokens are, `new` ones since the last call, for some may have
        been kept from an earlier measurement. Returns the line's end."""
        self._run += new
        here = max(total, self._expected() - self._before) - done
        if done == total:  # a monitor may run its samples several times
            self._before += total
        rest = here + sum(self._tokens[self._number + 1 :])
        seconds = rest * (self._clock() - self._start) / max(self._run, 1)
        left = f", {duration_text(seconds)} left" if self._run and rest else ""
        number = f" of monitor {self._number + 1} of {len(self._tokens)}" if len(self._tokens) > 1 else ""
        return f"{done:,} of {total:,} tokens{number}{left}"

    def _expected(self) -> int:
        return self._tokens[self._number] if 0 <= self._number < len(self._tokens) else 0
