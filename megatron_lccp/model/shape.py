"""What each layer of a model consists of, said once: building, conversion, memory and FLOPs read it here.

In: fields of Megatron-Core's TransformerConfig, and what they leave open: QK-norm, tied embeddings, the rotary share.
Out: `Shape`, and of every layer its `Part`s, the tensors with their whole sizes and how ranks share them. Nothing is
imported from torch or Megatron, and nothing is checked: the fields were (config/fields.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

QKNorm = Literal["after_rope", "before_rope", "none"]
"""RMSNorm over each query and key head, and on which side of the rotary embedding it stands."""


@dataclass(frozen=True)
class Part:
    """One tensor of a layer."""

    name: str
    """As Megatron-Core's portable layer registers it, without the number of an expert."""
    rows: tuple[int, ...]
    """Rows of what is stacked in it: queries, keys and values; gate and up; or all of it."""
    columns: int | None = None
    """None for a vector."""
    over: Literal["none", "tensor", "expert"] = "none"
    """Ranks that share it: none, the tensor-parallel ones, or, if each expert has one, those of the experts."""
    groups: int | None = None
    """Key/value heads whose rows are kept together, for queries, keys and values."""
    trained: bool = True
    """False for what is no parameter: it gets no gradient, and stays FP32."""

    @property
    def numel(self) -> int:
        """Elements, of one expert if each has one."""
        return sum(self.rows) * (self.columns or 1)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each thing that is stacked in it."""
        return tuple((rows,) if self.columns is None else (rows, self.columns) for rows in self.rows)


@dataclass(frozen=True)
class Shape:
    """A model of any layout: its sizes, and the kind of each of its layers."""

    hidden: int
    heads: int
    groups: int
    """Key/value heads."""
    width: int
    """Of a head."""
    rotated: int
    """Of the width, what the rotary embedding turns: the first so many."""
    ffn: int
    """Width of the MLP of a layer without experts."""
    experts: int
    """0 if no layer has any."""
    top_k: int
    expert_ffn: int
    shared_ffn: int
    """Width of the shared expert; 0 if there is none."""
    routed: tuple[bool, ...]
    """Layer -> whether it has experts."""
    stacked: bool
    """Whether checkpoints keep a tensor of all layers as one (transformer/transformer_block.py: sharded_state_dict)."""
    qk_norm: QKNorm
    qkv_bias: bool
    router_bias: bool
    """Added to scores to choose experts, not to weigh them; moved by how many tokens each expert gets."""
    gated: bool
    """SwiGLU, with two matrices where others have one."""
    tied: bool
    """One matrix for the input embedding and the output layer."""

    @property
    def layers(self) -> int:
        return len(self.routed)

    def parts(self, layer: int) -> tuple[Part, ...]:
        """Tensors of a layer, from 0, in the order of named_parameters()."""
        return self._routed_parts if self.routed[layer] else self._dense_parts

    @cached_property
    def _dense_parts(self) -> tuple[Part, ...]:
        return (*self._attention(), *self._mlp("mlp.", self.ffn, "tensor"))

    @cached_property
    def _routed_parts(self) -> tuple[Part, ...]:
        return (
            *self._attention(),
            Part("mlp.router.weight", (self.experts,), self.hidden),
            *([Part("mlp.router.expert_bias", (self.experts,), trained=False)] if self.router_bias else []),
            *self._mlp("mlp.experts.", self.expert_ffn, "expert"),
            *(self._mlp("mlp.shared_experts.", self.shared_ffn, "tensor") if self.shared_ffn else []),
        )

    def _attention(self) -> list[Part]:
        queries, keys = self.heads * self.width, self.groups * self.width
        inside = {"after_rope": "core_attention.", "before_rope": "", "none": None}[self.qk_norm]
        norms = [Part(f"self_attention.{inside}{x}_layernorm.weight", (self.width,)) for x in "qk"]
        qkv = (queries, keys, keys)
        return [
            Part("input_layernorm.weight", (self.hidden,)),
            *(norms if self.qk_norm == "after_rope" else []),
            Part("self_attention.linear_proj.weight", (self.hidden,), queries, "tensor"),
            Part("self_attention.linear_qkv.weight", qkv, self.hidden, "tensor", self.groups),
            *([Part("self_attention.linear_qkv.bias", qkv, None, "tensor", self.groups)] if self.qkv_bias else []),
            *(norms if self.qk_norm == "before_rope" else []),
            Part("pre_mlp_layernorm.weight", (self.hidden,)),
        ]

    def _mlp(self, prefix: str, width: int, over: Literal["tensor", "expert"]) -> list[Part]:
        return [
            Part(f"{prefix}linear_fc1.weight", (width,) * (2 if self.gated else 1), self.hidden, over),
            Part(f"{prefix}linear_fc2.weight", (self.hidden,), width, over),
        ]


def shape_of(
    fields: Mapping[str, Any], qk_norm: QKNorm = "none", tied: bool = True, rotary_percent: float = 1.0
) -> Shape:
    """The shape of a model with these fields of TransformerConfig; Megatron-Core's defaults where they say nothing."""
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    width, ffn = fields.get("kv_channels") or hidden // heads, fields.get("ffn_hidden_size") or 4 * hidden
    experts, frequency = fields.get("num_moe_experts") or 0, fields.get("moe_layer_freq", 1)
    return Shape(
        hidden=hidden, heads=heads, groups=fields.get("num_query_groups") or heads, width=width,
        rotated=int(width * rotary_percent), ffn=ffn, experts=experts, top_k=fields.get("moe_router_topk", 2),
        expert_ffn=fields.get("moe_ffn_hidden_size") or ffn,
        shared_ffn=fields.get("moe_shared_expert_intermediate_size") or 0,
        routed=tuple(bool(experts) and with_experts for with_experts in _pattern(frequency, fields["num_layers"])),
        stacked=frequency == 1, qk_norm=qk_norm, qkv_bias=bool(fields.get("add_qkv_bias")),
        router_bias=bool(fields.get("moe_router_enable_expert_bias")), gated=bool(fields.get("gated_linear_unit")),
        tied=tied,
    )  # fmt: skip


def _pattern(frequency: int | list[int], layers: int) -> list[bool]:
    """Which layers have experts, by moe_layer_freq (models/gpt/gpt_layer_specs.py: get_gpt_decoder_layer_specs)."""
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(layers)]
    return [bool(with_experts) for with_experts in frequency]
