"""The retrieval score of every attention head: how often it looks at the very token that is to be copied next.

In: an open window. Out: rows per sample, layer and head. Paper: section 6 and appendix A.1, Figures 4 and 5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass

from megatron_lccp.measuring import ByDepth, EvalWindow, NeedleMonitor, Row, Scored, head_rows, run_samples


@dataclass(frozen=True)
class RetrievalHeads(ByDepth, Scored, NeedleMonitor):
    """Which heads copy from the needle.

    One row per sample and head for each of `scores`. A head's score is the mean over samples, without a success gate;
    the paper calls it a retrieval head above 0.1.
    """

    _: KW_ONLY
    seed: int = 1
    scores: tuple[str, ...] = ("retrieval_score", "content_score", "needle_mass")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scores:
            raise ValueError("scores: is empty; name at least one, such as retrieval_score")

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows of the scores per sample and head."""
        yield from head_rows(window, self, run_samples(window, self, self.asked()), self.asked())
