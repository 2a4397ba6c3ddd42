"""What must not take memory: attention of 16K tokens, measuring at 64K, and a model that is only counted.

One process does it all, with its peak reset in between.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lccp.model.families import hunyuan_a13b
from tests.distributed.memory_jobs import KEPT_BYTES, VOCABULARY
from tests.distributed.ranks import run_ranks

LENGTH = 65536
FAMILY = "hunyuan_a13b"


@pytest.fixture(scope="module")
def peaks(tiny_yaml: Path) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory goes back at once: a peak is what was in use
        arguments = dict(train_tok=16384, measure_tok=LENGTH, prefill_tok=1024, family=FAMILY)
        found = run_ranks(1, "memory_jobs.peaks", timeout_s=480, path=tiny_yaml, fresh=True, **arguments)[0]
    for name, of in found.items():
        print(f"{name}: from {of['start_gb']:.3f} to {of['peak_gb']:.3f} GB in {of['time_s']:.1f} s")
    return found


def extra_gb(peaks: dict, name: str) -> float:
    return peaks[name]["peak_gb"] - peaks[name]["start_gb"]


def test_16k_forward_and_backward_stay_under_2_gb(peaks: dict) -> None:
    # one fp32 score matrix alone would be 1.1 GB, and each layer has one
    assert 0.1 < extra_gb(peaks, "training") < 1 and peaks["training"]["peak_gb"] < 2


def test_measuring_64k_takes_no_more_than_a_forward(peaks: dict) -> None:
    """Cells that share a prefix, every head score, null questions: within 10 % of a forward that measures nothing, and
    what is more is the prefix that is kept."""
    bare, grid = (extra_gb(peaks, f"{name} bf16") for name in ("bare", "grid"))
    assert peaks["grid bf16"]["found"] > 2 * 2 * 4  # cells, layers, scores
    assert peaks["grid bf16"]["peak_gb"] < 1.1 * peaks["bare bf16"]["peak_gb"]
    assert grid < bare + 1.4 * LENGTH * KEPT_BYTES / 1e9
    # BF16 logits of all tokens would be 2.1 GB, one head's S x S 8.6 GB
    assert 0 < max(bare, grid) < 0.25 * LENGTH * VOCABULARY * 2 / 1e9


def test_small_prefills_take_less_than_a_forward(peaks: dict) -> None:
    assert peaks["grid fp32"]["found"] == peaks["grid bf16"]["found"]
    assert 0 < extra_gb(peaks, "grid fp32") < 0.5 * extra_gb(peaks, "bare fp32")


def test_hunyuan_a13b_has_its_parameters(peaks: dict) -> None:
    """Counted on the built model; the formula, from the sizes alone, agrees."""
    assert peaks["family"]["found"] == (80_393_183_232, 12_747_448_320)
    assert peaks["family"]["peak_gb"] < 3.0  # its weights alone would be 160 GB
    assert parameter_counts(hunyuan_a13b().transformer, 128167, tied=True, qk_norm=True) == peaks["family"]["found"]


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
