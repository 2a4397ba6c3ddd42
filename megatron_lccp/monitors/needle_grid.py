"""Needle in a haystack as a number that does not saturate: the perplexity of the answer over a grid of cells.

In: an open window. Out: rows per sample. Paper: section 5, Figures 2, 3 and 7 (length x depth), 8 and 9 (before x
after).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from megatron_lccp.measuring.head_scores import HEAD_METRICS, HeadMetric
from megatron_lccp.measuring.needles import check_wanted, head_rows, needle_metrics, needle_rows, run_samples, work_of
from megatron_lccp.measuring.runs import Work
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.schema import Every, Monitor, Row


@dataclass(frozen=True)
class _Grid(Monitor):
    """What both grids have and do; each adds the axes of its cells."""

    every: Every = Every(steps=100)
    """When it is due; besides, at the start of a stage and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on, or stop the run."""
    _: KW_ONLY  # so that the axes of a grid come here, between these fields, in its --help
    samples: int = 4
    """Samples per cell; each has a haystack and a needle of its own, the same ones in every cell."""
    families: tuple[str, ...] = ("biography",)
    """Families of needles (megatron_lccp/data/needles.py)."""
    haystacks: tuple[str, ...] = ()
    """Sources whose held-out documents make the haystacks, or bundled/...; samples take them in turn."""
    seed: int = 0
    """Seed of the sample set."""
    heads: tuple[HeadMetric, ...] = ()
    """Scores of every head to take from the same forwards (see RetrievalHeads); many rows."""
    share: bool = True
    """One prefill for many cells where the model allows it; false: a forward for every sample."""
    prefill_tok: int | None = None
    """Tokens of such a prefill; null: those of the longest sample. Fewer take less memory, and give the same results:
    a long sample goes through in several prefills, and keys and values of what later tokens see are kept."""

    def __post_init__(self) -> None:
        check_wanted(self)

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows `answer_nll` and `exact` per sample, and head scores if asked for."""
        measured = run_samples(window, self, self.heads)
        yield from needle_rows(window, self, measured)
        yield from head_rows(window, self, measured, self.heads)

    def work(self, window: EvalWindow) -> Work:
        """What `measure` runs, for a plan."""
        return work_of(window, self, self.heads)


@dataclass(frozen=True)
class NeedleGrid(_Grid):
    """How sure the model is of a sentence it has read before, by length of the text and depth of the sentence.

    `answer_nll` and `exact`, one row each per sample.
    """

    metrics = (*needle_metrics("length_tok", "depth_cell"), *HEAD_METRICS)
    lengths_tok: tuple[int, ...] = (1024, 2048, 4096)
    """Total tokens of a sample, answer included."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle stands: share of the haystack before it."""
    lattice_tok: int | None = None
    """Tokens before the needle are rounded to a multiple of this, so that cells share prefills; the real depth is
    recorded. A sixteenth of the longest length makes a usual grid ten times cheaper. null: exact depths."""


@dataclass(frozen=True)
class InterferenceGrid(_Grid):
    """How much the text before the sentence disturbs: the distance to it is fixed, what stands before it grows.

    As NeedleGrid, with before_tok (interference) and after_tok (distance) as coordinates.
    """

    metrics = (*needle_metrics("after_tok", "before_tok"), *HEAD_METRICS)
    befores_tok: tuple[int, ...] = (0, 1024, 2048)
    """Haystack tokens before the needle."""
    afters_tok: tuple[int, ...] = (0, 1024, 2048)
    """Haystack tokens between needle and question."""
    most_tok: int | None = None
    """Cells with more haystack than this, before and after together, are left out: both axes can then go up to the
    longest context. null: every before with every after."""
