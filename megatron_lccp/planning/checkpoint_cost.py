"""What checkpoints take: bytes on disk, host memory while one is written behind the training's back, seconds.

In: a model as it is laid out, the precision of its weights, the speed of the storage. Out: plain values for `lccp plan`.
Nothing is imported from torch or Megatron; tests/functional/test_resume.py compares the bytes with a real save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lccp.planning.memory import Sizes, place_of, stage_buffers, total_parameters

STATE_BYTES = 12
"""Of each parameter the optimizer's state has an FP32 weight and two FP32 moments, whatever the weights are in."""
NODE = 8
"""Ranks that share a host's memory."""


@dataclass(frozen=True)
class CheckpointCost:
    """Of one checkpoint."""

    bytes: int
    """On disk: every tensor once. Descriptions of them come on top: some kilobytes for each."""
    host_bytes: int
    """Of the rank that holds most, in host memory while it is written behind the training's back."""
    host_bytes_at_once: int
    """The same, for the moment in which it is put together."""
    node_bytes_at_once: int
    """The same, of the eight ranks of a node that hold most."""
    read_bytes: int
    """What all ranks read when they go on from it: every file for its SHA-256, and each rank what it asks for."""

    def as_dict(self, storage_gbps: float | None) -> dict[str, Any]:
        """With seconds, if the storage takes so many gigabytes (1e9 bytes) a second from all ranks together."""
        found: dict[str, Any] = dict(vars(self))
        if storage_gbps is not None:
            speed = storage_gbps * 1e9
            found |= {"save_s": self.bytes / speed, "load_s": self.read_bytes / speed}
        return found


def checkpoint_costs(sizes: Sizes, ranks: int, ddp: Mapping[str, Any], value_bytes: int) -> dict[str, CheckpointCost]:
    """A checkpoint for any layout, and one for the same layout alone (checkpoint.any_layout_every), by name.

    Of the weights, one replica writes its shard. For any layout the optimizer's state is gathered on every replica, and
    one writes it; when it is loaded, every rank reads the whole state of its shard, of which it keeps its part.
    """
    total, _ = total_parameters(sizes.shape, sizes.vocab_rows)
    biases = sum(
        part.numel for layer in range(sizes.shape.layers) for part in sizes.shape.parts(layer) if not part.trained
    )
    weights = total * value_bytes + 4 * biases
    stages = [stage_buffers(sizes, stage, ranks, ddp) for stage in range(sizes.layout.pipeline)]
    held, once, kept, own, own_once = [0] * ranks, [0] * ranks, [0] * ranks, [0] * ranks, 0
    for rank in range(ranks):
        place = place_of(rank, sizes, ranks)
        for buffer, expert in stages[place.stage]:
            replica = place.expert if expert else place.dense
            here = sum(end - start for start, end, _ in buffer.spans)
            state = STATE_BYTES * buffer.owned(replica)
            own_once += state
            held[rank] += here
            once[rank] += STATE_BYTES * buffer.numel
            own[rank] += state
            if replica == 0:
                kept[rank] += (value_bytes + STATE_BYTES) * here
                own[rank] += value_bytes * here
    at_once = [a + b for a, b in zip(once, kept)]
    any_layout = CheckpointCost(
        bytes=weights + STATE_BYTES * total,
        host_bytes=max(kept),
        host_bytes_at_once=max(at_once),
        node_bytes_at_once=_worst_node(at_once),
        read_bytes=weights + STATE_BYTES * total + (value_bytes + STATE_BYTES) * sum(held),
    )
    same_layout = CheckpointCost(
        bytes=weights + own_once,
        host_bytes=max(own),
        host_bytes_at_once=max(own),
        node_bytes_at_once=_worst_node(own),
        read_bytes=weights + 2 * own_once + value_bytes * sum(held),
    )
    return {"any_layout": any_layout, "same_layout": same_layout}


def _worst_node(by_rank: list[int]) -> int:
    return max(sum(by_rank[first : first + NODE]) for first in range(0, len(by_rank), NODE))
