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
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_lccp.measuring.attention_rows import AttentionRows, Seen
from megatron_lccp.measuring.prefills import Prefill, Stretch, Tap
from megatron_lccp.measuring.taps import RowScores, core_attentions, over_context, score_rows
from megatron_lccp.model.flash import attend_parts
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.parallel.zigzag import gather_sequence, local_chunks, local_positions

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

OnRows = Callable[[int, Tap, RowScores, AttentionRows | None], None]
"""Called with (layer, tap, where its rows look, rows) on every rank that holds the layer, for its heads.

Scored are the rows that predict the answer, one for each token; with `questions`, all from the question's first on.
`rows` are those that predict the answer, with what they see; None for a question that has no answer."""


def why_not_shared(models: Sequence[GPTModel]) -> str | None:
    """Why this rank's chunks of a model must run each sample on its own; None if prefills can be shared."""
    if any(type(getattr(model, "rotary_pos_emb", None)) is not RotaryEmbedding for model in models):
        return "its positions are not plain RoPE"
    return why_no_rows(models) or why_not_exact(models[0].config)


def why_not_exact(c: TransformerConfig) -> str | None:
    """Why a token of such a model depends on more than what it sees; None if it does not."""
    if c.num_moe_experts and c.moe_expert_capacity_factor is not None:
        return "moe_expert_capacity_factor drops tokens depending on what else is in the sequence"
    if c.moe_input_jitter_eps or c.moe_router_force_load_balancing:
        return "moe_input_jitter_eps and moe_router_force_load_balancing make routing random"
    if c.fp8 or c.fp4:
        return "FP8 and FP4 scale a token by what else is in the sequence"
    return None


def why_no_rows(models: Sequence[GPTModel]) -> str | None:
    """Why attention of this rank's chunks of a model cannot be followed from query and key; None if it can."""
    c = models[0].config
    if c.multi_latent_attention or c.window_size is not None or c.softmax_type != "vanilla":
        return "its attention is not plain causal attention (latent, windowed or with a sink)"
    if len(list(core_attentions(models))) < sum(len(model.decoder.layers) for model in models):
        return "some of its layers have no core attention"
    if c.cuda_graph_impl != "none":  # what older fields ask for is in it too
        return "CUDA graphs replay its attention as it was recorded"
    return None


@dataclass(frozen=True)
class _Running:
    """The prefill in flight, as this rank sees it."""

    prefill: Prefill
    chunks: list[tuple[int, int]]
    position_s: torch.Tensor

    def stretches(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(first local row, end, place of the first) of what this rank holds of the places [start, end)."""
        offset = 0
        for low, high in self.chunks:
            low, high = low + self.prefill.start, high + self.prefill.start
            a, b = max(start, low), min(end, high)
            if a < b:
                yield offset + a - low, offset + b - low, a
            offset += high - low


@dataclass(frozen=True)
class _Piece:
    """Key and value of one layer for a prefill, this rank's rows."""

    run: _Running
    key_sbgh: torch.Tensor
    value_sbgh: torch.Tensor

    def owned(self) -> _Piece:
        """Without what shares their storage: a value is a view of the whole projection, query and key included."""
        own = (x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for x in (self.key_sbgh, self.value_sbgh))
        return _Piece(self.run, *own)


@contextlib.contextmanager
def forward_of(module: torch.nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """While open, the module runs this; afterwards its class's forward, or what others had put in its place."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class PrefillAttention:
    """While open, the models' attention and RoPE follow the prefill named by `starts`."""

    def __init__(
        self, models: Sequence[GPTModel], groups: Groups, on_rows: OnRows | None = None, questions: bool = False
    ):
        self._models, self._groups, self._cp = models, groups, groups.cp
        self._on_rows, self._questions = on_rows, questions
        self._running: _Running | None = None
        """None: the forward has nothing to measure, and runs as it is."""
        self._kept: dict[int, list[_Piece]] = {}
        """Of each layer, earlier prefills that something still to come sees."""

    def starts(self, prefill: Prefill | None, length: int, device: torch.device) -> torch.Tensor:
        """The next forward runs this prefill, padded to `length`; returns the rows of it that this rank holds."""
        rank, size = self._cp.rank(), self._cp.size()
        row_s = local_positions((0, length), rank, size, device)
        self._running = None
        if prefill is not None:
            padding = np.full(length - len(prefill), prefill.positions[-1])
            position_s = torch.as_tensor(np.concatenate([prefill.positions, padding])).to(device)[row_s]
            self._running = _Running(prefill, local_chunks((0, length), rank, size), position_s)
        return row_s

    def __enter__(self) -> PrefillAttention:
        self._undo = contextlib.ExitStack()
        for layer, core, scale in core_attentions(self._models):
            self._undo.enter_context(forward_of(core, partial(self._attention, layer, scale, core.forward)))
        for model in self._models:
            if isinstance(rope := getattr(model, "rotary_pos_emb", None), RotaryEmbedding):
                self._undo.enter_context(forward_of(rope, partial(self._rope, rope, rope.forward)))
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _rope(self, rope: RotaryEmbedding, original, *args, **kwargs) -> torch.Tensor:
        run = self._running
        if run is None or run.prefill.is_plain:
            return original(*args, **kwargs)
        first, last = int(run.prefill.positions.min()), int(run.prefill.positions.max())
        return rope.get_emb(last + 1 - first, first)[run.position_s - first]

    def _attention(self, layer: int, scale: float, original, query_sbnh, key_sbgh, value_sbgh, *args, **kwargs):
        run = self._running
        if run is None:
            return original(query_sbnh, key_sbgh, value_sbgh, *args, **kwargs)
        pieces = [*self._kept.pop(layer, ()), _Piece(run, key_sbgh, value_sbgh)]
        if self._on_rows is not None:
            self._score_rows(self._on_rows, layer, scale, query_sbnh[:, 0], pieces)
        if run.prefill.is_plain:
            out_sbm = original(query_sbnh, key_sbgh, value_sbgh, *args, **kwargs)
        else:
            out_sbm = self._attend(query_sbnh, pieces, scale)
        self._kept[layer] = [piece.owned() for piece in pieces if piece.run.prefill.keep_to > run.prefill.end]
        return out_sbm

    def _attend(self, query_sbnh: torch.Tensor, pieces: Sequence[_Piece], scale: float) -> torch.Tensor:
        """Attention of the prefill in flight, the last of the pieces: [s, b, n * h]; zero where it is padded."""
        run, query = pieces[-1].run, query_sbnh.permute(1, 2, 0, 3)
        key, value, row = self._whole(pieces)
        out_bnsh = torch.zeros_like(query)
        for segment in run.prefill.segments:
            for low, high, first in run.stretches(segment.start, segment.end):
                own = [(segment.start, first, False)] * (segment.start < first) + [(first, first + high - low, True)]
                seen = [(*stretch, False) for stretch in segment.sees] + own
                rows = ((row(start), row(start) + end - start, causal) for start, end, causal in seen)
                parts = ((key[:, :, a:b], value[:, :, a:b], causal) for a, b, causal in rows)
                out_bnsh[:, :, low:high] = attend_parts(query[:, :, low:high], parts, scale)[0]
        return out_bnsh.permute(2, 0, 1, 3).flatten(2)

    def _whole(self, pieces: Sequence[_Piece]) -> tuple[torch.Tensor, torch.Tensor, Callable[[int], int]]:
        """(key [b, g, t, h], value, place -> row) of all pieces and all context-parallel ranks.

        What was dropped leaves a gap in the places, not in the rows; nothing that is still seen reaches over one.
        """
        keys, values, begins, at = [], [], {}, 0
        for piece in pieces:
            key, value = piece.key_sbgh, piece.value_sbgh
            if self._cp.size() > 1:
                key, value = gather_sequence(torch.stack([key, value], dim=1), self._cp).unbind(1)
            rows = len(piece.run.prefill)  # without padding, which nothing sees
            keys.append(key[:rows].permute(1, 2, 0, 3))
            values.append(value[:rows].permute(1, 2, 0, 3))
            begins[piece.run.prefill.start] = at
            at += rows

        def row(place: int) -> int:
            start = max(start for start in begins if start <= place)
            return begins[start] + place - start

        key, value = (torch.cat(x, 2) if len(x) > 1 else x[0] for x in (keys, values))
        return key, value, row

    def _score_rows(
        self, on_rows: OnRows, layer: int, scale: float, query_snh: torch.Tensor, pieces: Sequence[_Piece]
    ) -> None:
        """Score the rows of each tap, up to the one that predicts its last token."""
        run = pieces[-1].run
        prefill = run.prefill
        for tap in prefill.taps:
            last = tap.end if tap.is_null else tap.end - 1
            first = tap.question if self._questions else tap.answer - 1
            query_rnh = self._rows(run, query_snh, first, last)
            segment = prefill.segment_of(tap)
            seen = list(self._seen(pieces, (*segment.sees, (segment.start, last))))
            position_r = torch.as_tensor(prefill.positions[first - prefill.start : last - prefill.start])
            keys = [(key_tgh, position) for key_tgh, _, position in seen]
            scores = over_context(score_rows(query_rnh, keys, position_r, tap.needle, scale), self._cp)
            rows, answer = None, slice(tap.answer - 1 - first, None)  # the last of the question predicts the answer
            if not tap.is_null:
                rows = AttentionRows(
                    layer, tap, query_rnh[answer], position_r[answer], seen, scale, scores.lse_rn[answer],
                    self._groups.tp.rank() * query_rnh.shape[1], self._cp,
                )  # fmt: skip
            on_rows(layer, tap, scores, rows)

    def _rows(self, run: _Running, query_snh: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Rows of the places [start, end), all in the prefill that runs, on every context-parallel rank."""
        if self._cp.size() == 1:
            return query_snh[start - run.prefill.start : end - run.prefill.start]
        query_rnh = query_snh.new_zeros(end - start, *query_snh.shape[1:], dtype=torch.float32)
        for low, high, first in run.stretches(start, end):
            query_rnh[first - start : first - start + high - low] = query_snh[low:high]
        dist.all_reduce(query_rnh, group=self._cp)
        return query_rnh

    @staticmethod
    def _seen(pieces: Sequence[_Piece], seen: Sequence[Stretch]) -> Iterator[Seen]:
        """What this rank holds of some stretches."""
        for start, end in seen:
            for piece in pieces:
                prefill = piece.run.prefill
                for low, high, first in piece.run.stretches(start, min(end, prefill.end)):
                    position = int(prefill.positions[first - prefill.start])
                    yield piece.key_sbgh[low:high, 0], piece.value_sbgh[low:high, 0], position
