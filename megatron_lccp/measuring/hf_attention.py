"""Attention of a prefill on a model of transformers, through the library's attention and mask interfaces.

In: query, key and value of each layer as the model really uses them, and the mask function that it asks for. Out: every
token attends to what it would see in its own sample; and on request, where each head looks. Sliding windows, chunks,
soft caps, sinks, any scaling, and values of another width than keys are heeded in both.

Shapes: b batch (1), n query heads and g key/value heads on this rank, s queries, t keys, h head width, r rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lccp.measuring.attention_rows import AttentionRows, Seen
from megatron_lccp.measuring.prefill_attention import OnRows
from megatron_lccp.measuring.prefills import Prefill
from megatron_lccp.measuring.taps import Bend, score_rows
from megatron_lccp.model.flash import attend_parts, repeated

NAME = "megatron_lccp"
"""Under which attention and mask stand in transformers' registers while a forward is followed."""
QUERY_BLOCK = 512
"""Queries that share one look at a mask."""
KEY_BLOCK = 512
"""Keys of a block that is seen whole, in part or not at all; and keys whose scores stand in memory."""
FLASH_WIDTH = 256
"""Widest head of the fused kernels on a GPU."""


class Unfollowed(ValueError):
    """A layer that attends in a way that is not known here; says why as a clause."""


@dataclass(frozen=True, eq=False)
class Mask:
    """What stands for a mask matrix: the function that makes it, here of positions in the sample."""

    function: Callable[..., torch.Tensor] | None
    """transformers' (batch, head, query, key) -> bool; None: causal."""
    parts: dict[Any, Any] = field(default_factory=dict)
    """By stretches and device: which blocks are seen, worked out once for all layers of this mask."""

    @property
    def is_causal(self) -> bool:
        """Every key up to the query is seen."""
        from transformers import masking_utils

        causal: Any = masking_utils.causal_mask_function
        return self.function is None or self.function is causal

    def visible(self, position_r: torch.Tensor, position_t: torch.Tensor) -> torch.Tensor:
        """[r, t]: which of these keys the queries see."""
        query_r1, key_1t = position_r.long()[:, None], position_t.long()[None]
        if self.is_causal:
            return key_1t <= query_r1
        assert self.function is not None
        first = torch.zeros((), dtype=torch.int64, device=query_r1.device)
        seen = self.function(first, first, query_r1, key_1t)
        return seen.expand(len(position_r), len(position_t))


@dataclass(frozen=True, eq=False)
class _Piece:
    """Key and value of one layer for a prefill."""

    prefill: Prefill
    key_bgth: torch.Tensor
    value_bgth: torch.Tensor

    def owned(self) -> _Piece:
        """Without what shares their storage: they may be views of a whole projection."""
        own = (x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for x in (self.key_bgth, self.value_bgth))
        return _Piece(self.prefill, *own)


@dataclass(frozen=True)
class Called:
    """A layer that asked for attention in a forward."""

    layer: int
    heads: int
    """Query heads on this rank."""
    more: tuple[str, ...]
    """Arguments that it gave beside those that are heeded."""


class HFAttention:
    """While open, a model of transformers follows the prefill named by `starts`."""

    def __init__(self, model: Any, tp: dist.ProcessGroup, alone: dist.ProcessGroup):
        """`tp`: the ranks over which heads may be spread; `alone`: a group of this rank, for head scores."""
        self._model, self._tp, self._alone = model, tp, alone
        self.zeroed: dict[int, list[int]] = {}
        """Heads on this rank whose output is zero, by layer."""
        self.calls: list[Called] = []
        """The layers that asked in the forward in flight, in their order."""
        self._kept: dict[int, list[_Piece]] = {}
        """Of each call, earlier prefills that something still to come sees."""

    @contextlib.contextmanager
    def opened(self, first_head: int = 0, on_rows: OnRows | None = None, questions: bool = False) -> Iterator[None]:
        """Take the model's attention over. `on_rows` as for Megatron's chunks; `first_head`: this rank's first."""
        from transformers import AttentionInterface, AttentionMaskInterface

        self._first_head, self._on_rows, self._questions = first_head, on_rows, questions
        AttentionInterface.register(NAME, self._attention)
        AttentionMaskInterface.register(NAME, lambda *_args, mask_function=None, **_kwargs: Mask(mask_function))
        before = self._model.config._attn_implementation
        self._model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            self._model.set_attn_implementation(before)
            self._kept.clear()

    def starts(self, prefill: Prefill) -> None:
        """The next forward runs this prefill."""
        self._prefill, self.calls = prefill, []
        if prefill.start == 0:
            self._kept.clear()

    def _attention(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any = None,
        scaling: float | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None, **more: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """What a layer calls: (query [b, n, s, h], key [b, g, s, h], value) -> (output [b, s, n, h'], None)."""
        if mask is not None and not isinstance(mask, Mask):
            raise Unfollowed(f"its attention gets a mask of its own ({type(mask).__name__})")
        if key.shape[2] != query.shape[2] or query.shape[2] != len(self._prefill):
            raise Unfollowed("its attention sees other keys than those of the text")
        layer, call = getattr(module, "layer_idx", None), len(self.calls)
        if layer is None:
            raise Unfollowed("its attention does not say which layer it is of (layer_idx)")
        given = tuple(sorted(name for name, x in more.items() if x is not None))
        self.calls.append(Called(layer, query.shape[1], given))
        mask = mask or Mask(None)
        bend = Bend(softcap, None if mask.is_causal else mask.visible, s_aux)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys = _Keys([*self._kept.pop(call, ()), _Piece(self._prefill, key, value)])
        if self._on_rows is not None:
            self._score_rows(self._on_rows, layer, scale, query, keys, bend)
        out = self._attend(query, keys, mask, scale, bend)
        self._kept[call] = [piece.owned() for piece in keys.pieces if piece.prefill.keep_to > self._prefill.end]
        if layer in self.zeroed:
            out[:, self.zeroed[layer]] = 0
        return out.transpose(1, 2).contiguous(), None

    def _attend(self, query: torch.Tensor, keys: _Keys, mask: Mask, scale: float, bend: Bend) -> torch.Tensor:
        """[b, n, s, h']: attention of the prefill in flight."""
        key, value = keys.whole()
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        for low, high, parts in self._parts(keys, mask, query.device):
            cut = ((key[:, :, a:b], value[:, :, a:b], how) for a, b, how in parts)
            out[:, :, low:high] = attend(query[:, :, low:high], cut, scale, bend)
        return out

    def _parts(self, keys: _Keys, mask: Mask, device: torch.device) -> list[tuple[int, int, list[Any]]]:
        """(first query, end, [(first key, end, how)]): what some queries see of the keys.

        how: True for causal, False for all of them, or a mask [s, t].
        """
        if device in mask.parts:
            return mask.parts[device]
        prefill, found = self._prefill, []
        position_t = keys.positions(device)
        own = keys.row(prefill.start)
        for segment in prefill.segments:
            low, high = segment.start - prefill.start, segment.end - prefill.start
            seen = [(keys.row(a), keys.row(a) + b - a) for a, b in segment.sees]
            if mask.is_causal:
                found.append((low, high, [*((a, b, False) for a, b in seen), (own + low, own + high, True)]))
                continue
            for start in range(low, high, QUERY_BLOCK):
                end = min(start + QUERY_BLOCK, high)
                stretches = [*seen, (own + low, own + end)]
                blocks = _seen_blocks(mask, position_t[own + start : own + end], position_t, stretches)
                found.append((start, end, list(blocks)))
        mask.parts[device] = found
        return found

    def _score_rows(
        self, on_rows: OnRows, layer: int, scale: float, query: torch.Tensor, keys: _Keys, bend: Bend
    ) -> None:
        """Score the rows of each tap, up to the one that predicts its last token."""
        prefill = self._prefill
        for tap in prefill.taps:
            last = tap.end if tap.is_null else tap.end - 1
            first = tap.question if self._questions else tap.answer - 1
            held = slice(first - prefill.start, last - prefill.start)
            query_rnh, position_r = query[0, :, held].transpose(0, 1), torch.as_tensor(prefill.positions[held])
            segment = prefill.segment_of(tap)
            seen = list(keys.seen((*segment.sees, (segment.start, last))))
            scores = score_rows(query_rnh, [(k, at) for k, _, at in seen], position_r, tap.needle, scale, bend)
            rows, answer = None, slice(tap.answer - 1 - first, None)  # the last of the question predicts the answer
            if not tap.is_null:
                rows = AttentionRows(
                    layer, tap, query_rnh[answer], position_r[answer], seen, scale, scores.lse_rn[answer],
                    self._first_head, self._alone, bend,
                )  # fmt: skip
            on_rows(layer, tap, scores, rows)


class _Keys:
    """Keys and values of a prefill and of the earlier ones that are kept: places -> rows.

    What was dropped leaves a gap in the places, not in the rows; nothing that is still seen reaches over one.
    """

    def __init__(self, pieces: Sequence[_Piece]):
        self.pieces, self._begins, at = pieces, {}, 0
        for piece in pieces:
            self._begins[piece.prefill.start] = at
            at += len(piece.prefill)

    def row(self, place: int) -> int:
        """Where a place stands among the rows."""
        start = max(start for start in self._begins if start <= place)
        return self._begins[start] + place - start

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(key, value) of all rows."""
        if len(self.pieces) == 1:
            return self.pieces[0].key_bgth, self.pieces[0].value_bgth
        keys, values = zip(*((piece.key_bgth, piece.value_bgth) for piece in self.pieces))
        return torch.cat(keys, 2), torch.cat(values, 2)

    def positions(self, device: torch.device) -> torch.Tensor:
        """[t]: position of every row in its sample."""
        return torch.cat([torch.as_tensor(piece.prefill.positions) for piece in self.pieces]).to(device)

    def seen(self, stretches: Iterable[tuple[int, int]]) -> Iterator[Seen]:
        """(keys [t, g, h], values, first position) of some stretches of places."""
        for start, end in stretches:
            for piece in self.pieces:
                prefill = piece.prefill
                a, b = max(start, prefill.start) - prefill.start, min(end, prefill.end) - prefill.start
                if a < b:
                    key, value = (x[0, :, a:b].transpose(0, 1) for x in (piece.key_bgth, piece.value_bgth))
                    yield key, value, int(prefill.positions[a])


def _seen_blocks(
    mask: Mask, position_r: torch.Tensor, position_t: torch.Tensor, stretches: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, Any]]:
    """(first key, end, how) of the blocks of keys that some of the queries see; neighbours seen whole are one."""
    whole: tuple[int, int] | None = None
    for start, end in stretches:
        for low in range(start, end, KEY_BLOCK):
            high = min(low + KEY_BLOCK, end)
            seen_rt = mask.visible(position_r, position_t[low:high])
            if bool(seen_rt.all()):
                if whole is not None and whole[1] != low:
                    yield *whole, False
                    whole = None
                whole = (whole[0] if whole else low, high)
            elif bool(seen_rt.any()):
                yield low, high, seen_rt
    if whole is not None:
        yield *whole, False


def attend(query: torch.Tensor, parts: Iterable[tuple[torch.Tensor, torch.Tensor, Any]], scale: float, bend: Bend):
    """[b, n, s, h']: attention over the union of parts (key, value, how), bent as the layer bends it."""
    found: tuple[torch.Tensor, torch.Tensor] | None = None
    for part in parts:
        for out, lse in _one_part(query, *part, scale, bend):
            found = (out.float(), lse) if found is None else _both(*found, out, lse)
    assert found is not None, "no keys to attend to"
    out, lse = found
    if bend.sink_n is not None:
        out = out * (lse - torch.logaddexp(lse, bend.sink_n.float()[:, None])).exp()[..., None]
    return out.to(query.dtype)


def _one_part(query, key, value, how: Any, scale: float, bend: Bend) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(output, log-sum-exp) over a part, by a fused kernel where one can, else over some of its keys at a time."""
    width = max(query.shape[-1], value.shape[-1])
    fits = not query.is_cuda or width <= FLASH_WIDTH
    if isinstance(how, bool) and bend.softcap is None and fits:
        wide = -(-width // 8) * 8 if query.is_cuda else width  # what the kernels on a GPU take; zeroes change nothing
        q, k, v = (F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x for x in (query, key, value))
        out, lse = attend_parts(q, [(k, v, how)], scale)
        yield out[..., : value.shape[-1]], lse
        return
    count, heads = query.shape[2], query.shape[1]
    for low in range(0, key.shape[2], KEY_BLOCK):
        k, v = (repeated(x[:, :, low : low + KEY_BLOCK], heads) for x in (key, value))
        first = low if how is True else 0  # of the queries: those before it see none of these keys
        score = (query[:, :, first:] @ k.transpose(2, 3)).float() * scale
        if bend.softcap is not None:
            score = bend.softcap * torch.tanh(score / bend.softcap)
        if how is True:
            place = torch.arange(count, device=query.device)
            score.masked_fill_(place[low : low + k.shape[2]] > place[first:, None], -torch.inf)
        elif how is not False:
            score.masked_fill_(~how[:, low : low + k.shape[2]], -torch.inf)
        lse = score.logsumexp(-1)
        weight = (score - lse.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp()
        out = weight.to(v.dtype) @ v
        yield F.pad(out, (0, 0, first, 0)), F.pad(lse, (first, 0), value=-torch.inf)


def _both(a, lse_a, b, lse_b) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two disjoint sets of keys; a row may see none of either."""
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.clamp(min=torch.finfo(torch.float32).min)
    return a * (lse_a - base).exp()[..., None] + b * (lse_b - base).exp()[..., None], lse
