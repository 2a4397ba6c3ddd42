"""What Megatron-Core really builds for ranks that do not exist: fake process groups and meta tensors, in one process.

Like jobs.py, each function returns plain values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_lccp.config.load import parse_config
from megatron_lccp.config.tree import Config
from megatron_lccp.parallel import compat, cpu
from megatron_lccp.parallel.groups import Groups, make_groups

Layout = tuple[Path, Sequence[str], int, Sequence[int]]
"""Configuration, its overrides, how many ranks there would be, and which of them to be."""


def built_ranks(layouts: Mapping[str, Layout], vocab_size: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Name of a layout -> rank -> what is there on that rank: see `_built`."""
    compat.quiet()
    cpu.install()
    compat.apply()
    torch.set_num_threads(1)
    from megatron_lccp.parallel.fake import fake_rank

    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, (path, overrides, ranks, numbers) in layouts.items():
        transformer = "--megatron.transformer.perform_initialization=false"
        config = parse_config(path, [*overrides, transformer])
        if config.training.precision == "auto":
            config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="bf16"))
        for rank in numbers:
            with fake_rank(config.parallel, config.seed, rank, ranks) as (groups, _):
                found.setdefault(name, {})[rank] = _built(config, groups, vocab_size)
    return found


def _built(config: Config, groups: Groups, vocab_size: int) -> dict[str, Any]:
    """Parameters by name and size, bytes of their buffers and of the optimizer, as allocated on meta tensors."""
    from megatron_lccp.model.build import build_chunks, wrap_for_training
    from megatron_lccp.model.resolved import resolve
    from megatron_lccp.training.optimizer import make_optimizer

    chunks = build_chunks(config, resolve(config).of_vocabulary(vocab_size), groups)
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
    wrapped = wrap_for_training(chunks, config, groups)
    optimizer = make_optimizer(wrapped, config)
    state = [_state_bytes(part) for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return {
        "pp_rank": groups.pp.rank(),
        "named": named,
        "weights_bytes": sum(buffer.param_data.nbytes for buffer in buffers)
        + sum(b.nbytes for chunk in wrapped for name, b in chunk.named_buffers() if ".router." in name),
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


def saved_by_layers(cases: Sequence[tuple[Path, Sequence[str]]], vocab_size: int, length_tok: int) -> list[float]:
    """Bytes that the layers of each configuration keep of one sequence until their backward, on this CPU rank.

    RMSNorm keeps its input alone, as its fused CUDA kernel does; PyTorch's CPU version keeps FP32 copies too.
    """
    from megatron_lccp.model.norm import RMSNorm
    from megatron_lccp.parallel.groups import start_ranks

    device = start_ranks(timeout_s=60)
    RMSNorm.forward = lambda self, x: _FusedNorm.apply(x, self.weight)
    configs = [parse_config(path, [*overrides, "--training.precision=bf16"]) for path, overrides in cases]
    return [_saved(c, make_groups(c.parallel, device, c.seed), vocab_size, length_tok) for c in configs]


def _saved(config: Config, groups: Groups, vocab_size: int, length_tok: int) -> float:
    from megatron.core.transformer.module import Float16Module

    from megatron_lccp.model.build import build_chunks
    from megatron_lccp.model.resolved import resolve

    (chunk,) = build_chunks(config, resolve(config).of_vocabulary(vocab_size), groups)
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
