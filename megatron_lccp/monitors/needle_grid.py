"""Needle in a haystack as a number that does not saturate: the perplexity of the answer over a grid of cells.

In: an open window. Out: rows per sample. Paper: section 5, Figures 2, 3 and 7 (length x depth), 8 and 9 (before x
after).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_lccp.measuring import (
    ByDepth,
    EvalWindow,
    NeedleMonitor,
    Row,
    Scored,
    head_rows,
    needle_metrics,
    needle_rows,
    run_samples,
)


@dataclass(frozen=True)
class _Grid(Scored, NeedleMonitor):
    """What both grids do; each adds the axes of its cells."""

    renamed = {"heads": "scores"}

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows of `needle_rows` per sample, and head scores if asked for."""
        measured = run_samples(window, self, self.asked())
        yield from needle_rows(window, self, measured)
        yield from head_rows(window, self, measured, self.asked())


@dataclass(frozen=True)
class NeedleGrid(ByDepth, _Grid):
    """How sure the model is of a sentence it has read before, by length of the text and depth of the sentence.

    `answer_nll` and `exact` of the whole sentence, `content_nll` and `content_exact` of its name and value: one row each
    per sample.
    """

    metrics = needle_metrics("length_tok", "depth_cell")
    lengths_tok: tuple[int, ...] = (1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class InterferenceGrid(_Grid):
    """How much the text before the sentence disturbs: the distance to it is fixed, what stands before it grows.

    As NeedleGrid, with before_tok (interference) and after_tok (distance) as coordinates.
    """

    metrics = needle_metrics("after_tok", "before_tok")
    befores_tok: tuple[int, ...] = (0, 1024, 2048)
    """Haystack tokens before the needle."""
    afters_tok: tuple[int, ...] = (0, 1024, 2048)
    """Haystack tokens between needle and question."""
    most_tok: int | None = None
    """Cells with more haystack than this, before and after together, are left out: both axes can then go up to the
    longest context. null: every before with every after."""
