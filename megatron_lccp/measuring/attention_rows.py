"""The query rows of one layer that predict an answer, and the keys and values that they see: what a head score gets.

In: rows of this rank's heads, and the stretches of keys and values that this rank holds. Out: attention weights a block
at a time, and sums over the keys of all ranks. No S x S tensor: memory is O(rows x heads x block).

Shapes: r rows, n query heads and g key/value heads on this rank, h head width, t keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lccp.measuring.prefills import Tap
from megatron_lccp.measuring.taps import PLAIN, Bend, block_scores, blocks_of

Seen = tuple[torch.Tensor, torch.Tensor, int]
"""A stretch: (keys [t, g, h], values [t, g, h], position of the first of them in the sample)."""


@dataclass(frozen=True)
class KeyBlock:
    """Attention of all rows to some consecutive keys."""

    score_rnt: torch.Tensor
    """Scaled product of query and key, fp32; -inf where a row does not see the key."""
    weight_rnt: torch.Tensor
    """Share of the row's attention, fp32: over the keys of all ranks it sums to 1, less what a sink takes."""
    value_tgh: torch.Tensor
    """Values; n / g query heads after another share one."""
    position_t: torch.Tensor
    """Position of each key in the sample, int32."""


@dataclass(frozen=True)
class AttentionRows:
    """The rows of one layer that predict the answer of one or several equal samples, for this rank's heads.

    All context-parallel ranks have the same rows and call the same functions, each with the keys that it holds; some
    hold none. Tensor-parallel ranks have different heads.
    """

    layer: int
    """From 0 in the whole model."""
    tap: Tap
    """Says which samples these are (`samples`), and where their needle stands (`needle`, positions in the sample)."""
    query_rnh: torch.Tensor
    """Query after RoPE and QK-norm."""
    position_r: torch.Tensor
    """Position of each row in the sample, on the CPU."""
    stretches: Sequence[Seen]
    """Keys and values of this rank, in the order of their positions, which may leave gaps."""
    scale: float
    """Softmax scale."""
    lse_rn: torch.Tensor
    """Log-sum-exp of the scores over the keys of all ranks, and of a sink, fp32."""
    first_head: int
    """Number of the first of these heads in the layer of the whole model."""
    context: dist.ProcessGroup
    """The ranks that the keys are spread over."""
    bend: Bend = PLAIN
    """Windows, soft caps and sinks of the layer; `blocks` and `output` heed them."""

    def blocks(self, span: tuple[int, int] | None = None) -> Iterator[KeyBlock]:
        """Attention to this rank's keys, some at a time; only to those at positions in `span`, if it is given."""
        first_row, position_r = int(self.position_r.min()), self.position_r.to(self.query_rnh.device)
        for key_tgh, value_tgh, first in self.stretches:
            low, high = span or (first, first + len(key_tgh))
            for start, end in blocks_of(min(high - first, len(key_tgh)), max(low - first, 0)):
                score_grnt, position_t = block_scores(
                    self.query_rnh, key_tgh[start:end], first + start, position_r, first_row, self.scale, self.bend
                )
                score_rnt = score_grnt.transpose(0, 1).flatten(1, 2)
                weight_rnt = (score_rnt - self.lse_rn[..., None]).exp()
                yield KeyBlock(score_rnt, weight_rnt, value_tgh[start:end], position_t)

    def over_context(self, sum_: torch.Tensor) -> torch.Tensor:
        """The sum over all context-parallel ranks of what each summed over its own keys; every one of them calls it."""
        if self.context.size() > 1:
            dist.all_reduce(sum_, group=self.context)
        return sum_

    def output(self, span: tuple[int, int] | None = None) -> torch.Tensor:
        """What the heads put out from the keys at positions in `span` (None: from all): sum of weight x value.

        [r, n, h], fp32 (h: width of a value), over the keys of all ranks; every context-parallel rank calls it.
        """
        width = self.stretches[0][1].shape[-1] if self.stretches else self.query_rnh.shape[-1]
        out_rnh = self.query_rnh.new_zeros(*self.query_rnh.shape[:2], width, dtype=torch.float32)
        for block in self.blocks(span):
            weight_rgnt = block.weight_rnt.unflatten(1, (block.value_tgh.shape[1], -1))
            out_rgnh = torch.einsum("rgnt,tgh->rgnh", weight_rgnt, block.value_tgh.float())
            out_rnh += out_rgnh.flatten(1, 2)
        return self.over_context(out_rnh)
