"""Floating-point operations of a forward, from sizes alone.

In: the shape of a model, how many tokens and how many (query, key) pairs. Out: operations, a multiplication and an
addition counted as two. Causal attention is counted by its pairs, so a whole sequence counts half of its square
(Megatron-LM's convention). Norms, biases, activations, softmax and routing are left out. A training step is three
forwards.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lccp.measuring.prefills import Prefill
from megatron_lccp.model.shape import Shape


def active_parameters(shape: Shape) -> int:
    """Parameters of the layers that one token is multiplied with: of the experts those it is sent to."""
    return sum(
        part.numel * (shape.top_k if part.over == "expert" else 1)
        for layer in range(shape.layers)
        for part in shape.parts(layer)
        if part.columns is not None
    )


def forward_flops(shape: Shape, tokens: int, pairs: int, rows: int, vocab: int) -> float:
    """Operations of `tokens` through the layers, with `pairs` of attention, and `rows` through the output layer."""
    attention = 4 * shape.layers * shape.heads * shape.width * pairs
    return 2.0 * active_parameters(shape) * tokens + attention + 2.0 * shape.hidden * vocab * rows


def step_flops(shape: Shape, context_tok: int, batch_tok: int, vocab: int, attention: float = 1.0) -> float:
    """Operations of a training step, without recomputation; `attention` is what it does of whole sequences' work, where
    it ends at documents."""
    pairs = round(batch_tok // context_tok * causal_pairs(context_tok) * attention)
    return 3 * forward_flops(shape, batch_tok, pairs, batch_tok, vocab)


def causal_pairs(length: int) -> int:
    """(query, key) pairs of a causal sequence."""
    return length * (length + 1) // 2


def prefill_flops(shape: Shape, prefills: Sequence[Prefill], vocab: int) -> float:
    """Operations of some prefills, without padding to a layout."""
    tokens, pairs, rows = work_in(prefills)
    return forward_flops(shape, tokens, pairs, rows, vocab)


def work_in(prefills: Sequence[Prefill]) -> tuple[int, int, int]:
    """(tokens, (query, key) pairs of attention, rows through the output layer) of some prefills."""
    pairs = rows = tokens = 0
    for prefill in prefills:
        for segment in prefill.segments:
            length, seen = segment.end - segment.start, sum(end - start for start, end in segment.sees)
            pairs += length * seen + causal_pairs(length)
        rows += sum(tap.end - tap.answer for tap in prefill.taps)
        tokens += len(prefill)
    return tokens, pairs, rows
