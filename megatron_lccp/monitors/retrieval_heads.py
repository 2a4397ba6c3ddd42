"""The retrieval score of every attention head: how often it looks at the very token that is to be copied next.

In: an open window. Out: rows per sample, layer and head. Paper: section 6 and appendix A.1, Figures 4 and 5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_lccp.measuring.head_scores import HEAD_METRICS, HeadMetric
from megatron_lccp.measuring.needles import check_wanted, head_rows, run_samples, work_of
from megatron_lccp.measuring.runs import Work
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.schema import Every, Monitor, Row


@dataclass(frozen=True)
class RetrievalHeads(Monitor):
    """Which heads copy from the needle.

    One row per sample and head for each of `scores`, which megatron_lccp/measuring/head_scores.py defines. A head's
    score is the mean over samples, without a success gate; the paper calls it a retrieval head above 0.1.
    """

    metrics = HEAD_METRICS
    every: Every = Every(steps=100)
    """When it is due; besides, at the start of a stage and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on, or stop the run."""
    lengths_tok: tuple[int, ...] = (1024,)
    """Total tokens of a sample, answer included."""
    depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Where the needle stands: share of the haystack before it."""
    lattice_tok: int | None = None
    """Tokens before the needle are rounded to a multiple of this, so that cells share prefills; null: exact depths."""
    samples: int = 4
    """Samples per length and depth; each has a haystack and a needle of its own."""
    families: tuple[str, ...] = ("biography",)
    """Families of needles (megatron_lccp/data/needles.py)."""
    haystacks: tuple[str, ...] = ()
    """Sources whose held-out documents make the haystacks, or bundled/...; samples take them in turn."""
    seed: int = 1
    """Seed of the sample set."""
    scores: tuple[HeadMetric, ...] = ("retrieval_score", "content_score", "needle_mass")
    """Which scores to record: also wu2024 and mass_minus_null."""
    share: bool = True
    """One prefill for many cells where the model allows it; false: a forward for every sample."""
    prefill_tok: int | None = None
    """Tokens of such a prefill; null: those of the longest sample. Fewer take less memory, and give the same results:
    a long sample goes through in several prefills, and keys and values of what later tokens see are kept."""

    def __post_init__(self) -> None:
        check_wanted(self)
        if not self.scores:
            raise ValueError("scores: is empty; name at least one, such as retrieval_score")

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows of the scores per sample and head."""
        yield from head_rows(window, self, run_samples(window, self, self.scores), self.scores)

    def work(self, window: EvalWindow) -> Work:
        """What `measure` runs, for a plan."""
        return work_of(window, self, self.scores)
