"""How context parallelism cuts documents: each into 2 x CP chunks, of which rank r holds chunk r and chunk 2 CP - 1 - r.

In: where documents begin in a sequence, a rank, a group. Out: which positions are here, and whole sequences from
everybody's parts. Early and late chunks together give every rank the same amount of causal attention (Megatron-Core:
utils.py:1994), within each document: so it does where attention ends at documents, which is how Transformer Engine cuts
packed sequences too. A sequence without such ends is one document.

`bounds` are the places where the documents of a sequence begin, from 0, and the end of the last one: documents + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

BOUNDS = "bounds"
"""Key of a batch whose attention ends at documents: their bounds, the same for all of its tensors, which have b = 1."""


def local_chunks(bounds: Sequence[int], rank: int, size: int) -> list[tuple[int, int]]:
    """Stretches (start, end) of a sequence that this context-parallel rank holds, in the order it holds them."""
    if size == 1:
        return list(pairwise(bounds))
    chunks = []
    for start, end in pairwise(bounds):
        assert (end - start) % (2 * size) == 0, (start, end, size)
        chunk = (end - start) // (2 * size)
        chunks += [(start + k * chunk, start + (k + 1) * chunk) for k in (rank, 2 * size - 1 - rank)]
    return chunks


def local_positions(bounds: Sequence[int], rank: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Positions that this rank holds, [length / size] int64."""
    if size == 1:
        return torch.arange(bounds[-1], device=device)
    return torch.cat([torch.arange(start, end) for start, end in local_chunks(bounds, rank, size)]).to(device)


def local_batch(batch: Mapping[str, Any], group: dist.ProcessGroup, device: torch.device) -> dict[str, Any]:
    """This rank's part of sequences [b, s] and, as `positions`, where its tokens stand: [b, s / CP] each."""
    tensors = {name: value for name, value in batch.items() if name != BOUNDS}
    b, length = next(iter(tensors.values())).shape
    bounds = batch.get(BOUNDS, (0, length))
    position_s = local_positions(bounds, group.rank(), group.size(), device)
    parts: dict[str, Any] = {
        name: torch.as_tensor(value).to(device).index_select(1, position_s) for name, value in tensors.items()
    }
    return parts | {"positions": position_s.expand(b, -1)} | ({BOUNDS: bounds} if BOUNDS in batch else {})


def gather_sequence(
    part_s: torch.Tensor, group: dist.ProcessGroup, bounds: Sequence[int] | None = None
) -> torch.Tensor:
    """Everybody's parts [s / CP, ...] -> the whole [s, ...] in order; gradients are summed and scattered back."""
    size = group.size()
    if size == 1:
        return part_s
    by_rank = gather_from_sequence_parallel_region(part_s.contiguous(), group=group)
    bounds = bounds or (0, by_rank.shape[0])
    held = torch.cat([local_positions(bounds, rank, size) for rank in range(size)]).to(part_s.device)
    return by_rank.index_select(0, torch.argsort(held))
