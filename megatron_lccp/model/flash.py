"""Attention in parts: of some queries over several stretches of keys, put together by their log-sum-exps.

In: query, key and value with grouped heads. Out: the same as one attention over all those keys, forward and backward,
without a mask and without a score matrix. Each part is one call of PyTorch's own fused kernel.

Shapes: b batch, n query heads, g key/value heads, s queries, t keys, h head width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

aten = torch.ops.aten

Part = tuple[torch.Tensor, torch.Tensor, bool]
"""(key [b, g, t, h], value, causal): all queries see all of these keys, or query i only the first i + 1 of them."""


def attend_parts(query_bnsh: torch.Tensor, parts: Iterable[Part], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [b, n, s, h], log-sum-exp [b, n, s] fp32) of the queries over the union of the parts. No gradients."""
    found: tuple[torch.Tensor, torch.Tensor] | None = None
    for key_bgth, value_bgth, causal in parts:
        more = _forward(query_bnsh, key_bgth, value_bgth, causal, scale)
        found = more if found is None else merge(*found, *more)
    assert found is not None, "no keys to attend to"
    return found


def merge(
    a_bnsh: torch.Tensor, lse_a_bns: torch.Tensor, b_bnsh: torch.Tensor, lse_b_bns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each."""
    lse = torch.logaddexp(lse_a_bns, lse_b_bns)
    weighted = a_bnsh * (lse_a_bns - lse).exp()[..., None] + b_bnsh * (lse_b_bns - lse).exp()[..., None]
    return weighted.to(a_bnsh.dtype), lse


class AttendParts(torch.autograd.Function):
    """Attention of stretches of queries, each over parts of the keys, with gradients.

    `stretches` holds (first query, end of the queries, parts), a part being (first key, end of the keys, causal). The
    backward kernel takes the output and log-sum-exp of the whole attention, so each part gives its exact share of the
    gradients.
    """

    @staticmethod
    def forward(ctx, query_bnsh, key_bgth, value_bgth, stretches, scale):
        out, lse = torch.empty_like(query_bnsh), query_bnsh.new_empty(query_bnsh.shape[:3], dtype=torch.float32)
        for start, end, parts in stretches:
            cut = ((key_bgth[:, :, a:b], value_bgth[:, :, a:b], causal) for a, b, causal in parts)
            here = attend_parts(query_bnsh[:, :, start:end], cut, scale)
            out[:, :, start:end], lse[:, :, start:end] = here
        ctx.save_for_backward(query_bnsh, key_bgth, value_bgth, out, lse)
        ctx.stretches, ctx.scale = stretches, scale
        return out

    @staticmethod
    def backward(ctx, grad_bnsh):
        query_bnsh, key_bgth, value_bgth, out, lse = ctx.saved_tensors
        grad_q = torch.zeros_like(query_bnsh, dtype=torch.float32)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (key_bgth, value_bgth))
        for start, end, parts in ctx.stretches:
            q, o, grad = (x[:, :, start:end] for x in (query_bnsh, out, grad_bnsh))
            for low, high, causal in parts:
                k, v = key_bgth[:, :, low:high], value_bgth[:, :, low:high]
                more_q, more_k, more_v = _backward(grad, q, k, v, o, lse[:, :, start:end], causal, ctx.scale)
                grad_q[:, :, start:end] += more_q
                grad_k[:, :, low:high] += more_k
                grad_v[:, :, low:high] += more_v
        return grad_q.to(query_bnsh.dtype), grad_k.to(key_bgth.dtype), grad_v.to(value_bgth.dtype), None, None


def _forward(q, k, v, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of the fused kernel: (out, log-sum-exp)."""
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=None, scale=scale)
    if q.dtype is not torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    k, v = (repeated(x, q.shape[1]) for x in (k, v))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[:, :, : q.shape[2]]  # this kernel pads its rows to a multiple of 32


def _backward(grad, q, k, v, out, lse, causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=None, scale=scale
        )
    none = torch.empty(2, dtype=torch.uint64, device=q.device)  # random state of dropout, of which there is none
    if q.dtype is not torch.float32:
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, none, none[0], scale=scale
        )
    heads, groups = q.shape[1], k.shape[1]
    k, v = (repeated(x, heads) for x in (k, v))
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, lse, none[0], none[0], 0.0, [True, True, True, False], causal, scale=scale
    )
    return grad_q, *(x.unflatten(1, (groups, heads // groups)).sum(2) for x in (grad_k, grad_v))


def repeated(x_bgth: torch.Tensor, heads: int) -> torch.Tensor:
    """Key or value with one head for each query head, for kernels that do not group."""
    return x_bgth.repeat_interleave(heads // x_bgth.shape[1], dim=1)
