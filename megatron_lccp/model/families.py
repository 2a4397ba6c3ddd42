"""Model families as functions: each returns what the model is, free of torch and of the layout.

In: nothing. Out: `Description`, from what its config.json says. A family is a name for a model whose config.json need
not be at hand; one that is at hand needs none (`model.config`). The small ones leave the vocabulary to the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_lccp.model.hf_config import Description, describe

_TINY = dict(num_hidden_layers=2, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
             intermediate_size=256, initializer_range=0.02)  # fmt: skip
_HUNYUAN = dict(rms_norm_eps=1e-5, tie_word_embeddings=True)


def _model(architecture: str, **config: Any) -> Description:
    """The model of a config.json with these values."""
    return describe({"architectures": [f"{architecture}ForCausalLM"], **config})


def tiny_moe() -> Description:
    """Hunyuan-A13B in small: the same parts, a size that a laptop trains."""
    return _model("HunYuanMoEV1", **_TINY, **_HUNYUAN, moe_intermediate_size=128, num_experts=8, moe_topk=2)


def hunyuan_a13b() -> Description:
    """Hunyuan-A13B: 80,393,183,232 parameters, 12,747,448,320 active (tied embeddings counted once)."""
    return _model(
        "HunYuanMoEV1", **_HUNYUAN, num_hidden_layers=32, hidden_size=4096, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, intermediate_size=3072, moe_intermediate_size=3072, num_experts=64,
        moe_topk=8, vocab_size=128167, rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    )  # fmt: skip


def tiny_llama3() -> Description:
    """Llama 3 in small."""
    return _model("Llama", **_TINY, rms_norm_eps=1e-5)


_STRETCHED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA3_8B = dict(
    num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
    rms_norm_eps=1e-5, vocab_size=128256, rope_theta=500000.0,
)  # fmt: skip


def tiny_llama31() -> Description:
    """Llama 3.1 in small: Llama 3 with stretched rotary frequencies."""
    return _model("Llama", **_TINY, rms_norm_eps=1e-5, rope_scaling=_STRETCHED)


def llama3_8b() -> Description:
    """Llama 3 8B: 8,030,261,248 parameters; its rotary base is 500,000."""
    return _model("Llama", **_LLAMA3_8B)


def llama31_8b() -> Description:
    """Llama 3.1 8B: Llama 3 8B with stretched rotary frequencies."""
    return _model("Llama", **_LLAMA3_8B, rope_scaling=_STRETCHED)


def tiny_qwen3() -> Description:
    """Qwen3 in small: QK-norm before RoPE."""
    return _model("Qwen3", **_TINY, rms_norm_eps=1e-6)


def tiny_qwen3_moe() -> Description:
    """Qwen3-MoE in small."""
    return _qwen3_moe(**_TINY, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2)


def _qwen3_moe(**sizes: Any) -> Description:
    return _model("Qwen3Moe", rms_norm_eps=1e-6, norm_topk_prob=True, **sizes)


def qwen3_8b() -> Description:
    """Qwen3 8B: 8,190,735,360 parameters; its rotary base is 1,000,000."""
    return _model(
        "Qwen3", num_hidden_layers=36, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        intermediate_size=12288, rms_norm_eps=1e-6, vocab_size=151936, rope_theta=1e6,
    )  # fmt: skip


def qwen3_30b_a3b() -> Description:
    """Qwen3 30B-A3B: 30,532,122,624 parameters; its rotary base is 1,000,000."""
    return _qwen3_moe(
        num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        intermediate_size=6144, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
        rope_theta=1e6,
    )  # fmt: skip


def _glm45(**sizes: Any) -> Description:
    """What GLM-4.5 of every size shares."""
    return _model("Glm4Moe", attention_bias=True, rms_norm_eps=1e-5, **sizes)


_SMALL_EXPERTS = dict(moe_intermediate_size=64, num_experts_per_tok=2)


def tiny_glm45_air() -> Description:
    """GLM-4.5-Air in small."""
    return _glm45(**_TINY, **_SMALL_EXPERTS, n_routed_experts=8)


def tiny_glm45() -> Description:
    """GLM-4.5 in small: GLM-4.5-Air with QK-norm before RoPE."""
    return _glm45(**_TINY, **_SMALL_EXPERTS, n_routed_experts=8, use_qk_norm=True)


def glm45_air() -> Description:
    """GLM-4.5-Air: 106,852,245,504 parameters without its multi-token prediction; its rotary base is 1,000,000."""
    return _glm45(
        num_hidden_layers=46, hidden_size=4096, num_attention_heads=96, num_key_value_heads=8, head_dim=128,
        intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=128, num_experts_per_tok=8,
        vocab_size=151552, rope_theta=1e6,
    )  # fmt: skip


def glm45() -> Description:
    """GLM-4.5: 352,797,814,784 parameters without its multi-token prediction; its rotary base is 1,000,000."""
    return _glm45(
        num_hidden_layers=92, hidden_size=5120, num_attention_heads=96, num_key_value_heads=8, head_dim=128,
        intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160, num_experts_per_tok=8,
        routed_scaling_factor=2.5, first_k_dense_replace=3, use_qk_norm=True, vocab_size=151552, rope_theta=1e6,
    )  # fmt: skip


def tiny_hy3() -> Description:
    """Hy3 in small."""
    return _model("HYV3", **_TINY, **_SMALL_EXPERTS, rms_norm_eps=1e-5, num_experts=8)


def hy3() -> Description:
    """Hy3: 295,033,528,320 parameters without its multi-token prediction; its rotary base is 11,158,840."""
    return _model(
        "HYV3", num_hidden_layers=80, hidden_size=4096, num_attention_heads=64, num_key_value_heads=8,
        intermediate_size=13312, moe_intermediate_size=1536, num_experts=192, num_experts_per_tok=8,
        rms_norm_eps=1e-5, vocab_size=120832,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Description]] = {
    f.__name__: f
    for f in (
        tiny_moe, hunyuan_a13b, tiny_llama3, tiny_llama31, tiny_qwen3, tiny_qwen3_moe, llama3_8b, llama31_8b, qwen3_8b,
        qwen3_30b_a3b, tiny_glm45, tiny_glm45_air, glm45, glm45_air, tiny_hy3, hy3,
    )
}  # fmt: skip


def family_of(name: str) -> Description:
    """The family of that name; ValueError lists the names there are."""
    if name not in FAMILIES:
        raise ValueError(f"model.family: {name!r} is unknown; there are {', '.join(FAMILIES)}; or give model.config")
    return FAMILIES[name]()
