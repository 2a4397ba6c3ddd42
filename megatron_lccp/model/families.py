"""Model families as functions: each returns what the model is, free of torch and of the layout.

In: nothing. Out: `Family`, whose `transformer` holds fields of Megatron-Core's TransformerConfig by their own names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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


FAMILIES: dict[str, Callable[[], Family]] = {"tiny_moe": tiny_moe, "hunyuan_a13b": hunyuan_a13b}


def family_of(name: str) -> Family:
    """The family of that name; ValueError lists the names there are."""
    if name not in FAMILIES:
        raise ValueError(f"model.family: {name!r} is unknown; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]()
