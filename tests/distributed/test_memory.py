"""What must not take memory: 16K tokens of attention, and a model of 80 billion parameters that is only counted."""

from __future__ import annotations

from pathlib import Path

from megatron_lccp.model.families import hunyuan_a13b, parameter_counts
from tests.distributed.ranks import run_ranks


def test_16k_forward_and_backward_stay_under_3_gb(tiny_yaml: Path) -> None:
    found = run_ranks(1, "peak_memory", path=tiny_yaml, length_tok=16384)[0]
    # one fp32 score matrix of the four heads alone would be 4.3 GB
    assert 0.1 < found["peak_gb"] < 3.0


def test_hunyuan_a13b_has_its_parameters(tiny_yaml: Path) -> None:
    """Counted on the built model; the formula, from the sizes alone, agrees."""
    found = run_ranks(1, "count_parameters", path=tiny_yaml, family="hunyuan_a13b")[0]
    assert found["counted"] == (80_393_183_232, 12_747_448_320)
    assert found["peak_gb"] < 3.0  # its weights alone would be 160 GB
    assert parameter_counts(hunyuan_a13b().transformer, 128167, tied=True, qk_norm=True) == found["counted"]
