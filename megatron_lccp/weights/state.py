"""What of a model and its optimizer a checkpoint holds, and how it is put back.

In: model chunks and Megatron-Core's distributed optimizer. Out: a state of ShardedTensors to save or to fill, in one of
two forms. For any layout: model and optimizer state per parameter of the whole model ("fully reshardable"), for which
replicas gather the optimizer's state. For the same layout: the optimizer's state as each rank holds it, nothing
gathered and nothing copied; `slices_digest` says whether a layout is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_lccp.model.build import bare

# `chained_optim_avoid_prefix`: names without the number of optimizers in them, which differs between EP = 1 and EP > 1.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""To be copied: Megatron-Core notes a process group in what it is given, and would take it for the next layout's."""


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The model's tensors, with their places in the whole: of any layout."""
    return {f"model{n}": bare(chunk).sharded_state_dict(metadata=dict(METADATA)) for n, chunk in enumerate(chunks)}


def state_for_any_layout(
    chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, loading: bool
) -> dict[str, Any]:
    """Model and optimizer, per parameter of the whole model; every rank calls it."""
    state = model_state(chunks)
    if optimizer is not None:
        models, state["optimizer"] = dict(state), {}
        for n, part in enumerate(_parts(optimizer)):
            with mock.patch.object(part, "get_parameter_state_dp_zero", partial(_padded_state, part)):
                state["optimizer"][str(n)] = part.sharded_param_state_fully_reshardable(
                    models, is_loading=loading, metadata=dict(METADATA)
                )
    return state


def state_of_this_layout(chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Model as above, and of the optimizer the slices that this rank updates, under names of its own.

    Megatron-Core's `dp_reshardable` is this by buckets. It refuses a bucket of which a rank has padding alone
    (optimizer/distrib_optimizer.py:1899), as small parts of experts have it, and without Transformer Engine and Apex
    cannot be loaded (:1804, 0.16.1); 12 lines do without both.
    """
    state = model_state(chunks)
    state["optimizer"] = {
        f"{number}.{index}.{name}": ShardedTensor.from_rank_offsets(
            f"optimizer.rank{dist.get_rank()}.{number}.{index}.{name}", tensor.detach()
        )
        for number, index, _, own in _slices(optimizer)
        for name, tensor in own.items()
    }
    return state


def slices_digest(optimizer: MegatronOptimizer) -> str:
    """Equal where every rank updates the same slices of the same parameters; every rank calls it."""
    mine = [[number, index, *place] for number, index, place, _ in _slices(optimizer)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return hashlib.sha256(json.dumps(everyone).encode()).hexdigest()


def shards_in(state: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    """Every tensor of a state as it is stored, factories taken apart."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from shards_in({"": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


def make_state(optimizer: MegatronOptimizer) -> None:
    """Have every optimizer allocate its moments, as its first step does; the weights that moves are loaded after."""
    for part in _parts(optimizer):
        part._init_optimizer_states_with_dummy_values()


@torch.no_grad()
def fill_for_any_layout(
    optimizer: MegatronOptimizer, loaded: Mapping[str, Mapping[int, Mapping[str, torch.Tensor]]], updates: int
) -> None:
    """Copy whole-parameter states into this rank's flat slices of them.

    Stands in for load_parameter_state_from_fully_reshardable, which without Transformer Engine and Apex fails on the
    missing `step` (optimizer/distrib_optimizer.py:940), and whose load_state_dict lets all parameters share one `step`
    tensor, so that each update would advance it many times (optimizer/distrib_optimizer.py:845).
    """
    for number, index, (start, end), own in _slices(optimizer):
        for name, whole in loaded[str(number)][index].items():
            own["param" if name == "fp32_param" else name].copy_(whole.flatten()[start:end])
    _set_adam_step(optimizer, updates)


@torch.no_grad()
def fill_of_this_layout(optimizer: MegatronOptimizer, loaded: Mapping[str, torch.Tensor], updates: int) -> None:
    """Copy slices as they were saved into this rank's; what was read in place already is copied onto itself."""
    for number, index, _, own in _slices(optimizer):
        for name, tensor in own.items():
            tensor.copy_(loaded[f"{number}.{index}.{name}"])
    _set_adam_step(optimizer, updates)


def _parts(optimizer: MegatronOptimizer) -> Iterable[DistributedOptimizer]:
    """The optimizers that have parameters: one for the dense part and, with expert parallelism, one for the experts."""
    return (part for part in optimizer.chained_optimizers if not part.is_stub_optimizer)


def _slices(optimizer: MegatronOptimizer) -> Iterator[tuple[int, int, tuple[int, int], dict[str, torch.Tensor]]]:
    """(number of the optimizer, index of the parameter in its buffers, start and end of this rank's slice of the flat
    parameter, FP32 weight and moments of the slice by name), in the order in which Megatron-Core makes states."""
    for number, part in enumerate(_parts(optimizer)):
        ranges = {
            parameter: found["param"]
            for gbuf in part.gbuf_ranges
            for buckets in gbuf.values()
            for bucket in buckets
            for parameter, found in bucket["param_map"].items()
        }
        everything = (p for buffer in part.buffers for p in buffer.param_index_map)
        for index, parameter in enumerate(everything):
            if parameter in ranges:
                own = part._get_main_param_and_optimizer_states(parameter)
                tensors = {name: tensor for name, tensor in own.items() if name != "step"}
                yield number, index, (ranges[parameter].start, ranges[parameter].end), tensors


def _padded_state(part: DistributedOptimizer, *args: Any, **kwargs: Any) -> dict:
    """The gathered state of an optimizer, every bucket of a buffer at its offset there.

    Megatron-Core puts buckets together without the padding at their ends, and then cuts parameters out at places that
    count it (optimizer/distrib_optimizer.py:1041, 1479). With several buckets, which overlap_grad_reduce makes, and
    sizes that need padding (to 128 and to the replicas), moments and FP32 weights would become other parameters'.
    """
    state = type(part).get_parameter_state_dp_zero(part, *args, **kwargs)
    for number, buffer in enumerate(part.buffers):
        (tensors,) = state[number].values()
        for name, joined in tensors.items():
            if isinstance(joined, torch.Tensor):
                padded, start = joined.new_zeros(buffer.numel), 0
                for bucket in buffer.buckets:
                    end = start + bucket.numel_unpadded
                    padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = joined[start:end]
                    start = end
                tensors[name] = padded
    return state


def _set_adam_step(optimizer: MegatronOptimizer, updates: int) -> None:
    """torch's Adam counts per parameter, Apex's and Transformer Engine's per group."""
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(updates))
        for group in part.optimizer.param_groups:
            if "step" in group:
                group["step"] = updates
