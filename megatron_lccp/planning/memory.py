"""Memory of one rank of any layout, from sizes alone.

In: a model's shape and fields, the layout, where a rank stands. Out: parameters in the order in which Megatron-Core
registers them, the buffers that it lays them out in, the share of the distributed optimizer, and an estimate of the
activations. Nothing is imported from torch or Megatron. Paths below are those of megatron-core 0.16.1 under
megatron/core; tests/planning/test_plan.py compares parameters, buffers and optimizer shards with what it builds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lccp.config.tree import ParallelConfig
from megatron_lccp.model.shape import Part, Shape

# Fields of TransformerConfig that change which parameters there are, with the value that is counted here.
NOT_COUNTED: dict[str, Any] = {
    "add_bias_linear": False, "gated_linear_unit": True, "moe_shared_expert_gate": False,
    "attention_output_gate": False, "pipeline_model_parallel_layout": None,
    "account_for_embedding_in_pipeline_split": False, "account_for_loss_in_pipeline_split": False, "fp8": None,
    "fp4": None, "moe_latent_size": None,
}  # fmt: skip

UNLESS_GIVEN = {"add_bias_linear": True, "gated_linear_unit": False}
"""What Megatron-Core takes where such a field is not given, if that is not what is counted here."""


@dataclass(frozen=True)
class Sizes:
    """A model as it is laid out."""

    shape: Shape
    fields: Mapping[str, Any]
    """Its fields of TransformerConfig, for those that say how it is run."""
    layout: ParallelConfig
    vocab_rows: int
    """Rows of the embedding over all tensor-parallel ranks, padding included."""

    @property
    def expert_tensor(self) -> int:
        return self.layout.expert_tensor or self.layout.tensor

    @property
    def chunks(self) -> int:
        """Model chunks of one stage."""
        return self.layout.virtual_pipeline or 1

    def chunk_layers(self, stage: int, chunk: int) -> range:
        """Layers of a chunk, from 0 (transformer/transformer_layer.py: get_transformer_layer_offset)."""
        each = [layers // self.chunks for layers in self._stage_layers()]
        first = chunk * sum(each) + sum(each[:stage])
        return range(first, first + each[stage])

    def stage_layers(self, stage: int) -> list[int]:
        """Numbers, from 0, of the layers in all chunks of a stage."""
        return [layer for chunk in range(self.chunks) for layer in self.chunk_layers(stage, chunk)]

    def _stage_layers(self) -> list[int]:
        """Layers of each stage: all alike but for those that are given (transformer/transformer_block.py:75)."""
        ends = [self.fields.get(f"num_layers_in_{which}_pipeline_stage") for which in ("first", "last")]
        given = [layers for layers in ends if layers is not None]
        middle = self.layout.pipeline - len(given)
        each = (self.shape.layers - sum(given)) // middle if middle else 0
        first, last = ([] if layers is None else [layers] for layers in ends)
        return [*first, *[each] * middle, *last]


@dataclass(frozen=True)
class Parameter:
    """One parameter on one rank."""

    name: str
    numel: int
    expert: bool = False
    """Reduced over the expert-data-parallel group (tensor_parallel/layers.py:829): an expert's, if EP > 1."""
    shared_embedding: bool = False
    """The embedding that exists on two stages, which gets a bucket of its own."""


def chunk_parameters(sizes: Sizes, stage: int, chunk: int) -> list[Parameter]:
    """Parameters of a rank of pipeline stage `stage` in one of its chunks, in the order of named_parameters()."""
    hidden, p, tied = sizes.shape.hidden, sizes.layout, sizes.shape.tied
    first = stage == 0 and chunk == 0
    last = stage == p.pipeline - 1 and chunk == sizes.chunks - 1
    embedding, twice = sizes.vocab_rows // p.tensor * hidden, tied and p.pipeline > 1
    found = [Parameter("embedding.word_embeddings.weight", embedding, shared_embedding=twice)] if first else []
    for number, layer in enumerate(sizes.chunk_layers(stage, chunk)):
        found += _layer_parameters(sizes, layer, f"decoder.layers.{number}.")
    if last:
        found.append(Parameter("decoder.final_layernorm.weight", hidden))
        if twice or not tied:
            found.append(Parameter("output_layer.weight", embedding, shared_embedding=twice))
    return found


def _layer_parameters(sizes: Sizes, layer: int, prefix: str) -> Iterator[Parameter]:
    """One layer: norms and router whole on every rank, matrices by TP, experts by EP and ETP."""
    p, parts = sizes.layout, [part for part in sizes.shape.parts(layer) if part.trained]
    of_experts = [part for part in parts if part.over == "expert"]
    for part in parts:
        if part.over != "expert":
            yield Parameter(f"{prefix}{part.name}", _on_rank(sizes, part))
        elif part is of_experts[0]:  # all of them, expert by expert
            for number in range(sizes.shape.experts // p.expert):
                for one in of_experts:
                    name = one.name.replace(".experts.", f".experts.local_experts.{number}.")
                    yield Parameter(f"{prefix}{name}", _on_rank(sizes, one), expert=p.expert > 1)


def _on_rank(sizes: Sizes, part: Part) -> int:
    """Elements of it that a rank holds; of one expert, if each has one."""
    return part.numel // {"none": 1, "tensor": sizes.layout.tensor, "expert": sizes.expert_tensor}[part.over]


def router_state_bytes(sizes: Sizes, stage: int) -> int:
    """Bytes that routers keep beside parameters: of each expert a bias and how many tokens it got, in FP32."""
    biases = (part for layer in sizes.stage_layers(stage) for part in sizes.shape.parts(layer) if not part.trained)
    return sum(2 * 4 * part.numel for part in biases)


def fp8_copies_bytes(sizes: Sizes, stage: int) -> int:
    """Bytes of the FP8 copies of its matrices that a rank of this stage keeps while it trains in FP8. An estimate.

    Transformer Engine 2.11 keeps the copy that a module makes for a step's first micro-batch for all later steps
    (pytorch/module/base.py: get_weight_workspace), a byte a value, and that of its transpose for the backward, another
    (pytorch/tensor/float8_tensor.py; blocks of 128: float8_blockwise_tensor.py); scales are left out. A Blackwell GPU
    can do without the transpose. Nothing is kept with `disable_parameter_transpose_cache`, for which Megatron-Core
    names no first micro-batch; with `fp8_param` the weights themselves are FP8 and a transpose, counted here as BF16.
    Embedding, output layer, router, biases and norms stay as they are, and all of the layers that
    `first_last_layers_bf16` keeps in BF16.
    """
    if sizes.fields.get("fp8_param") or sizes.fields.get("disable_parameter_transpose_cache"):
        return 0
    layers = [layer for layer in sizes.stage_layers(stage) if _is_in_fp8(sizes, layer)]
    held = [parameter for layer in layers for parameter in _layer_parameters(sizes, layer, "")]
    return 2 * sum(p.numel for p in held if "linear_" in p.name and p.name.endswith(".weight"))


def _is_in_fp8(sizes: Sizes, layer: int) -> bool:
    """Whether a layer of a model that trains in FP8 does so (fp8_utils.py: is_first_last_bf16_layer)."""
    if not sizes.fields.get("first_last_layers_bf16"):
        return True
    start, end = (sizes.fields.get(f"num_layers_at_{which}_in_bf16", 1) for which in ("start", "end"))
    return start <= layer < sizes.shape.layers - end


def uncounted(fields: Mapping[str, Any]) -> list[str]:
    """Fields of TransformerConfig that are not counted here, one line each."""
    return [
        f"megatron.transformer.{name}: {given} is not counted by a plan; set {value} to plan without"
        for name, value in NOT_COUNTED.items()
        if (given := fields.get(name, UNLESS_GIVEN.get(name, value))) != value
    ]


def total_parameters(shape: Shape, vocab_size: int) -> tuple[int, int]:
    """(total, active for one token) parameters of the whole model, unpadded, a tied embedding counted once."""
    ends = shape.hidden * (1 + vocab_size * (1 if shape.tied else 2))  # the last norm is one of them
    total = active = ends
    for part in (part for layer in range(shape.layers) for part in shape.parts(layer) if part.trained):
        of_experts = part.over == "expert"
        total += part.numel * (shape.experts if of_experts else 1)
        active += part.numel * (shape.top_k if of_experts else 1)
    return total, active


@dataclass(frozen=True)
class Buffer:
    """Parameters laid out for the distributed optimizer (distributed/param_and_grad_buffer.py:597-735)."""

    numel: int
    """Elements, padding included."""
    buckets: tuple[tuple[int, int], ...]
    """Start and end of each bucket."""
    spans: tuple[tuple[int, int, int], ...]
    """Start, end and bucket of each parameter, without padding."""
    ranks: int
    """Data-parallel ranks that share it."""

    def owned(self, rank: int) -> int:
        """Elements of parameters, without padding, in the part of every bucket that rank `rank` updates.

        optimizer/distrib_optimizer.py: _build_model_gbuf_range.
        """
        found = 0
        for start, end, bucket in self.spans:
            bucket_start, bucket_end = self.buckets[bucket]
            part = (bucket_end - bucket_start) // self.ranks
            own = bucket_start + rank * part
            found += max(0, min(end, own + part) - max(start, own))
        return found


def lay_out(parameters: Sequence[Parameter], ranks: int, bucket_size: int | None, high_busbw: bool = False) -> Buffer:
    """The buffer of these parameters: last first, each at a multiple of 64, buckets padded to 128 and the ranks."""
    divisor = math.lcm(ranks, 128, 2**16) if high_busbw else math.lcm(ranks, 128)
    buckets: list[tuple[int, int]] = []
    spans: list[tuple[int, int, int]] = []
    bucket_start = at = members = 0

    def close(end: int) -> int:
        nonlocal bucket_start, members
        end = -(-end // divisor) * divisor
        buckets.append((bucket_start, end))
        bucket_start, members = end, 0
        return end

    for parameter in reversed(parameters):
        at = -(-at // 64) * 64
        if parameter.shared_embedding and members:
            at = close(at)
        end = at + parameter.numel
        spans.append((at, end, len(buckets)))
        members += 1
        full = bucket_size is not None and end - bucket_start >= bucket_size
        at = close(end) if full or parameter.shared_embedding else end
    if members:
        at = close(at)
    return Buffer(at, tuple(buckets), tuple(spans), ranks)


def stage_buffers(sizes: Sizes, stage: int, ranks: int, ddp: Mapping[str, Any]) -> list[tuple[Buffer, bool]]:
    """(buffer, is of experts) of every chunk of a rank of this stage (distributed/distributed_data_parallel.py:60-110).

    `ddp` holds fields of DistributedDataParallelConfig. Only the first chunk of the first stage is cut into buckets,
    and only where gradients are reduced while the backward runs.
    """
    p, found = sizes.layout, []
    dense_ranks = ranks // (p.tensor * p.pipeline)
    expert_ranks = ranks // (sizes.expert_tensor * p.expert * p.pipeline)
    for chunk in range(sizes.chunks):
        bucket_size = None
        if ddp.get("overlap_grad_reduce") and chunk == stage == 0:
            bucket_size = ddp.get("bucket_size") or max(40_000_000, 1_000_000 * (dense_ranks // p.context))
        parameters = chunk_parameters(sizes, stage, chunk)
        for expert, over in ((False, dense_ranks), (True, expert_ranks)):
            if mine := [parameter for parameter in parameters if parameter.expert is expert]:
                busbw = bool(ddp.get("pad_buckets_for_high_nccl_busbw"))
                found.append((lay_out(mine, over, bucket_size, busbw), expert))
    return found


@dataclass(frozen=True)
class Place:
    """Where a rank stands: its pipeline stage, and its number among the replicas of dense and of expert parameters."""

    stage: int
    dense: int
    expert: int


def place_of(rank: int, sizes: Sizes, ranks: int) -> Place:
    """Ranks are numbered TP first, then CP, then DP, then PP; over experts ETP, EP, expert DP, PP (parallel_state.py,
    order tp-cp-ep-dp-pp)."""
    p = sizes.layout
    per_stage = ranks // p.pipeline
    inside = rank % per_stage
    return Place(rank // per_stage, inside // p.tensor, inside // (sizes.expert_tensor * p.expert))


def layer_activation_bytes(
    sizes: Sizes, layer: int, tokens: int, bytes_per_value: int, recomputed: Sequence[str] = ()
) -> float:
    """Bytes that a layer keeps of `tokens` tokens of a context-parallel rank until its backward. An estimate.

    What Megatron-Core's layers save, in values of one token (h hidden, f width of an MLP; sequences are TP-sharded):
    - h/TP each: input of both norms, their outputs (inputs of the QKV matrix and of router and experts);
    - attention, over TP: q, k and v as one matrix makes them; q and k after RoPE, again if they are normalised then,
      and q copied if normalised before; the output, and 4 bytes a head of log sums; not over TP: cosines and sines of
      q and of k, of what is turned of a head;
    - dense MLP or shared expert, over TP: 2 f of the first matrix, f each of SiLU, of the other half (which is copied,
      transformer/mlp.py:224) and of the product;
    - experts: top-k copies of h, 5 f as above and f after scaling by the router, spread evenly over ranks; router
      scores and probabilities, 2 x 4 bytes an expert.
    `recomputed` are Megatron-Core's recompute_modules; `core_attn` saves nothing where attention is fused.
    """
    s, tensor = sizes.shape, sizes.layout.tensor
    heads, local = s.heads, tokens / tensor
    values = local * s.hidden * (2 if "layernorm" in recomputed else 4)
    rotated = heads + s.groups + {"after_rope": heads + s.groups, "before_rope": heads, "none": 0}[s.qk_norm]
    values += local * s.width * (heads + 2 * s.groups + rotated + heads) + 4 * tokens * s.rotated
    other = 4 * local * heads
    if not s.routed[layer]:
        return bytes_per_value * (values + (0 if "mlp" in recomputed else local * 5 * s.ffn)) + other
    if "moe" not in recomputed:
        if "shared_experts" not in recomputed:
            values += local * 5 * s.shared_ffn
        # every expert-tensor rank sees the tokens of all of them, and computes its part of the width
        wide = s.hidden * sizes.expert_tensor + (2 if "moe_act" in recomputed else 6) * s.expert_ffn
        values += local * s.top_k * wide
        other += 8 * local * s.experts
    return bytes_per_value * values + other


def recomputed_modules(fields: Mapping[str, Any]) -> Sequence[str]:
    """What a selective recomputation makes again; nothing of another one."""
    if fields.get("recompute_granularity") != "selective":
        return ()
    return fields.get("recompute_modules") or ["core_attn"]


def in_flight(layout: ParallelConfig, stage: int, micro_batches: int) -> int:
    """Micro-batches, each through one chunk, of which a rank of this stage keeps activations at its peak.

    The warm-up of the schedule and one more (pipeline_parallel/schedules.py).
    """
    behind, chunks = layout.pipeline - stage - 1, layout.virtual_pipeline or 1
    if layout.virtual_pipeline:
        return min(2 * behind + (chunks - 1) * layout.pipeline + 1, micro_batches * chunks)
    return min(behind + 1, micro_batches)


def activation_bytes(
    sizes: Sizes, stage: int, tokens: int, micro_batches: int, bytes_per_value: int, loss_chunk_tok: int | None = None
) -> float:
    """Bytes of activations on a rank of this stage at its peak, for micro-batches of `tokens` tokens of a CP rank.

    An estimate: what layers save, times the micro-batches in flight, with what is recomputed of one layer on top, and
    the loss on the last stage, per logit 8 bytes in BF16 (a BF16 logit and its FP32 softmax, whose gradient is cast
    back). Temporary workspace is left out.
    """
    f, p = sizes.fields, sizes.layout
    granularity = f.get("recompute_granularity")
    modules = recomputed_modules(f)
    kept = [layer_activation_bytes(sizes, k, tokens, bytes_per_value, modules) for k in sizes.stage_layers(stage)]
    largest = max(kept, default=0.0)
    layer_input = tokens / p.tensor * sizes.shape.hidden * bytes_per_value
    layers, on_top = len(kept) // sizes.chunks, 0.0
    per_chunk = sum(kept) / sizes.chunks  # if they differ, of the mean chunk
    if granularity == "full":
        together = f.get("recompute_num_layers") or 1
        if f.get("recompute_method") == "block":
            recomputed, on_top = min(together, layers), largest
            per_chunk = layer_input * recomputed + per_chunk * (layers - recomputed) / max(layers, 1)
        else:
            per_chunk, on_top = layer_input * math.ceil(layers / together), largest * min(together, layers)
    else:
        whole = (layer_activation_bytes(sizes, k, tokens, bytes_per_value) for k in sizes.stage_layers(stage))
        on_top = max((all_ - some for all_, some in zip(whole, kept)), default=0.0)
    ends = 0.0
    if stage == p.pipeline - 1:
        rows = min(tokens, loss_chunk_tok or tokens)  # whose logits exist at a time
        logits = rows * sizes.vocab_rows * (4 + 2 * bytes_per_value)
        ends = (logits + tokens * sizes.shape.hidden * bytes_per_value) / p.tensor
    return per_chunk * in_flight(p, stage, micro_batches) + on_top + ends
