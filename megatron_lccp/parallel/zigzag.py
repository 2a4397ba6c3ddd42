"""How context parallelism cuts a sequence: 2 x CP chunks, of which rank r holds chunk r and chunk 2 CP - 1 - r.

In: a length, a rank, a group. Out: which positions are here, and whole sequences from everybody's parts. Early and
late chunks together give every rank the same amount of causal attention (Megatron-Core: utils.py:1994).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


def local_chunks(length: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Stretches (start, end) of a sequence that this context-parallel rank holds, in the order it holds them."""
    if size == 1:
        return [(0, length)]
    assert length % (2 * size) == 0, (length, size)
    chunk = length // (2 * size)
    return [(k * chunk, (k + 1) * chunk) for k in (rank, 2 * size - 1 - rank)]


def local_positions(length: int, rank: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Positions that this rank holds, [length / size] int64."""
    return torch.cat([torch.arange(start, end, device=device) for start, end in local_chunks(length, rank, size)])


def local_batch(
    batch: dict[str, torch.Tensor], group: dist.ProcessGroup, device: torch.device
) -> dict[str, torch.Tensor]:
    """This rank's part of sequences [b, s] and, as `positions`, where its tokens stand: [b, s / CP] each."""
    b, length = next(iter(batch.values())).shape
    position_s = local_positions(length, group.rank(), group.size(), device)
    parts = {name: torch.as_tensor(value).to(device).index_select(1, position_s) for name, value in batch.items()}
    return parts | {"positions": position_s.expand(b, -1)}


def gather_sequence(part_s: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Everybody's parts [s / CP, ...] -> the whole [s, ...] in order; gradients are summed and scattered back."""
    size = group.size()
    if size == 1:
        return part_s
    by_rank = gather_from_sequence_parallel_region(part_s.contiguous(), group=group)
    length = by_rank.shape[0]
    held = torch.cat([local_positions(length, rank, size, part_s.device) for rank in range(size)])
    return by_rank.index_select(0, torch.argsort(held))
