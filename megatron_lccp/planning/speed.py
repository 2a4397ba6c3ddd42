"""Seconds of a training step on any layout, from sizes alone: good for ranking layouts, no measurement.

In: a model as it is laid out, a stage of training, a kind of GPU. Out: seconds of a step, by what takes them. Nothing is
imported from torch or Megatron. What it counts: matrix products and attention at a share of the GPU's peak each,
recomputation, the pipeline's bubble, and the bytes that ranks send each other over links inside and between nodes of
eight. What it leaves out: launches, optimizer, data, imbalance beyond what the two shares hold.

The shares are fitted to one published series: Qwen3-235B-A22B, 256 H100, BF16, natural routing, TP4 PP8 VPP4 EP8 at 16K,
32K, 64K and 128K with CP 1, 2, 4 and 8 (Megatron-MoE-ModelZoo, best_practice/qwen3/readme.md at e865051);
tests/planning/test_suggest.py has the series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lccp.config.tree import StageConfig
from megatron_lccp.measuring.flops import active_parameters, causal_pairs
from megatron_lccp.model.shape import Shape
from megatron_lccp.planning.gpus import Gpu
from megatron_lccp.planning.memory import Sizes, recomputed_modules

PRODUCTS, ATTENTION = 0.365, 0.5
"""Share of the BF16 peak that matrix products and fused attention reach."""
RING = 0.9
"""Of the same attention, what eight context-parallel ranks reach (ring-flash-attention's zigzag, 8 H800, against one
GPU); every doubling of the ranks takes a third of that loss."""
LINK = 0.7
"""Share of a link's data-sheet bandwidth that collectives reach."""
NODE = 8
"""GPUs that NVLink joins."""
VALUE, GRADIENT = 2, 4
"""Bytes of an activation or a weight, and of a gradient that is summed."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest pipeline stage."""

    compute_s: float
    recompute_s: float
    bubble_s: float
    """Waiting for other stages to begin or to end."""
    tensor_s: float
    """Sequence-parallel collectives of tensor parallelism, not hidden."""
    expert_s: float
    """Tokens on their way to experts and back, not hidden."""
    context_s: float
    """Keys and values of other context-parallel ranks, beyond what attention hides."""
    data_s: float
    """Gradients and weights of data parallelism, beyond what half a step hides where reductions overlap."""

    @property
    def total_s(self) -> float:
        parts = (self.compute_s, self.recompute_s, self.bubble_s, self.tensor_s, self.expert_s, self.context_s)
        return sum(parts) + self.data_s


def step_time(
    sizes: Sizes, stage: StageConfig, ranks: int, gpu: Gpu, ddp: Mapping[str, Any], numel: tuple[int, int]
) -> StepTime:
    """A step of `stage`; `numel` are a rank's (dense, expert) parameters, `ddp` DistributedDataParallelConfig's fields."""
    s, p, peak = sizes.shape, sizes.layout, gpu.peak_tflops * 1e12
    replicas = ranks // (p.tensor * p.pipeline * p.context)
    micro_batches = stage.global_batch_tok // (stage.context_tok * stage.micro_batch * replicas)
    tokens = stage.context_tok * stage.micro_batch / p.context
    layers, shared_by = s.layers / p.pipeline, p.context * p.tensor * p.pipeline
    pairs = stage.micro_batch * causal_pairs(stage.context_tok)
    products_s = 2.0 * active_parameters(s) * tokens / p.tensor / p.pipeline / (peak * PRODUCTS)
    attention_s = (
        4.0 * s.layers * s.heads * s.width * pairs / shared_by / (peak * ATTENTION * RING ** (math.log2(p.context) / 3))
    )
    head_s = 2.0 * s.hidden * sizes.vocab_rows * tokens / p.tensor / (peak * PRODUCTS)
    again = _recomputed(sizes.fields, s)
    again_s = again * products_s + (attention_s if sizes.fields.get("recompute_granularity") == "full" else 0.0)
    inside, between = gpu.inside_gbps * 1e9 * LINK, gpu.between_gbps * 1e9 * LINK

    def link(span: int) -> float:
        return inside if span <= NODE else between

    sent = tokens * s.hidden * VALUE * (p.tensor - 1) / p.tensor  # bytes of one gather of a sequence
    routed = sum(s.routed) / s.layers
    wide = 1 + (1 - routed if s.shared_ffn == 0 else 1)  # attention, and what MLP tensor parallelism shares
    tensor_s = layers * wide * (5 + again) * sent / link(p.tensor)
    etp = sizes.expert_tensor
    moved = tokens / p.tensor * s.top_k * s.hidden * VALUE
    crossing = moved * (p.expert - 1) / p.expert / link(p.expert * etp) + moved * (etp - 1) / link(etp)
    expert_s = layers * routed * (4 + 2 * (again > 0)) * crossing if s.experts else 0.0
    ring = (p.context - 1) * tokens * 2 * s.groups * s.width * VALUE / min(p.tensor, s.groups)
    context_s = max(0.0, layers * 3 * ring / link(p.tensor * p.context) - 3 * attention_s) if p.context > 1 else 0.0
    chunks = p.virtual_pipeline or 1
    passed = 2 * chunks * tokens / p.tensor * s.hidden * VALUE / link(2 * p.tensor * p.context) if p.pipeline > 1 else 0
    compute_s = 3 * (products_s + attention_s + head_s)
    each_s = compute_s + again_s + tensor_s + expert_s + context_s + passed
    bubble_s = each_s * (p.pipeline - 1) / chunks
    data_s = _reduced(numel, sizes, ranks, link)
    if ddp.get("overlap_grad_reduce"):
        data_s = max(0.0, data_s - micro_batches * each_s / 2)
    return StepTime(
        compute_s=micro_batches * compute_s, recompute_s=micro_batches * again_s, bubble_s=bubble_s,
        tensor_s=micro_batches * (tensor_s + passed), expert_s=micro_batches * expert_s,
        context_s=micro_batches * context_s, data_s=data_s,
    )  # fmt: skip


def _recomputed(fields: Mapping[str, Any], shape: Shape) -> float:
    """Share of the layers' matrix products that the backward makes again."""
    if fields.get("recompute_granularity") == "full":
        return 1.0
    modules = recomputed_modules(fields)
    again = whole = 0
    for layer in range(shape.layers):
        for part in shape.parts(layer):
            size = part.numel * (shape.top_k if part.over == "expert" else 1) if part.columns is not None else 0
            whole += size
            of = "moe" if shape.routed[layer] else "mlp"
            again += size if part.name.startswith("mlp.") and of in modules else 0
    return again / whole


def _reduced(numel: Sequence[int], sizes: Sizes, ranks: int, link: Callable[[int], float]) -> float:
    """Seconds to sum gradients over replicas and to gather weights."""
    p, seconds = sizes.layout, 0.0
    kept_together = (p.tensor * p.pipeline, sizes.expert_tensor * p.expert * p.pipeline)
    for count, model_ranks in zip(numel, kept_together):
        replicas = ranks // model_ranks
        span = ranks // p.pipeline
        seconds += count * (GRADIENT + VALUE) * (replicas - 1) / replicas / link(span)
    return seconds
