"""What must not take memory: attention of 16K tokens, measuring at 64K, and a model that is only counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lccp.model.families import hunyuan_a13b
from tests.distributed.memory_jobs import VOCABULARY
from tests.distributed.ranks import run_ranks


def test_16k_forward_and_backward_stay_under_3_gb(tiny_yaml: Path) -> None:
    found = run_ranks(1, "peak_memory", path=tiny_yaml, length_tok=16384)[0]
    # one fp32 score matrix of the four heads alone would be 4.3 GB
    assert 0.1 < found["peak_gb"] < 3.0


def test_measuring_64k_takes_no_more_than_a_forward(tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that share a trunk, every head score, null questions: within 10 % of a forward that measures nothing."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory goes back at once: a peak is what was in use
    length = 65536
    bare, grid = (
        run_ranks(1, "memory_jobs.measured_memory", path=tiny_yaml, length_tok=length, grid=grid)[0]
        for grid in (False, True)
    )
    extra = {name: round(found["peak_gb"] - found["start_gb"], 3) for name, found in (("bare", bare), ("grid", grid))}
    print(f"peak {bare['peak_gb']:.3f} GB bare, {grid['peak_gb']:.3f} GB grid; over the level before: {extra}")
    assert grid["rows"] > 4 * 2 * 4 * 4  # cells, layers, heads, scores
    assert grid["peak_gb"] < 1.1 * bare["peak_gb"]
    # BF16 logits of all tokens would be 2.1 GB, one head's S x S 8.6 GB
    assert max(extra.values()) < 0.25 * length * VOCABULARY * 2 / 1e9


def test_hunyuan_a13b_has_its_parameters(tiny_yaml: Path) -> None:
    """Counted on the built model; the formula, from the sizes alone, agrees."""
    found = run_ranks(1, "count_parameters", path=tiny_yaml, family="hunyuan_a13b")[0]
    assert found["counted"] == (80_393_183_232, 12_747_448_320)
    assert found["peak_gb"] < 3.0  # its weights alone would be 160 GB
    assert parameter_counts(hunyuan_a13b().transformer, 128167, tied=True, qk_norm=True) == found["counted"]


def parameter_counts(transformer: dict, vocab_size: int, tied: bool, qk_norm: bool) -> tuple[int, int]:
    """(total, active for one token) parameters from the sizes alone."""
    t = transformer
    hidden, layers = t["hidden_size"], t["num_layers"]
    heads, groups, width = t["num_attention_heads"], t["num_query_groups"], t["kv_channels"]
    attention = hidden * width * (2 * heads + 2 * groups) + (2 * width if qk_norm else 0)
    expert = 3 * hidden * t["moe_ffn_hidden_size"]
    shared = 3 * hidden * t["moe_shared_expert_intermediate_size"]
    rest = layers * (attention + shared + hidden * t["num_moe_experts"] + 2 * hidden)
    rest += hidden + vocab_size * hidden * (1 if tied else 2)
    return rest + layers * t["num_moe_experts"] * expert, rest + layers * t["moe_router_topk"] * expert
