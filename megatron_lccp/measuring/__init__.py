"""How a model is measured: the window, prefills that many cells share, head scores.

All that the author of a monitor or of a head score needs is imported from here.
"""

from megatron_lccp.data.loader import sequences_of
from megatron_lccp.data.needles import NeedleSample, NeedleSet, NeedleSetSpec, build_needle_set
from megatron_lccp.data.tokenizers.base import FIRST_ORDINARY_ID, Tokenizer
from megatron_lccp.measuring.attention_rows import AttentionRows, KeyBlock
from megatron_lccp.measuring.found import Found, Look
from megatron_lccp.measuring.head_scores import HEAD_SCORES, HeadScore, head_score
from megatron_lccp.measuring.needles import (
    ByDepth,
    Measured,
    NeedleMonitor,
    Scored,
    can_share,
    head_rows,
    mean_scores,
    needle_metrics,
    needle_rows,
    needle_set,
    place_of,
    run_samples,
    work_of,
)
from megatron_lccp.measuring.prefills import Prefill, Segment, Tap, Tree, one_each, plain, shared
from megatron_lccp.measuring.runs import Work, run_trees
from megatron_lccp.measuring.taps import tap_attention, zero_heads
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.parallel.gather import agreed, any_rank, first_text, sum_over_ranks
from megatron_lccp.schema import LONGEST_TOK, MOST_SAMPLES, Every, Level, Metric, Monitor, Row

__all__ = [
    "AttentionRows", "ByDepth", "EvalWindow", "Every", "FIRST_ORDINARY_ID", "Found", "HEAD_SCORES", "HeadScore",
    "KeyBlock", "LONGEST_TOK", "Level", "Look", "MOST_SAMPLES", "Measured", "Metric", "Monitor", "NeedleMonitor", "NeedleSample", "NeedleSet",
    "NeedleSetSpec", "Prefill", "Row", "Scored", "Segment", "Tap", "Tokenizer", "Tree", "Work", "agreed", "any_rank",
    "build_needle_set", "can_share", "first_text", "head_rows", "head_score", "mean_scores", "needle_metrics",
    "needle_rows", "needle_set", "one_each", "place_of", "plain", "run_samples", "run_trees", "sequences_of", "shared",
    "sum_over_ranks", "tap_attention", "work_of", "zero_heads",
]  # fmt: skip
