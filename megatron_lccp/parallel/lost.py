"""What a rank meets when others are gone: whether an error is that, in one line.

In: an exception. Out: a line, or None. No torch: the command line asks about any error.
"""

from __future__ import annotations

import re

_CLOSED = re.compile(
    r"connection (was )?(closed|reset|aborted)|broken pipe|recvvalue failed|failed to recv|remote process exited|"
    r"socket (is )?closed|pair closure",
    re.IGNORECASE,
)
_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
_TRANSPORT = re.compile(r"gloo|nccl|c10d|tcpstore|torch\.distributed", re.IGNORECASE)


def ended_before(error: BaseException) -> bool:
    """Whether a connection was there and is closed: the rank at its other end has ended."""
    return isinstance(error, RuntimeError) and _CLOSED.search(str(error)) is not None


def lost_ranks(error: BaseException) -> str | None:
    """Why this rank can reach the others no longer, if that is what an error of torch's says; else None."""
    if not isinstance(error, RuntimeError):
        return None
    text, kind = str(error), type(error).__name__
    if not (kind.startswith("Dist") or _TRANSPORT.search(text)):
        return None
    first = text.strip().partition("\n")[0][:200]
    if ended_before(error):
        return f"another rank ended ({first}); its own line says why"
    if _TIMED_OUT.search(text):
        return f"another rank did not come ({first})"
    return None
