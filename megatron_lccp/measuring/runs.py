"""Run the prefills of a monitor in a window: spread over the replicas, with progress, and resumed from a journal.

In: trees of prefills (measuring/prefills.py). Out: what the model said of every sample in them, on all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_lccp.measuring.engine import PREFILLS_AT_ONCE, Asked
from megatron_lccp.measuring.found import Found
from megatron_lccp.measuring.head_scores import HeadScore
from megatron_lccp.measuring.prefills import Tree, deal, tokens_of
from megatron_lccp.measuring.window import EvalWindow


@dataclass(frozen=True, eq=False)
class Work:
    """What a monitor will run in a window, for a plan."""

    cells: int
    """Cells of its grid, or corpora."""
    samples: int
    """Samples over all cells."""
    alone: Sequence[Tree]
    """A forward for every sample."""
    planned: Sequence[Tree]
    """What it will run."""
    times: int = 1
    """How often."""
    look: bool = False
    """Whether the attention rows of the answers are scored."""
    questions: bool = False
    """Whether those of the questions are, too."""


def run_trees(
    window: EvalWindow, trees: Sequence[Tree], name: str, what: Hashable, look: bool = False, questions: bool = False,
    scores: Sequence[HeadScore] = (),
) -> dict[int, Found]:  # fmt: skip
    """Results by sample number. `what` names these samples and this model in a journal; `name` is for people.

    `look`: say where heads look from the rows of the answers too, `questions`: from those of the questions as well.
    `scores` that see query, key and value are asked at the rows of the answers.
    """
    key = hashlib.sha256(repr((name, what)).encode()).hexdigest()[:16]
    found, groups = window.journal.read(key), window.groups
    asked = Asked(look, questions, tuple(score for score in scores if score.sees_rows))
    left = [tree for tree in trees if not set(_numbers(tree)) <= found.keys()]
    total = sum(map(tokens_of, trees))
    tokens = total - sum(map(tokens_of, left))

    told = tokens

    def done(before: int, here: int) -> None:
        nonlocal told
        new, told = before + here - told, before + here
        window.say(f"{name} {told / total:.0%}, {window.pace.moved(told, total, new)}")

    if not left:
        window.pace.moved(total, total, 0)
    at_once = PREFILLS_AT_ONCE if groups.pp.size() > 1 else 1  # a pipeline wants to be filled
    for batch in window.journal.batches(left, at_once * groups.pp.size() * groups.dp.size()):
        more = window.engine.predict(deal(batch, groups.dp.size()), asked, partial(done, tokens), window.pieces)
        window.journal.write(key, more)
        found |= more
        tokens += sum(map(tokens_of, batch))
    return found


def _numbers(tree: Tree) -> list[int]:
    return [number for prefill in tree for tap in prefill.taps for number in tap.samples]
