"""Sizes of the bench of one GPU (tools/bench_gpu.py, `lccp doctor --gpu`): the configuration of a row of its table, the
memory it takes, and the layers that fit.

In: its options, which are those of bench_gpu.py. Out: configurations, bytes, a number of layers.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

from megatron_lccp.config.tree import Config, MegatronConfig, ModelConfig, StageConfig, TrainingConfig

Layers = Literal["auto", "portable", "transformer_engine"]
Fp8 = Literal["none", "delayed", "tensorwise", "blockwise"]
WAYS: dict[str, tuple[Layers, Fp8]] = {
    "portable": ("portable", "none"), "te": ("transformer_engine", "none"),
    "te-delayed": ("transformer_engine", "delayed"), "te-tensorwise": ("transformer_engine", "tensorwise"),
    "te-blockwise": ("transformer_engine", "blockwise"),
}  # fmt: skip
"""Way -> model.layers (and with it attention), training.fp8."""
GIB = 2**30
SPARE = 0.92
"""Share of the memory that the estimate may fill: kernels' workspace, fragments and communication want the rest."""


def config_for(way: str, length: int, o: argparse.Namespace) -> Config:
    """The configuration of one row of the table."""
    from megatron_lccp.model.families import FAMILIES

    layers, fp8 = WAYS[way]
    transformer: dict[str, Any] = {"num_layers": o.layers}
    if "num_moe_experts" in FAMILIES[o.family]().transformer:
        transformer["num_moe_experts"] = o.experts
    if o.recompute:
        transformer |= {"recompute_granularity": "selective", "recompute_modules": list(o.recompute)}
    return Config(
        seed=o.seed,
        model=ModelConfig(family=o.family, layers=layers),
        megatron=MegatronConfig(transformer=transformer),
        training=TrainingConfig(
            precision="bf16" if o.device == "cuda" else "fp32", fp8=fp8, loss_chunk_tok=o.loss_chunk_tok
        ),
        stages={"only": StageConfig(context_tok=length, global_batch_tok=o.batch_tok, rope_base=2e6)},
    )


def estimate_bytes(way: str, length: int, o: argparse.Namespace) -> float:
    """Memory of a step by planning/memory.py."""
    from megatron_lccp.model.resolved import resolve
    from megatron_lccp.planning.plan import rank_memory, sizes_of

    config = config_for(way, length, o)
    (memory,) = rank_memory(config, sizes_of(config, resolve(config).of_vocabulary(2048)), 1)
    return memory.total_bytes


def fit_layers(o: argparse.Namespace) -> int:
    """Layers that fit at the longest length in every way; 0 if not one does."""
    from megatron_lccp.model.families import FAMILIES

    most = FAMILIES[o.family]().transformer["num_layers"]
    for layers in range(1, most + 1):
        slice_ = argparse.Namespace(**{**vars(o), "layers": layers})
        if max(estimate_bytes(way, max(o.lengths), slice_) for way in o.ways) > SPARE * o.memory_gib * GIB:
            return layers - 1
    return most
