"""Memory of one rank of any layout, from sizes alone.

In: fields of TransformerConfig, the layout, where a rank stands. Out: parameters in the order in which Megatron-Core
registers them, the buffers that it lays them out in, the share of the distributed optimizer, and an estimate of the
activations. Nothing is imported from torch or Megatron. Paths below are those of megatron-core 0.16.1 under
megatron/core; tests/test_plan.py compares parameters, buffers and optimizer shards with what it builds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lccp.config.tree import ParallelConfig

# Fields of TransformerConfig that change which parameters there are, with the value that is counted here.
NOT_COUNTED: dict[str, Any] = {
    "add_bias_linear": False, "add_qkv_bias": False, "gated_linear_unit": True, "moe_shared_expert_gate": False,
    "attention_output_gate": False, "pipeline_model_parallel_layout": None, "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None, "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False, "fp8": None, "fp4": None, "moe_latent_size": None,
}  # fmt: skip

UNLESS_GIVEN = {"add_bias_linear": True, "gated_linear_unit": False}
"""What Megatron-Core takes where such a field is not given, if that is not what is counted here."""


@dataclass(frozen=True)
class Sizes:
    """A model as it is built: its fields of TransformerConfig, its vocabulary and its layout."""

    fields: Mapping[str, Any]
    layout: ParallelConfig
    vocab_rows: int
    """Rows of the embedding over all tensor-parallel ranks, padding included."""
    tied: bool
    qk_norm: str
    """`after_rope`, `before_rope` or `none`, as Family has it."""

    @property
    def width(self) -> int:
        return self.fields.get("kv_channels") or self.fields["hidden_size"] // self.fields["num_attention_heads"]

    @property
    def groups(self) -> int:
        return self.fields.get("num_query_groups") or self.fields["num_attention_heads"]

    @property
    def ffn(self) -> int:
        return self.fields.get("ffn_hidden_size") or 4 * self.fields["hidden_size"]

    @property
    def expert_ffn(self) -> int:
        return self.fields.get("moe_ffn_hidden_size") or self.ffn

    @property
    def expert_tensor(self) -> int:
        return self.layout.expert_tensor or self.layout.tensor

    @property
    def chunks(self) -> int:
        """Model chunks of one stage."""
        return self.layout.virtual_pipeline or 1

    @property
    def layers_per_chunk(self) -> int:
        """Layers of each chunk of each stage (transformer/transformer_block.py:75)."""
        return self.fields["num_layers"] // (self.layout.pipeline * self.chunks)


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
    hidden, p = sizes.fields["hidden_size"], sizes.layout
    first = stage == 0 and chunk == 0
    last = stage == p.pipeline - 1 and chunk == sizes.chunks - 1
    embedding, twice = sizes.vocab_rows // p.tensor * hidden, sizes.tied and p.pipeline > 1
    found = [Parameter("embedding.word_embeddings.weight", embedding, shared_embedding=twice)] if first else []
    for layer in range(sizes.layers_per_chunk):
        found += _layer_parameters(sizes, f"decoder.layers.{layer}.")
    if last:
        found.append(Parameter("decoder.final_layernorm.weight", hidden))
        if twice or not sizes.tied:
            found.append(Parameter("output_layer.weight", embedding, shared_embedding=twice))
    return found


def _layer_parameters(sizes: Sizes, prefix: str) -> Iterator[Parameter]:
    """One layer: norms and router whole on every rank, matrices by TP, experts by EP and ETP."""
    f, p, hidden = sizes.fields, sizes.layout, sizes.fields["hidden_size"]
    heads = f["num_attention_heads"]
    attention, norms = f"{prefix}self_attention.", ("q_layernorm.weight", "k_layernorm.weight")
    yield Parameter(f"{prefix}input_layernorm.weight", hidden)
    if sizes.qk_norm == "after_rope":
        yield from (Parameter(f"{attention}core_attention.{norm}", sizes.width) for norm in norms)
    yield Parameter(f"{attention}linear_proj.weight", hidden * heads * sizes.width // p.tensor)
    yield Parameter(f"{attention}linear_qkv.weight", hidden * (heads + 2 * sizes.groups) * sizes.width // p.tensor)
    if sizes.qk_norm == "before_rope":
        yield from (Parameter(f"{attention}{norm}", sizes.width) for norm in norms)
    yield Parameter(f"{prefix}pre_mlp_layernorm.weight", hidden)
    experts = f.get("num_moe_experts")
    if not experts:
        yield from _gated_mlp(f"{prefix}mlp.", hidden, sizes.ffn // p.tensor)
        return
    yield Parameter(f"{prefix}mlp.router.weight", experts * hidden)
    for number in range(experts // p.expert):
        name = f"{prefix}mlp.experts.local_experts.{number}."
        yield from _gated_mlp(name, hidden, sizes.expert_ffn // sizes.expert_tensor, expert=p.expert > 1)
    if shared := f.get("moe_shared_expert_intermediate_size"):
        yield from _gated_mlp(f"{prefix}mlp.shared_experts.", hidden, shared // p.tensor)


def _gated_mlp(prefix: str, hidden: int, ffn: int, expert: bool = False) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}linear_fc1.weight", 2 * ffn * hidden, expert)
    yield Parameter(f"{prefix}linear_fc2.weight", ffn * hidden, expert)


def fp8_copies_bytes(sizes: Sizes, stage: int) -> int:
    """Bytes of the FP8 copies of its matrices that a rank of this stage keeps while it trains in FP8. An estimate.

    Transformer Engine 2.11 keeps the copy that a module makes for a step's first micro-batch for all later steps
    (pytorch/module/base.py: get_weight_workspace), a byte a value, and that of its transpose for the backward, another
    (pytorch/tensor/float8_tensor.py; blocks of 128: float8_blockwise_tensor.py); scales are left out. A Blackwell GPU
    can do without the transpose. Nothing is kept with `disable_parameter_transpose_cache`, for which Megatron-Core
    names no first micro-batch; with `fp8_param` the weights themselves are FP8 and a transpose, counted here as BF16.
    Embedding, output layer, router and norms stay as they are, and all of the layers that `first_last_layers_bf16`
    keeps in BF16.
    """
    if sizes.fields.get("fp8_param") or sizes.fields.get("disable_parameter_transpose_cache"):
        return 0
    of_layer = sum(parameter.numel for parameter in _layer_parameters(sizes, "") if "linear_" in parameter.name)
    return 2 * of_layer * sum(_is_in_fp8(sizes.fields, number) for number in layer_numbers(sizes, stage))


def layer_numbers(sizes: Sizes, stage: int) -> list[int]:
    """Numbers, from 0, of the layers in the chunks of a stage (transformer/transformer_layer.py:
    get_transformer_layer_offset)."""
    each = sizes.layers_per_chunk
    first = [(chunk * sizes.layout.pipeline + stage) * each for chunk in range(sizes.chunks)]
    return [start + k for start in first for k in range(each)]


def _is_in_fp8(fields: Mapping[str, Any], number: int) -> bool:
    """Whether a layer of a model that trains in FP8 does so (fp8_utils.py: is_first_last_bf16_layer)."""
    if not fields.get("first_last_layers_bf16"):
        return True
    start, end = (fields.get(f"num_layers_at_{which}_in_bf16", 1) for which in ("start", "end"))
    return start <= number < fields["num_layers"] - end


def uncounted(fields: Mapping[str, Any]) -> list[str]:
    """Fields of TransformerConfig that are not counted here, one line each."""
    return [
        f"megatron.transformer.{name}: {given} is not counted by a plan; set {value} to plan without"
        for name, value in NOT_COUNTED.items()
        if (given := fields.get(name, UNLESS_GIVEN.get(name, value))) != value
    ]


def total_parameters(sizes: Sizes, vocab_size: int) -> tuple[int, int]:
    """(total, active for one token) parameters of the whole model, unpadded, a tied embedding counted once."""
    alone = Sizes(sizes.fields, ParallelConfig(), vocab_size, sizes.tied, sizes.qk_norm)
    top_k, experts = sizes.fields.get("moe_router_topk", 2), sizes.fields.get("num_moe_experts")
    total = active = 0
    for parameter in chunk_parameters(alone, 0, 0):
        total += parameter.numel
        active += parameter.numel * top_k // experts if ".experts." in parameter.name else parameter.numel
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


def layer_activation_bytes(sizes: Sizes, tokens: int, bytes_per_value: int, recomputed: Sequence[str] = ()) -> float:
    """Bytes that one layer keeps of `tokens` tokens of a context-parallel rank until its backward. An estimate.

    What Megatron-Core's layers save, in values of one token (h hidden, f width of an MLP; sequences are TP-sharded):
    - h/TP each: input of both norms, their outputs (inputs of the QKV matrix and of router and experts);
    - attention, over TP: q, k and v as one matrix makes them; q and k after RoPE, again if they are normalised then,
      and q copied if normalised before; the output, and 4 bytes a head of log sums; not over TP: cosines and sines of
      q and of k;
    - dense MLP or shared expert, over TP: 2 f of the first matrix, f each of SiLU, of the other half (which is copied,
      transformer/mlp.py:224) and of the product;
    - experts: top-k copies of h, 5 f as above and f after scaling by the router, spread evenly over ranks; router
      scores and probabilities, 2 x 4 bytes an expert.
    `recomputed` are Megatron-Core's recompute_modules; `core_attn` saves nothing where attention is fused.
    """
    f, p, hidden = sizes.fields, sizes.layout, sizes.fields["hidden_size"]
    heads, groups, width, local = f["num_attention_heads"], sizes.groups, sizes.width, tokens / p.tensor
    values = local * hidden * (2 if "layernorm" in recomputed else 4)
    rotated = heads + groups + {"after_rope": heads + groups, "before_rope": heads, "none": 0}[sizes.qk_norm]
    values += local * width * (heads + 2 * groups + rotated + heads) + 4 * tokens * width
    other = 4 * local * heads
    experts = f.get("num_moe_experts")
    if not experts:
        return bytes_per_value * (values + (0 if "mlp" in recomputed else local * 5 * sizes.ffn)) + other
    if "moe" not in recomputed:
        if "shared_experts" not in recomputed:
            values += local * 5 * (f.get("moe_shared_expert_intermediate_size") or 0)
        routed = local * f.get("moe_router_topk", 2)
        # every expert-tensor rank sees the tokens of all of them, and computes its part of the width
        values += routed * (hidden * sizes.expert_tensor + (2 if "moe_act" in recomputed else 6) * sizes.expert_ffn)
        other += 8 * local * experts
    return bytes_per_value * values + other


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
    flying = in_flight(p, stage, micro_batches)
    granularity = f.get("recompute_granularity")
    modules = (f.get("recompute_modules") or ["core_attn"]) if granularity == "selective" else ()
    layer = layer_activation_bytes(sizes, tokens, bytes_per_value, modules)
    layer_input = tokens / p.tensor * f["hidden_size"] * bytes_per_value
    layers, on_top = sizes.layers_per_chunk, 0.0
    if granularity == "full":
        together = f.get("recompute_num_layers") or 1
        if f.get("recompute_method") == "block":
            kept, on_top = together, layer
            per_chunk = layer_input * min(kept, layers) + layer * max(0, layers - kept)
        else:
            per_chunk, on_top = layer_input * math.ceil(layers / together), layer * min(together, layers)
    else:
        per_chunk, on_top = layer * layers, layer_activation_bytes(sizes, tokens, bytes_per_value) - layer
    ends = 0.0
    if stage == p.pipeline - 1:
        rows = min(tokens, loss_chunk_tok or tokens)  # whose logits exist at a time
        logits = rows * sizes.vocab_rows * (4 + 2 * bytes_per_value)
        ends = (logits + tokens * f["hidden_size"] * bytes_per_value) / p.tensor
    return per_chunk * flying + on_top + ends
