"""A window in pieces: between two of them it may be given up, because a signal asked to stop.

In: whether this rank was asked, and how long a piece may take. Out: how many prefills to run together, the same on all
ranks; or WindowStopped, on all ranks at the same place. One reduction of two numbers a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_lccp.measuring.prefills import Prefill
from megatron_lccp.parallel.gather import largest

SLOWER = 0.8
"""What a piece keeps of the time that a token took before: a slow one counts for some pieces, a hiccup not for ever."""


class WindowStopped(BaseException):
    """A signal asked to stop, and the window is given up. No Exception: nothing but the loop should take it."""


class Pieces:
    """The pieces of one window after another: what it learns of a model's speed it keeps."""

    def __init__(self, asked: Callable[[], bool], longest_s: float, device: torch.device):
        """`asked`: this rank was asked to stop. `longest_s`: seconds that a piece should take at most."""
        self._asked, self._longest_s, self._device = asked, longest_s, device
        self._token_s: float | None = None

    def rest(self, tokens: int = 0, seconds: float = 0.0) -> None:
        """Between two pieces; every rank calls it. Raises WindowStopped on all ranks if one was asked to stop.

        The piece before ran this many `tokens`, the same on all ranks, in so many `seconds` of this rank.
        """
        asked, slowest_s = largest([float(self._asked()), seconds], self._device)
        if tokens:
            self._token_s = max(SLOWER * (self._token_s or 0.0), slowest_s / tokens)
        if asked:
            raise WindowStopped

    def next(self, replicas: Sequence[Sequence[Prefill]], start: int, least: int, most: int) -> int:
        """How many prefills of each replica, from number `start` on, make the next piece: a multiple of `least`, at most
        `most`. `least` before anything is known of the model's speed."""
        if self._token_s is None:
            return least
        count = least
        while count + least <= most and self._seconds(replicas, start, count + least) <= self._longest_s:
            count += least
        return count

    def _seconds(self, replicas: Sequence[Sequence[Prefill]], start: int, count: int) -> float:
        assert self._token_s is not None
        return self._token_s * tokens_in(replicas, start, count)


def tokens_in(replicas: Sequence[Sequence[Prefill]], start: int, count: int) -> int:
    """Tokens that the replica with most of them runs in a piece."""
    return max(sum(map(len, prefills[start : start + count])) for prefills in replicas)
