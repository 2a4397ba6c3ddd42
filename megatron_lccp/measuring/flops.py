"""Floating-point operations of a forward, from sizes alone.

In: fields of TransformerConfig, how many tokens and how many (query, key) pairs. Out: operations, a multiplication and
an addition counted as two. Causal attention is counted by its pairs, so a whole sequence counts half of its square
(Megatron-LM's convention). Norms, activations, softmax and routing are left out. A training step is three forwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lccp.measuring.prefills import Prefill


def active_parameters(fields: Mapping[str, Any]) -> int:
    """Parameters of the layers that one token is multiplied with: of the experts those it is sent to."""
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    width, groups = fields.get("kv_channels") or hidden // heads, fields.get("num_query_groups") or heads
    attention = hidden * width * (2 * heads + 2 * groups)
    matrices = 3 if fields.get("gated_linear_unit") else 2
    ffn = fields.get("ffn_hidden_size") or 4 * hidden
    experts = fields.get("num_moe_experts")
    if experts:
        routed = (fields.get("moe_ffn_hidden_size") or ffn) * fields.get("moe_router_topk", 2)
        shared = fields.get("moe_shared_expert_intermediate_size") or 0
        feed_forward = matrices * hidden * (routed + shared) + hidden * experts
    else:
        feed_forward = matrices * hidden * ffn
    return fields["num_layers"] * (attention + feed_forward)


def forward_flops(fields: Mapping[str, Any], tokens: int, pairs: int, rows: int, vocab: int) -> float:
    """Operations of `tokens` through the layers, with `pairs` of attention, and `rows` through the output layer."""
    width = fields.get("kv_channels") or fields["hidden_size"] // fields["num_attention_heads"]
    attention = 4 * fields["num_layers"] * fields["num_attention_heads"] * width * pairs
    return 2.0 * active_parameters(fields) * tokens + attention + 2.0 * fields["hidden_size"] * vocab * rows


def step_flops(fields: Mapping[str, Any], context_tok: int, batch_tok: int, vocab: int) -> float:
    """Operations of a training step of whole sequences, without recomputation."""
    pairs = batch_tok // context_tok * causal_pairs(context_tok)
    return 3 * forward_flops(fields, batch_tok, pairs, batch_tok, vocab)


def causal_pairs(length: int) -> int:
    """(query, key) pairs of a causal sequence."""
    return length * (length + 1) // 2


def prefill_flops(fields: Mapping[str, Any], prefills: Sequence[Prefill], vocab: int) -> float:
    """Operations of some prefills, without padding to a layout."""
    pairs = rows = tokens = 0
    for prefill in prefills:
        for segment in prefill.segments:
            length, seen = segment.end - segment.start, sum(end - start for start, end in segment.sees)
            pairs += length * seen + causal_pairs(length)
        rows += sum(tap.end - tap.answer for tap in prefill.taps)
        tokens += len(prefill)
    return forward_flops(fields, tokens, pairs, rows, vocab)
