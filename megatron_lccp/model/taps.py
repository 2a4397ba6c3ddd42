"""Look at the query and key that core attention really uses, without changing it: rows, not matrices.

In: model chunks; for scoring, query rows and all keys of one sequence. Out: per row and head, where attention is
largest and how much of it lies on a span. Memory is O(rows x heads x block): no S x S tensor.

Shapes: s sequence, b batch (1), n query heads on this rank, g key heads on this rank, h head width, r rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_lccp.model.attention import innermost_core_attention
from megatron_lccp.model.build import bare

Visit = Callable[[int, torch.Tensor, torch.Tensor, float], None]
"""Called with (layer from 0 in the whole model, query_sbnh, key_sbgh, softmax scale) for each layer of this rank."""


@contextlib.contextmanager
def tap_attention(chunks: Sequence[torch.nn.Module], visit: Visit) -> Iterator[None]:
    """While open, `visit` sees the query and key of every core attention on this rank (after RoPE and QK-norm)."""
    hooks = []
    try:
        for chunk in chunks:
            for layer in bare(chunk).decoder.layers:
                core, number = innermost_core_attention(layer.self_attention), layer.layer_number - 1

                def hook(module, args, number=number):
                    query_sbnh, key_sbgh = args[:2]
                    scale = getattr(module, "softmax_scale", None) or query_sbnh.shape[-1] ** -0.5
                    visit(number, query_sbnh, key_sbgh, scale)

                hooks.append(core.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in hooks:
            handle.remove()


@dataclass(frozen=True)
class RowScores:
    """Where the attention rows of one layer look."""

    argmax_rn: torch.Tensor
    """Key with the largest attention, the lowest one on a tie; int64."""
    mass_rn: torch.Tensor
    """Share of the attention that lies inside the span; fp32 in [0, 1]."""


def score_rows(
    query_rnh: torch.Tensor,
    key_sgh: torch.Tensor,
    rows_r: torch.Tensor,
    span: tuple[int, int],
    scale: float,
    block_tok: int = 4096,
) -> RowScores:
    """Causal attention of some query rows (at positions `rows_r`) over all keys, in blocks of keys, in fp32."""
    rows, heads, _ = query_rnh.shape
    groups = key_sgh.shape[1]
    query_rgnh = query_rnh.float().view(rows, groups, heads // groups, -1)
    query_grh = query_rgnh.transpose(0, 1).reshape(groups, -1, query_rnh.shape[-1])
    shape = (groups, rows, heads // groups)
    best = torch.full(shape, -torch.inf, device=query_rnh.device)
    argmax = torch.zeros(shape, dtype=torch.int64, device=query_rnh.device)
    lse, lse_span = best.clone(), best.clone()
    for start in range(0, int(rows_r.max()) + 1, block_tok):
        key_gsh = key_sgh[start : start + block_tok].float().transpose(0, 1)
        positions_s = torch.arange(start, start + key_gsh.shape[1], device=query_rnh.device)
        score_grns = (query_grh @ key_gsh.transpose(1, 2)).view(*shape, -1) * scale
        score_grns.masked_fill_(positions_s > rows_r[:, None, None], -torch.inf)
        top = score_grns.amax(-1)
        # not argmax(): which of equal scores it returns is not defined
        where = torch.where(score_grns == top[..., None], positions_s, positions_s[-1]).amin(-1)
        argmax = torch.where(top > best, where, argmax)
        best = torch.maximum(best, top)
        lse = torch.logaddexp(lse, score_grns.logsumexp(-1))
        inside = (positions_s >= span[0]) & (positions_s < span[1])
        if inside.any():
            lse_span = torch.logaddexp(lse_span, score_grns[..., inside].logsumexp(-1))

    def rn(x_grn: torch.Tensor) -> torch.Tensor:
        return x_grn.permute(1, 0, 2).reshape(rows, heads)

    return RowScores(argmax_rn=rn(argmax), mass_rn=rn((lse_span - lse).exp()))
