"""What Megatron-Core really builds for ranks that do not exist: fake process groups and meta tensors, in one process.

Like jobs.py, each function returns plain values. Run each in a process of its own (`run_ranks(1, ...)`): it replaces
collectives and never gives them back.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lccp.config.load import parse_config
from megatron_lccp.config.tree import Config
from megatron_lccp.parallel import compat, cpu
from megatron_lccp.parallel.groups import Groups, make_groups


class _MetaTypes(TorchFunctionMode):
    """`.type()` of a meta tensor reads like that of a CUDA tensor, which the distributed optimizer asks for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str) and args[0].is_meta:
            return {torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float32: "torch.cuda.FloatTensor"}[args[0].dtype]
        return result


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    from megatron_lccp.model.build import _Nowhere

    with torch.device("meta"), _Nowhere(), _MetaTypes():
        yield


def built_ranks(
    path: Path, overrides: Sequence[str], world: int, numbers: Sequence[int], vocab_size: int
) -> dict[int, dict[str, Any]]:
    """Rank -> what is there on that rank of `world`: see `_built`."""
    compat.quiet()
    cpu.install()
    compat.apply()
    torch.set_num_threads(1)
    config = parse_config(path, overrides)
    if config.training.precision == "auto":
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="bf16"))

    def gather(found: list, mine: object, group: object = None) -> None:
        found[:] = [mine] * len(found)  # all ranks of a fake job have the parameter groups of this one

    dist.all_gather_object = gather
    return {rank: _built_on(config, world, rank, vocab_size) for rank in numbers}


def _built_on(config: Config, world: int, rank: int, vocab_size: int) -> dict[str, Any]:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    return _built(config, make_groups(config.parallel, torch.device("meta"), config.seed), vocab_size)


def _built(config: Config, groups: Groups, vocab_size: int) -> dict[str, Any]:
    """Parameters by name and size, bytes of their buffers and of the optimizer, as allocated on meta tensors."""
    from megatron_lccp.model.build import build_without_memory, wrap_for_training
    from megatron_lccp.model.families import family_of
    from megatron_lccp.training.optimizer import make_optimizer

    chunks = build_without_memory(config, family_of(config.model.family), vocab_size, groups)
    named = [
        [
            (
                name,
                parameter.numel(),
                not getattr(parameter, "allreduce", True),
                getattr(parameter, "shared_embedding", False),
            )
            for name, parameter in chunk.named_parameters()
        ]
        for chunk in chunks
    ]
    with _without_memory():
        wrapped = wrap_for_training(chunks, config, groups)
        optimizer = make_optimizer(wrapped, config, groups)
        state = [_state_bytes(part) for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return {
        "pp_rank": groups.pp.rank(),
        "named": named,
        "weights_bytes": sum(buffer.param_data.nbytes for buffer in buffers),
        "gradients_bytes": sum(buffer.grad_data.nbytes for buffer in buffers),
        "buckets": [buffer.bucket_indices for buffer in buffers],
        "optimizer_bytes": sum(state),
        "device": {buffer.param_data.device.type for buffer in buffers},
    }


def _state_bytes(part: Any) -> int:
    """Bytes of FP32 masters and moments that this part of the optimizer holds; its step counters are left out."""
    if part.is_stub_optimizer:
        return 0
    part.init_state_fn(part.optimizer, part.config)
    masters = [t for group in part.shard_fp32_from_float16_groups for t in group]
    moments = [
        t
        for state in part.optimizer.state.values()
        for name, t in state.items()
        if torch.is_tensor(t) and name != "step"
    ]
    return sum(t.numel() * t.element_size() for t in [*masters, *moments])


def saved_by_layers(path: Path, overrides: Sequence[str], vocab_size: int, length_tok: int) -> float:
    """Bytes that the layers keep of one sequence until their backward, on this CPU rank.

    RMSNorm keeps its input alone, as its fused CUDA kernel does; PyTorch's CPU version keeps FP32 copies too.
    """
    from megatron.core.transformer.module import Float16Module

    from megatron_lccp.model.build import build_chunks
    from megatron_lccp.model.families import family_of
    from megatron_lccp.model.norm import RMSNorm
    from megatron_lccp.parallel.groups import start_ranks

    device = start_ranks(timeout_s=60)
    config = parse_config(path, [*overrides, "--training.precision=bf16"])
    groups = make_groups(config.parallel, device, config.seed)
    (chunk,) = build_chunks(config, family_of(config.model.family), vocab_size, groups)
    RMSNorm.forward = lambda self, x: _FusedNorm.apply(x, self.weight)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    length = length_tok // groups.tp.size()  # of a part of the sequence
    hidden = torch.randn(length, 1, chunk.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotary = chunk.rotary_pos_emb(length_tok)
    parameters.add(rotary.untyped_storage().data_ptr())  # one for all layers
    Float16Module(chunk.config, chunk)
    chunk.decoder.final_layernorm = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunk.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary)
    return sum(storage.nbytes() for storage in kept.values())


class _FusedNorm(torch.autograd.Function):
    """RMSNorm that saves what the fused CUDA kernel saves; its backward is not needed."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.rms_norm(x.detach(), (x.shape[-1],), weight.detach())
