"""Whole models in one safetensors file, read into any layout.

In: the chunks of a model and a file. Out: each rank's shards filled from the file, or the file written. Tensors carry
the names and global shapes of Megatron-Core's sharded state dict, so a slice of the file is a shard of any layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_lccp.files import write_whole
from megatron_lccp.model.build import bare
from megatron_lccp.model.vocabulary import vocabulary_of
from megatron_lccp.parallel.gather import agreed
from megatron_lccp.weights.fit import check_fit, require_numbers
from megatron_lccp.weights.streams import about_in, whole_header


def model_shards(chunks: Sequence[torch.nn.Module]) -> Iterator[ShardedTensor]:
    """Every parameter shard of this rank with its place in the whole; the data are views of the parameters."""
    for chunk in chunks:
        state = bare(chunk).sharded_state_dict()
        apply_factories(state)
        for value in nested_values(state):
            assert not isinstance(value, ShardedTensorFactory)
            if isinstance(value, ShardedTensor):
                yield value


def save_whole(chunks: Sequence[torch.nn.Module], path: str | Path, about: dict[str, str]) -> None:
    """Write the model of a single rank, whole or not at all; `about` goes into the header.

    Weights are written as bfloat16; a router's bias, which is no weight, stays FP32 (build.py: in_precision).
    """
    if dist.get_world_size() != 1:
        raise ValueError(f"{path}: a whole model is written by one rank; load the checkpoint on one rank first")
    whole: dict[str, torch.Tensor] = {}
    for shard in model_shards(chunks):
        dtype = torch.float32 if shard.key.endswith("router.expert_bias") else torch.bfloat16
        tensor = whole.setdefault(shard.key, torch.zeros(shard.global_shape, dtype=dtype))
        tensor[_place(shard)] = shard.data.detach().to("cpu", dtype).view(tensor[_place(shard)].shape)
    write_whole(Path(path), lambda draft: save_file(whole, draft, metadata=whole_header(about)))


@torch.no_grad()
def load_whole(chunks: Sequence[torch.nn.Module], path: str | Path) -> dict[str, str]:
    """Fill this rank's shards from a file of `save_whole`; returns its `about`. Every rank calls it.

    ValueError, on all ranks, names what cannot be read, does not fit or is no number.
    """
    shards = list(model_shards(chunks))
    with agreed():
        about, shapes = read_header(path), shapes_in(path)
    check_fit(path, shapes, shards, vocabulary_of(bare(chunks[0])))
    with agreed(), _opened(path) as file:
        for shard in shards:
            whole, place = file.get_slice(shard.key), _place(shard)
            if place[0].stop <= (rows := whole.get_shape()[0]):
                shard.data.copy_(whole[place].view(shard.data.shape))
            else:  # of a vocabulary with less padding
                shard.data.zero_()
                if (there := max(rows - place[0].start, 0)) > 0:
                    shard.data[:there] = whole[(slice(place[0].start, rows), *place[1:])]
    require_numbers(path, shards)
    return about


def read_header(path: str | Path) -> dict[str, str]:
    """The `about` of a file of `save_whole`. Raises ValueError if it is none, or of a newer format."""
    with _opened(path) as file:
        return about_in(path, file.metadata() or {})


def shapes_in(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file by name. Raises ValueError if it is none."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error


def _place(shard: ShardedTensor) -> tuple[slice, ...]:
    """Where a shard lies in the whole tensor; prepended axes (layer, expert) have one element."""
    sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return tuple(slice(start, start + size) for start, size in zip(shard.global_offset, sizes))
