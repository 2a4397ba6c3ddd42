"""Look at the query and key that core attention really uses, without changing it: rows, not matrices.

In: model chunks; for scoring, some query rows and stretches of keys. Out: per row and head, where attention is largest
and how much of it lies on a span. Memory is O(rows x heads x block): no S x S tensor.

Shapes: s sequence, b batch, n query heads on this rank, g key heads on this rank, h head width, r rows, t keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lccp.model.attention import innermost_core_attention
from megatron_lccp.model.build import bare

Visit = Callable[[int, torch.Tensor, torch.Tensor, float], None]
"""Called with (layer from 0 in the whole model, query_sbnh, key_sbgh, softmax scale) for each layer of this rank."""

BLOCK_TOK = 4096
"""Keys scored together."""


@dataclass(frozen=True)
class Bend:
    """What a layer does beside the softmax of scaled scores over the keys up to the query; most layers nothing of it."""

    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    visible: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """Of the keys up to the query, which it sees: (position_r, position_t) -> bool [r, t]; None: all."""
    sink_n: torch.Tensor | None = None
    """A score of each head beside those of the keys; it takes its share of the attention."""


PLAIN = Bend()


def core_attentions(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[int, torch.nn.Module, float]]:
    """(layer from 0 in the whole model, innermost core attention, softmax scale) of each layer here that has one."""
    for chunk in chunks:
        for layer in bare(chunk).decoder.layers:
            if not hasattr(getattr(layer, "self_attention", None), "core_attention"):
                continue
            scale = layer.config.softmax_scale or layer.config.kv_channels**-0.5
            yield layer.layer_number - 1, innermost_core_attention(layer.self_attention), scale


@contextlib.contextmanager
def tap_attention(chunks: Sequence[torch.nn.Module], visit: Visit) -> Iterator[None]:
    """While open, `visit` sees the query and key of every core attention on this rank (after RoPE and QK-norm)."""
    hooks = []
    try:
        for number, core, scale in core_attentions(chunks):

            def hook(module, args, number=number, scale=scale):
                visit(number, args[0], args[1], scale)

            hooks.append(core.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in hooks:
            handle.remove()


@dataclass(frozen=True)
class RowScores:
    """Where some rows of one layer look; all of it [r, n]."""

    best_rn: torch.Tensor
    """Largest score, fp32."""
    position_rn: torch.Tensor
    """Position of the key that has it, the lowest on a tie; int64."""
    lse_rn: torch.Tensor
    """Log-sum-exp of all scores, fp32."""
    lse_span_rn: torch.Tensor
    """Log-sum-exp of the scores inside the span; -inf if no key of the span was seen."""

    @property
    def mass_rn(self) -> torch.Tensor:
        """Share of the attention that lies inside the span; fp32 in [0, 1]."""
        return (self.lse_span_rn - self.lse_rn).exp()


def score_rows(
    query_rnh: torch.Tensor,
    keys: Iterable[tuple[torch.Tensor, int]],
    position_r: torch.Tensor,
    span: tuple[int, int],
    scale: float,
    bend: Bend = PLAIN,
) -> RowScores:
    """Causal attention of query rows at positions `position_r` over stretches (key [t, g, h], first position), in fp32.

    Stretches come in the order of their positions, which may leave gaps; `span` is in positions too. `position_r` is on
    the CPU, the rest wherever the model is.
    """
    rows, heads, _ = query_rnh.shape
    first_row = int(position_r.min())  # read before it goes to the device, which would have to be waited for
    position_r = position_r.to(query_rnh.device)
    found: tuple[torch.Tensor, ...] | None = None
    for stretch_tgh, first in keys:
        for low, high in blocks_of(len(stretch_tgh)):
            start, key_tgh = first + low, stretch_tgh[low:high]
            score_grnt, position_t = block_scores(query_rnh, key_tgh, start, position_r, first_row, scale, bend)
            # Not argmax(): which of equal scores it returns is not defined.
            top = score_grnt.amax(-1)
            where = torch.where(score_grnt == top[..., None], position_t, position_t[-1]).amin(-1)
            low, high = max(span[0] - start, 0), max(span[1] - start, 0)
            base = top.clamp(min=torch.finfo(torch.float32).min)  # a row that sees none of these keys has no largest
            exp_grnt = score_grnt.sub_(base[..., None]).exp_()
            lse, inside = (base + part.sum(-1).log() for part in (exp_grnt, exp_grnt[..., low:high]))
            here = (top, where, lse, inside)
            found = here if found is None else _later(found, here)
    if found is None:  # this context-parallel rank holds none of the keys
        nothing = torch.full((rows, heads), -torch.inf, device=query_rnh.device)
        return RowScores(nothing, torch.zeros_like(nothing, dtype=torch.int64), nothing.clone(), nothing.clone())
    best_rn, position_rn, *lses = (x.permute(1, 0, 2).reshape(rows, heads) for x in found)
    lse_rn, inside_rn = lses
    if bend.sink_n is not None:
        lse_rn = torch.logaddexp(lse_rn, bend.sink_n.float())
    return RowScores(best_rn, position_rn.long(), lse_rn, inside_rn)


def blocks_of(end: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Keys [start, end), so many at a time as are scored together."""
    for low in range(start, end, BLOCK_TOK):
        yield low, min(low + BLOCK_TOK, end)


def block_scores(
    query_rnh: torch.Tensor,
    key_tgh: torch.Tensor,
    start: int,
    position_r: torch.Tensor,
    first_row: int,
    scale: float,
    bend: Bend = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(score [g, r, n / g, t] in fp32, position [t]) of rows and the keys from position `start` on; -inf where a row
    does not see the key.

    `position_r` is where the query is, `first_row` the least of it. The scores are the caller's to change.
    """
    rows, _, width = query_rnh.shape
    count, groups, _ = key_tgh.shape
    query_grh = query_rnh.float().view(rows, groups, -1, width).transpose(0, 1).reshape(groups, -1, width)
    nothing = query_grh.new_empty(())  # the scale goes into the product; beta = 0 keeps this out of it
    score_grt = torch.baddbmm(nothing, query_grh, key_tgh.float().permute(1, 2, 0), beta=0, alpha=scale)
    score_grnt = score_grt.view(groups, rows, -1, count)
    if bend.softcap is not None:
        score_grnt.div_(bend.softcap).tanh_().mul_(bend.softcap)
    position_t = torch.arange(start, start + count, device=query_rnh.device, dtype=torch.int32)
    if start + count - 1 > first_row:
        score_grnt.masked_fill_(position_t > position_r[:, None, None], -torch.inf)
    if bend.visible is not None:
        score_grnt.masked_fill_(~bend.visible(position_r, position_t)[:, None], -torch.inf)
    return score_grnt, position_t


def _later(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Both blocks together; b has the higher positions, so a keeps a tie."""
    position = torch.where(b[0] > a[0], b[1], a[1])
    return torch.maximum(a[0], b[0]), position, torch.logaddexp(a[2], b[2]), torch.logaddexp(a[3], b[3])


def over_context(scores: RowScores, group: dist.ProcessGroup) -> RowScores:
    """The scores over the keys of all context-parallel ranks: one MAX all-reduce of packed int64, one SUM.

    Ranks hold the same rows over different keys. A score and its position are packed so that the largest integer is
    the largest score and, among equals, the lowest position.
    """
    if group.size() == 1:
        return scores
    packed = pack(scores.best_rn, scores.position_rn)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)
    best_rn, position_rn = unpack(packed)
    # no log-sum-exp is more than ln(keys) above the largest score, so these exponentials neither overflow nor vanish
    sums = torch.stack([(scores.lse_rn - best_rn).exp(), (scores.lse_span_rn - best_rn).exp()])
    dist.all_reduce(sums, group=group)
    lse, lse_span = sums.log() + best_rn
    return RowScores(best_rn, position_rn, lse, lse_span)


def pack(score: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """fp32 scores and positions below 2^32 -> int64 in the order (score, lower position first)."""
    bits = (score + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0.0 equal to 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (0xFFFFFFFF - position)


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `pack` packed."""
    ordered, position = packed >> 32, 0xFFFFFFFF - (packed & 0xFFFFFFFF)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(torch.int32).view(torch.float32), position


@contextlib.contextmanager
def zero_heads(
    chunks: Sequence[torch.nn.Module], tp: dist.ProcessGroup, heads: Iterable[tuple[int, int]]
) -> Iterator[None]:
    """While open, the output of these heads (layer, head), counted over the whole model, is zero in every forward."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    hooks = []
    try:
        for number, core, _ in core_attentions(chunks):

            def hook(module, args, out_sbm, number=number):
                here = args[0].shape[2]  # query heads on this rank
                mine = [head - tp.rank() * here for head in by_layer[number] if head // here == tp.rank()]
                out_sbnh = out_sbm.unflatten(-1, (here, -1)).clone()
                out_sbnh[:, :, mine] = 0
                return out_sbnh.flatten(-2)

            if number in by_layer:
                hooks.append(core.register_forward_hook(hook))
        yield
    finally:
        for handle in hooks:
            handle.remove()
