"""Models with shapes but no storage, and their parameters counted one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from megatron.core.models.gpt import GPTModel
from torch.overrides import TorchFunctionMode

from megatron_lccp.config.tree import Config
from megatron_lccp.model.build import bare, build_chunks
from megatron_lccp.model.resolved import resolve
from megatron_lccp.parallel.groups import Groups


class Nowhere(TorchFunctionMode):
    """Every tensor is created on the meta device, whatever device the caller names."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_without_memory(config: Config, vocab_size: int, groups: Groups) -> list[GPTModel]:
    """This rank's chunks."""
    no_init = {**config.megatron.transformer, "perform_initialization": False}
    megatron = dataclasses.replace(config.megatron, transformer=no_init)
    config = dataclasses.replace(config, megatron=megatron)
    with torch.device("meta"), Nowhere():
        return build_chunks(config, resolve(config).of_vocabulary(vocab_size), groups)


def count_parameters(chunks: Sequence[torch.nn.Module], top_k: int | None) -> tuple[int, int]:
    """(total, active for one token) parameters of these chunks; of an expert only top_k / experts are active."""
    total = active = 0
    for chunk in chunks:
        experts = bare(chunk).config.num_moe_experts
        for name, parameter in bare(chunk).named_parameters():
            total += parameter.numel()
            active += parameter.numel() * top_k // experts if ".experts." in name else parameter.numel()
    return total, active
