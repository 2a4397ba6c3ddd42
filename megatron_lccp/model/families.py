"""Model families as functions: each returns what the model is, free of torch and of the layout.

In: nothing. Out: `Family`, whose `transformer` holds fields of Megatron-Core's TransformerConfig by their own names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """What a model is."""

    transformer: dict[str, Any] = field(default_factory=dict)
    """Fields of TransformerConfig."""
    vocab_size: int | None = None
    """Tokens in the vocabulary before padding; None takes the tokenizer's."""
    tied_embeddings: bool = True
    """One matrix for the input embedding and the output layer."""
    qk_norm: Literal["after_rope", "before_rope", "none"] = "none"
    """RMSNorm over each query and key head, and on which side of the rotary embedding it stands."""
    rope_scaling_factor: float | None = None
    """Llama 3.1's stretching of the low rotary frequencies (factors 1 and 4, 8192 original positions)."""


def _hunyuan_moe(**sizes: Any) -> dict[str, Any]:
    """What every size of Hunyuan's mixture of experts shares (transformers' hunyuan_v1_moe; the paper, Table 1)."""
    return dict(
        normalization="RMSNorm", layernorm_epsilon=1e-5, add_bias_linear=False, gated_linear_unit=True,
        attention_dropout=0.0, hidden_dropout=0.0,
        # softmax over the chosen experts = softmax over all, top-k, renormalised
        moe_router_score_function="softmax", moe_router_pre_softmax=False, moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-3, moe_token_dispatcher_type="alltoall",
        **sizes,
    )  # fmt: skip


def tiny_moe() -> Family:
    """Hunyuan-A13B in small: the same parts, a size that a laptop trains."""
    return Family(
        transformer=_hunyuan_moe(
            num_layers=2, hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=32,
            ffn_hidden_size=256, moe_ffn_hidden_size=128, moe_shared_expert_intermediate_size=256,
            num_moe_experts=8, moe_router_topk=2, init_method_std=0.02,
        ),
        qk_norm="after_rope",
    )  # fmt: skip


def hunyuan_a13b() -> Family:
    """Hunyuan-A13B: 80,393,183,232 parameters, 12,747,448,320 active (tied embeddings counted once)."""
    return Family(
        transformer=_hunyuan_moe(
            num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8, kv_channels=128,
            ffn_hidden_size=3072, moe_ffn_hidden_size=3072, moe_shared_expert_intermediate_size=3072,
            num_moe_experts=64, moe_router_topk=8,
        ),
        vocab_size=128167,
        qk_norm="after_rope",
    )  # fmt: skip


def _dense(**sizes: Any) -> dict[str, Any]:
    """What Llama 3 and Qwen3 of every size share (transformers' llama, qwen3)."""
    return dict(
        normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True, attention_dropout=0.0,
        hidden_dropout=0.0, **sizes,
    )  # fmt: skip


def _moe(**sizes: Any) -> dict[str, Any]:
    """What Qwen3-MoE adds (transformers' qwen3_moe with norm_topk_prob): no shared expert, the chosen renormalised."""
    return _dense(
        moe_router_score_function="softmax", moe_router_pre_softmax=False, moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=1e-3, moe_token_dispatcher_type="alltoall",
        **sizes,
    )  # fmt: skip


_TINY = dict(num_layers=2, hidden_size=128, num_attention_heads=4, num_query_groups=2, kv_channels=32,
             ffn_hidden_size=256, init_method_std=0.02)  # fmt: skip


def tiny_llama3() -> Family:
    """Llama 3 in small."""
    return Family(transformer=_dense(**_TINY, layernorm_epsilon=1e-5), tied_embeddings=False)


def tiny_llama31() -> Family:
    """Llama 3.1 in small: Llama 3 with stretched rotary frequencies."""
    return replace(tiny_llama3(), rope_scaling_factor=8.0)


def tiny_qwen3() -> Family:
    """Qwen3 in small: QK-norm before RoPE."""
    fields = _dense(**_TINY, layernorm_epsilon=1e-6)
    return Family(transformer=fields, tied_embeddings=False, qk_norm="before_rope")


def tiny_qwen3_moe() -> Family:
    """Qwen3-MoE in small."""
    fields = _moe(**_TINY, layernorm_epsilon=1e-6, moe_ffn_hidden_size=64, num_moe_experts=8, moe_router_topk=2)
    return Family(transformer=fields, tied_embeddings=False, qk_norm="before_rope")


def llama3_8b() -> Family:
    """Llama 3 8B: 8,030,261,248 parameters; its rotary base is 500,000."""
    return Family(
        transformer=_dense(
            num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8, kv_channels=128,
            ffn_hidden_size=14336, layernorm_epsilon=1e-5,
        ),
        vocab_size=128256,
        tied_embeddings=False,
    )  # fmt: skip


def llama31_8b() -> Family:
    """Llama 3.1 8B: Llama 3 8B with stretched rotary frequencies."""
    return replace(llama3_8b(), rope_scaling_factor=8.0)


def qwen3_8b() -> Family:
    """Qwen3 8B: 8,190,735,360 parameters; its rotary base is 1,000,000."""
    return Family(
        transformer=_dense(
            num_layers=36, hidden_size=4096, num_attention_heads=32, num_query_groups=8, kv_channels=128,
            ffn_hidden_size=12288, layernorm_epsilon=1e-6,
        ),
        vocab_size=151936,
        tied_embeddings=False,
        qk_norm="before_rope",
    )  # fmt: skip


def qwen3_30b_a3b() -> Family:
    """Qwen3 30B-A3B: 30,532,122,624 parameters; its rotary base is 1,000,000."""
    return Family(
        transformer=_moe(
            num_layers=48, hidden_size=2048, num_attention_heads=32, num_query_groups=4, kv_channels=128,
            ffn_hidden_size=6144, moe_ffn_hidden_size=768, num_moe_experts=128, moe_router_topk=8,
            layernorm_epsilon=1e-6,
        ),
        vocab_size=151936,
        tied_embeddings=False,
        qk_norm="before_rope",
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Family]] = {
    f.__name__: f
    for f in (
        tiny_moe, hunyuan_a13b, tiny_llama3, tiny_llama31, tiny_qwen3, tiny_qwen3_moe, llama3_8b, llama31_8b, qwen3_8b,
        qwen3_30b_a3b,
    )
}  # fmt: skip


def family_of(name: str) -> Family:
    """The family of that name; ValueError lists the names there are."""
    if name not in FAMILIES:
        raise ValueError(f"model.family: {name!r} is unknown; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]()
