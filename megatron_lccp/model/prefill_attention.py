"""Attention of a prefill on a model that knows nothing of prefills: its core attention and RoPE step aside.

In: a model's chunks and, one at a time, the prefill that runs. Out: every token attends to what it would see in its
own sample, in fused kernels, on any layout; and on request, where each head looks from the rows of each question.
Works on any GPTModel with rotary positions: ours, Transformer Engine's, plain Megatron-Core's.

Shapes: s tokens on this context-parallel rank, S of the whole prefill (padded), b batch (1), n query heads and g
key/value heads on this rank, h head width, r rows, t keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_lccp.data.prefills import Prefill, Segment, Tap
from megatron_lccp.model.flash import attend_parts
from megatron_lccp.model.taps import RowScores, core_attentions, over_context, score_rows
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.parallel.zigzag import gather_sequence, local_chunks, local_positions

Look = Callable[[int, Tap, RowScores], None]
"""Called with (layer, tap, where its rows look) on every rank that holds the layer, for its heads.

The rows are those that predict the answer, one for each token; with `questions`, all from the question's first on."""


def why_not_shared(model: torch.nn.Module) -> str | None:
    """Why this rank's part of a model must run each sample on its own; None if prefills can be shared."""
    if type(getattr(model, "rotary_pos_emb", None)) is not RotaryEmbedding:
        return "its positions are not plain RoPE"
    return why_no_rows(model) or why_not_exact(model.config)


def why_not_exact(c: TransformerConfig) -> str | None:
    """Why a token of such a model depends on more than what it sees; None if it does not."""
    if c.num_moe_experts and c.moe_expert_capacity_factor is not None:
        return "moe_expert_capacity_factor drops tokens depending on what else is in the sequence"
    if c.moe_input_jitter_eps or c.moe_router_force_load_balancing:
        return "moe_input_jitter_eps and moe_router_force_load_balancing make routing random"
    if c.fp8 or getattr(c, "fp4", None):
        return "FP8 and FP4 scale a token by what else is in the sequence"
    return None


def why_no_rows(model: torch.nn.Module) -> str | None:
    """Why attention of this rank's part of a model cannot be followed from query and key; None if it can."""
    c = model.config
    if c.multi_latent_attention or c.window_size is not None or c.softmax_type != "vanilla":
        return "its attention is not plain causal attention (latent, windowed or with a sink)"
    if len(list(core_attentions([model]))) < len(model.decoder.layers):
        return "some of its layers have no core attention"
    if getattr(c, "cuda_graph_impl", "none") != "none" or c.enable_cuda_graph:
        return "CUDA graphs replay its attention as it was recorded"
    return None


@dataclass(frozen=True)
class _Running:
    """The prefill in flight, as this rank sees it."""

    prefill: Prefill | None
    length: int
    chunks: list[tuple[int, int]]
    position_s: torch.Tensor

    def stretches(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(first local row, end, first row in the prefill) of what this rank holds of [start, end)."""
        offset = 0
        for low, high in self.chunks:
            a, b = max(start, low), min(end, high)
            if a < b:
                yield offset + a - low, offset + b - low, a
            offset += high - low


class PrefillAttention:
    """While open, the models' attention and RoPE follow the prefill named by `starts`."""

    def __init__(
        self, models: Sequence[torch.nn.Module], groups: Groups, look: Look | None = None, questions: bool = False
    ):
        self._models, self._cp, self._look, self._questions = models, groups.cp, look, questions
        self._running: _Running | None = None
        self._trunk: dict[int, tuple[torch.Tensor, torch.Tensor, _Running]] = {}

    def starts(self, prefill: Prefill | None, length: int, device: torch.device) -> torch.Tensor:
        """The next forward runs this prefill, padded to `length`; returns the rows of it that this rank holds."""
        rank, size = self._cp.rank(), self._cp.size()
        row_s = local_positions(length, rank, size, device)
        position_s = row_s
        if prefill is not None:
            padding = torch.arange(length - len(prefill))
            position_s = torch.cat([torch.as_tensor(prefill.positions), padding]).to(device)[row_s]
        self._running = _Running(prefill, length, local_chunks(length, rank, size), position_s)
        return row_s

    def __enter__(self) -> PrefillAttention:
        for layer, core, scale in list(core_attentions(self._models)):
            core.forward = partial(self._attention, layer, scale, core.forward)
        for model in self._models:
            if isinstance(rope := getattr(model, "rotary_pos_emb", None), RotaryEmbedding):
                rope.forward = partial(self._rope, rope, rope.forward)
        return self

    def __exit__(self, *error: object) -> None:
        for _, core, _ in core_attentions(self._models):
            del core.forward
        for model in self._models:
            with contextlib.suppress(AttributeError):
                del model.rotary_pos_emb.forward
        self._trunk.clear()

    def _rope(self, rope: RotaryEmbedding, original, *args, **kwargs) -> torch.Tensor:
        run = self._running
        if run.prefill is None or run.prefill.is_plain:
            return original(*args, **kwargs)
        return rope.get_emb(int(run.prefill.positions.max()) + run.length - len(run.prefill) + 1)[run.position_s]

    def _attention(self, layer: int, scale: float, original, query_sbnh, key_sbgh, value_sbgh, *args, **kwargs):
        run = self._running
        if run.prefill is not None and run.prefill.keeps_trunk:
            self._trunk[layer] = (_own(key_sbgh), _own(value_sbgh), run)
        if run.prefill is not None and self._look is not None:
            self._look_from(layer, scale, query_sbnh[:, 0], key_sbgh[:, 0])
        if run.prefill is None or run.prefill.is_plain:
            return original(query_sbnh, key_sbgh, value_sbgh, *args, **kwargs)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_sbnh, *self._whole(key_sbgh, value_sbgh)))
        if any(segment.trunk for segment in run.prefill.segments):
            k, v = (x.permute(1, 2, 0, 3) for x in self._whole(*self._trunk[layer][:2]))
        out_bnsh = torch.zeros_like(query)
        for segment in self._segments():
            for low, high, first in run.stretches(segment.start, segment.end):
                seen = [(k[:, :, : segment.trunk], v[:, :, : segment.trunk], False)] if segment.trunk else []
                for a, b, causal in self._parts(segment, first, first + high - low):
                    seen.append((key[:, :, a:b], value[:, :, a:b], causal))
                out_bnsh[:, :, low:high] = attend_parts(query[:, :, low:high], seen, scale)[0]
        s, b, n, h = query_sbnh.shape
        return out_bnsh.permute(2, 0, 1, 3).reshape(s, b, n * h)

    @staticmethod
    def _parts(segment: Segment, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """(first key, end, causal) of what rows [start, end) of a segment see in their own prefill."""
        yield from ((a, b, False) for a, b in segment.here)
        if segment.start < start:
            yield segment.start, start, False
        yield start, end, True

    def _whole(self, key_sbgh: torch.Tensor, value_sbgh: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Key and value of the whole prefill."""
        if self._cp.size() == 1:
            return key_sbgh, value_sbgh
        return gather_sequence(torch.stack([key_sbgh, value_sbgh], dim=1), self._cp).unbind(1)

    def _segments(self) -> Iterator[Segment]:
        """Those of the prefill, and the padding, which sees itself."""
        yield from self._running.prefill.segments
        if len(self._running.prefill) < self._running.length:
            yield Segment(len(self._running.prefill), self._running.length)

    def _look_from(self, layer: int, scale: float, query_snh: torch.Tensor, key_sgh: torch.Tensor) -> None:
        """Score the rows of each tap, up to the one that predicts its last token."""
        run = self._running
        for tap in run.prefill.taps:
            last = tap.end if tap.is_null else tap.end - 1
            first = tap.question if self._questions else tap.answer - 1
            query_rnh = self._rows(query_snh, first, last)
            segment = run.prefill.segments[tap.segment]
            keys = list(self._keys(segment, layer, key_sgh, last))
            position_r = torch.as_tensor(run.prefill.positions[first:last])
            scores = score_rows(query_rnh, keys, position_r, tap.needle, scale)
            self._look(layer, tap, over_context(scores, self._cp))

    def _rows(self, query_snh: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Rows [start, end) of the whole prefill, on every context-parallel rank."""
        if self._cp.size() == 1:
            return query_snh[start:end]
        query_rnh = query_snh.new_zeros(end - start, *query_snh.shape[1:], dtype=torch.float32)
        for low, high, first in self._running.stretches(start, end):
            query_rnh[first - start : first - start + high - low] = query_snh[low:high]
        dist.all_reduce(query_rnh, group=self._cp)
        return query_rnh

    def _keys(self, segment: Segment, layer: int, key_sgh: torch.Tensor, end: int):
        """(stretch of keys [t, g, h], position of its first) of what this rank holds of what the segment sees."""
        if segment.trunk:
            kept_sbgh, _, kept_run = self._trunk[layer]
            for low, high, first in kept_run.stretches(0, segment.trunk):
                yield kept_sbgh[low:high, 0], first
        for start, stop in (*segment.here, (segment.start, end)):
            for low, high, first in self._running.stretches(start, stop):
                yield key_sgh[low:high], int(self._running.prefill.positions[first])


def _own(x: torch.Tensor) -> torch.Tensor:
    """The tensor without what shares its storage: a value is a view of the whole projection, query and key included."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
