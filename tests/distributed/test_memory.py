"""No S x S tensor: what 16K tokens cost in memory, forward and backward, on the CPU."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.ranks import run_ranks


def test_16k_forward_and_backward_stay_under_3_gb(tiny_yaml: Path) -> None:
    found = run_ranks(1, "peak_memory", path=tiny_yaml, length_tok=16384)[0]
    # one fp32 score matrix of the four heads alone would be 4.3 GB
    assert 0.1 < found["peak_gb"] < 3.0
