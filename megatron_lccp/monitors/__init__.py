"""What is measured while a model trains; each monitor is one file and one line of YAML. Read `corpus_ppl` first."""

from megatron_lccp.monitors.copy_back import CopyBack
from megatron_lccp.monitors.corpus_ppl import CorpusPPL
from megatron_lccp.monitors.head_ablation import HeadAblation
from megatron_lccp.monitors.needle_grid import InterferenceGrid, NeedleGrid
from megatron_lccp.monitors.retrieval_heads import RetrievalHeads

__all__ = ["CopyBack", "CorpusPPL", "HeadAblation", "InterferenceGrid", "NeedleGrid", "RetrievalHeads"]
