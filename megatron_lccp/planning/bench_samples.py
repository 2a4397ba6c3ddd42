"""Needle samples of drawn token ids, for what is measured of speed or of agreement: they mean nothing.

In: cells or a length, a seed and a vocabulary. Out: samples, the same ones every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_lccp.data.needles import Cell, NeedleSample, compose

NEEDLE_TOK, QUESTION_TOK, NULL_TOK = 25, 20, 12
FIXED_TOK = 2 * NEEDLE_TOK + QUESTION_TOK
"""Tokens of a sample besides its haystack."""


class Drawn(Protocol):
    """What the tokens are drawn from."""

    seed: int
    vocab: int
    """Ids below this one."""


def samples_for(cells: Sequence[Cell], o: Drawn) -> list[NeedleSample]:
    """The cells of one fact in one haystack, in drawn token ids: what the cells hold does not change what they cost."""
    rng = np.random.default_rng(o.seed)
    haystack = rng.integers(1, o.vocab, max(cell.before_tok + cell.after_tok for cell in cells))
    needle, question, null = (rng.integers(1, o.vocab, n).tolist() for n in (NEEDLE_TOK, QUESTION_TOK, NULL_TOK))
    content = [k % 5 == 0 for k in range(NEEDLE_TOK)]
    return [
        compose(
            haystack[: c.before_tok], haystack[c.before_tok : c.before_tok + c.after_tok], needle, content, question,
            null_question=np.array(null), depth_cell=c.depth_cell, family="drawn", kind="drawn", haystack="drawn",
            sample=0, seed=o.seed,
        )
        for c in cells
    ]  # fmt: skip


def sample_of(length_tok: int, o: Drawn) -> NeedleSample:
    """One sample with the needle in the middle."""
    before = (length_tok - FIXED_TOK) // 2
    return samples_for([Cell(before, length_tok - FIXED_TOK - before, 0.5)], o)[0]
