"""Which run a run branches from, as `lccp branch` recorded it.

In: a Run with its events. Out: a Branched, or None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_lccp.analysis.run import Run

_RECORDED = re.compile(r"from (?P<parent>.*) at step (?P<step>\d+), (?P<tokens>\d+) tokens")


@dataclass(frozen=True)
class Branched:
    """Where a branch begins; up to there it holds what its run recorded."""

    parent: str
    """Name of the run."""
    step: int
    tokens: int
    """Training tokens, all stages."""


def branches_of(run: Run) -> list[Branched]:
    """The last branching and those before it: a branch of a branch has two."""
    texts = run.events.loc[run.events["kind"] == "branch", "text"].astype(str)
    found = [match for text in reversed(texts.tolist()) if (match := _RECORDED.fullmatch(text))]
    return [Branched(match["parent"], int(match["step"]), int(match["tokens"])) for match in found]


def branch_of(run: Run) -> Branched | None:
    """The last branching."""
    return next(iter(branches_of(run)), None)
