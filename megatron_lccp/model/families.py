"""Model families as functions: each returns what the model is, free of torch and of the layout.

In: nothing. Out: `Family`, whose `transformer` holds fields of Megatron-Core's TransformerConfig by their own names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_lccp.model.shape import QKNorm, Shape, shape_of


@dataclass(frozen=True)
class Family:
    """What a model is."""

    transformer: dict[str, Any] = field(default_factory=dict)
    """Fields of TransformerConfig."""
    vocab_size: int | None = None
    """Tokens in the vocabulary before padding; None takes the tokenizer's."""
    tied_embeddings: bool = True
    """One matrix for the input embedding and the output layer."""
    qk_norm: QKNorm = "none"
    """RMSNorm over each query and key head, and on which side of the rotary embedding it stands."""
    rope_scaling_factor: float | None = None
    """Llama 3.1's stretching of the low rotary frequencies (factors 1 and 4, 8192 original positions)."""
    rotary_percent: float = 1.0
    """Share of a head that the rotary embedding turns."""
    dense_layers: int = 0
    """First layers without experts, of a model whose other layers have them."""

    def fields(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The fields of TransformerConfig that make the model, with those `given` in place of its own."""
        fields = {**self.transformer, **(given or {})}
        if self.dense_layers and type(layers := fields["num_layers"]) is int:
            dense = min(self.dense_layers, layers)
            fields = {"moe_layer_freq": [0] * dense + [1] * (layers - dense), **fields}
        return fields

    def shape(self, fields: Mapping[str, Any]) -> Shape:
        """What layers consist of with these fields."""
        return shape_of(fields, self.qk_norm, self.tied_embeddings, self.rotary_percent)


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


def _sigmoid_moe(**sizes: Any) -> dict[str, Any]:
    """What GLM-4.5 and Hy3 share: each expert scored by itself, a bias that balances them, a shared expert.

    Sequences are balanced by a small loss beside it (GLM-4.5's report, arXiv 2508.06471, 2.4).
    """
    return _dense(
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_dtype="fp32",
        moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=1e-4, moe_token_dispatcher_type="alltoall",
        layernorm_epsilon=1e-5, **sizes,
    )  # fmt: skip


def _glm45(**sizes: Any) -> Family:
    """What GLM-4.5 of every size shares (transformers' glm4_moe)."""
    fields = _sigmoid_moe(add_qkv_bias=True, **sizes)
    return Family(transformer=fields, tied_embeddings=False, rotary_percent=0.5, dense_layers=1)


def tiny_glm45_air() -> Family:
    """GLM-4.5-Air in small."""
    return _glm45(
        **_TINY, moe_ffn_hidden_size=64, moe_shared_expert_intermediate_size=64, num_moe_experts=8, moe_router_topk=2,
        moe_router_topk_scaling_factor=1.0,
    )  # fmt: skip


def tiny_glm45() -> Family:
    """GLM-4.5 in small: GLM-4.5-Air with QK-norm before RoPE."""
    return replace(tiny_glm45_air(), qk_norm="before_rope")


def glm45_air() -> Family:
    """GLM-4.5-Air: 106,852,245,504 parameters without its multi-token prediction; its rotary base is 1,000,000."""
    return replace(
        _glm45(
            num_layers=46, hidden_size=4096, num_attention_heads=96, num_query_groups=8, kv_channels=128,
            ffn_hidden_size=10944, moe_ffn_hidden_size=1408, moe_shared_expert_intermediate_size=1408,
            num_moe_experts=128, moe_router_topk=8, moe_router_topk_scaling_factor=1.0,
        ),
        vocab_size=151552,
    )  # fmt: skip


def glm45() -> Family:
    """GLM-4.5: 352,797,814,784 parameters without its multi-token prediction; its rotary base is 1,000,000."""
    return replace(
        _glm45(
            num_layers=92, hidden_size=5120, num_attention_heads=96, num_query_groups=8, kv_channels=128,
            ffn_hidden_size=12288, moe_ffn_hidden_size=1536, moe_shared_expert_intermediate_size=1536,
            num_moe_experts=160, moe_router_topk=8, moe_router_topk_scaling_factor=2.5,
        ),
        vocab_size=151552, qk_norm="before_rope", dense_layers=3,
    )  # fmt: skip


def tiny_hy3() -> Family:
    """Hy3 in small."""
    fields = _sigmoid_moe(
        **_TINY, moe_ffn_hidden_size=64, moe_shared_expert_intermediate_size=64, num_moe_experts=8, moe_router_topk=2,
        moe_router_topk_scaling_factor=2.826,
    )  # fmt: skip
    return Family(transformer=fields, tied_embeddings=False, qk_norm="before_rope", dense_layers=1)


def hy3() -> Family:
    """Hy3: 295,033,528,320 parameters without its multi-token prediction; its rotary base is 11,158,840."""
    return Family(
        transformer=_sigmoid_moe(
            num_layers=80, hidden_size=4096, num_attention_heads=64, num_query_groups=8, kv_channels=128,
            ffn_hidden_size=13312, moe_ffn_hidden_size=1536, moe_shared_expert_intermediate_size=1536,
            num_moe_experts=192, moe_router_topk=8, moe_router_topk_scaling_factor=2.826,
        ),
        vocab_size=120832, tied_embeddings=False, qk_norm="before_rope", dense_layers=1,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Family]] = {
    f.__name__: f
    for f in (
        tiny_moe, hunyuan_a13b, tiny_llama3, tiny_llama31, tiny_qwen3, tiny_qwen3_moe, llama3_8b, llama31_8b, qwen3_8b,
        qwen3_30b_a3b, tiny_glm45, tiny_glm45_air, glm45, glm45_air, tiny_hy3, hy3,
    )
}  # fmt: skip


def family_of(name: str) -> Family:
    """The family of that name; ValueError lists the names there are."""
    if name not in FAMILIES:
        raise ValueError(f"model.family: {name!r} is unknown; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]()
