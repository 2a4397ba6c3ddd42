"""Core attention without an S x S tensor, and QK-norm on the far side of the rotary embedding.

In: query, key, value as Megatron-Core's SelfAttention hands them over, after RoPE. Out: [s, b, np * hn].

Shapes: s sequence on this context-parallel rank, b batch, np query heads and ng key/value heads on this rank, hn head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from megatron_lccp.config.fields import beyond_plain_attention
from megatron_lccp.model.documents import Documents
from megatron_lccp.model.flash import AttendParts, repeated
from megatron_lccp.model.norm import RMSNorm
from megatron_lccp.parallel.zigzag import gather_sequence, local_chunks

if TYPE_CHECKING:
    from megatron.core.transformer.attention import Attention


class PortableAttention(MegatronModule):
    """Causal attention through PyTorch's fused kernels, on any device, with grouped queries and context parallelism.

    Stands where Megatron-Core's DotProductAttention would, which builds [b * np, s, s] (64K: 16 GiB a head) and knows
    no context parallelism. With it, keys and values are gathered over the context-parallel ranks, and each of the two
    chunks of queries that a rank holds of a document attends to what comes before it there and, causally, to itself.
    Where documents are packed (`documents`), nothing is attended to beyond the own one.
    Raises ValueError where the configuration wants more of attention: windows, sinks, dropout.
    """

    def __init__(
        self, config, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str = "self",
        softmax_scale: float | None = None, pg_collection=None, **_unused,
    ):  # fmt: skip
        super().__init__(config=config)
        assert attention_type == "self" and attn_mask_type is AttnMaskType.causal
        if problems := beyond_plain_attention(vars(config)):
            raise ValueError(problems[0])
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self._cp = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self, query_sbnh, key_sbgh, value_sbgh, attention_mask=None, attn_mask_type=None, attention_bias=None,
        packed_seq_params=None,
    ):  # fmt: skip
        assert attention_bias is None
        packed = isinstance(packed_seq_params, Documents)
        assert packed or packed_seq_params is None, packed_seq_params
        if packed:  # [t, heads, width]
            query_sbnh, key_sbgh, value_sbgh = (x.unsqueeze(1) for x in (query_sbnh, key_sbgh, value_sbgh))
        s, b, heads, width = query_sbnh.shape
        rank, size = (0, 1) if self._cp is None else (self._cp.rank(), self._cp.size())
        bounds = packed_seq_params.bounds if packed else (0, s * size)
        assert bounds[-1] == s * size, (bounds[-1], s, size)
        if self._cp is not None:
            both = torch.stack([key_sbgh, value_sbgh], dim=1)
            key_sbgh, value_sbgh = gather_sequence(both, self._cp, bounds).unbind(1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_sbnh, key_sbgh, value_sbgh))
        if size == 1 and len(bounds) == 2:
            out_bnsh = self._whole(q, k, v)
        else:
            out_bnsh = AttendParts.apply(q, k, v, document_stretches(bounds, rank, size), self.softmax_scale)
        out_sbh = out_bnsh.permute(2, 0, 1, 3).reshape(s, b, heads * width)
        return out_sbh[:, 0] if packed else out_sbh

    def _whole(self, q, k, v) -> torch.Tensor:
        grouped = k.shape[1] != q.shape[1]
        if grouped and q.is_cuda and q.dtype is torch.float32:  # no kernel there groups, and the fallback builds S x S
            k, v, grouped = repeated(k, q.shape[1]), repeated(v, q.shape[1]), False
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped)


def document_stretches(
    bounds: Sequence[int], rank: int, size: int
) -> list[tuple[int, int, list[tuple[int, int, bool]]]]:
    """What the queries of a context-parallel rank attend to, as `AttendParts` takes it: each stretch of them, all of its
    document before it, and itself."""
    found, at = [], 0
    starts = [start for start in bounds[:-1] for _ in range(1 if size == 1 else 2)]
    for document, (start, end) in zip(starts, local_chunks(bounds, rank, size), strict=True):
        before = [(document, start, False)] if start > document else []
        found.append((at, at + end - start, [*before, (start, end, True)]))
        at += end - start
    return found


class NormAfterRope(MegatronModule):
    """Hunyuan's QK-norm: RMSNorm over each query and key head after RoPE, then the real core attention.

    Megatron-Core norms before RoPE (transformer/attention.py:1477) and cannot be told otherwise; with a learned weight
    the two orders differ. The module names carry `q_layernorm`/`k_layernorm`, which finalize_model_grads.py looks for
    to sum their gradients over tensor-parallel ranks, each of which saw only its own heads.
    """

    def __init__(
        self, config, layer_number: int, inner: ModuleSpec | type = PortableAttention, norm: type = RMSNorm, **kwargs
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.q_layernorm = norm(config, config.kv_channels, eps=config.layernorm_epsilon)
        self.k_layernorm = norm(config, config.kv_channels, eps=config.layernorm_epsilon)
        self.inner = build_module(inner, config=config, layer_number=layer_number, **kwargs)
        self.register_load_state_dict_post_hook(_without_extra_state)

    def forward(self, query_sbnh: torch.Tensor, key_sbgh: torch.Tensor, value_sbgh: torch.Tensor, *args, **kwargs):
        return self.inner(self.q_layernorm(query_sbnh), self.k_layernorm(key_sbgh), value_sbgh, *args, **kwargs)


def _without_extra_state(module: torch.nn.Module, keys) -> None:
    """No checkpoint of Megatron-Core holds the extra state of Transformer Engine's core attention, which forgives that
    by the name `core_attention._extra_state`; with a module in between it has another."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith("core_attention.inner._extra_state")]


def has_transformer_engine() -> bool:
    """True if Transformer Engine can run here."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE and torch.cuda.is_available()


def core_attention_class(transformer_engine: bool) -> type:
    """The core attention, Transformer Engine's or ours."""
    if not transformer_engine:
        return PortableAttention
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def innermost_core_attention(self_attention: Attention) -> torch.nn.Module:
    """The module that is handed the query and key actually used: what a tap hooks."""
    core = self_attention.core_attention
    return core.inner if isinstance(core, NormAfterRope) else core
