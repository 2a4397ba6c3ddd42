"""Config -> Megatron-Core model on this rank, laid out as the config says.

In: the config, the family, the tokenizer's vocabulary size, the process groups. Out: a list of model chunks (one
unless the pipeline is interleaved), bare or wrapped for training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

from megatron_lccp.config.tree import Config
from megatron_lccp.model.attention import NormAfterRope, core_attention_class, has_transformer_engine
from megatron_lccp.model.families import Family
from megatron_lccp.model.norm import RMSNorm
from megatron_lccp.parallel.groups import Groups

# What the weights of a checkpoint fit or do not fit; the other fields of TransformerConfig may change on a resume.
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
)  # fmt: skip

# What other fields of the configuration decide; a value passed through beside them would contradict those.
OWNED = {
    "transformer": {
        "tensor_model_parallel_size": "parallel.tensor", "sequence_parallel": "parallel.tensor",
        "pipeline_model_parallel_size": "parallel.pipeline", "context_parallel_size": "parallel.context",
        "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
        "expert_model_parallel_size": "parallel.expert", "expert_tensor_parallel_size": "parallel.expert_tensor",
        "bf16": "training.precision", "fp16": "training.precision", "params_dtype": "training.precision",
        "pipeline_dtype": "training.precision", "qk_layernorm": "model.family", "moe_grouped_gemm": "model.family",
        "normalization": "model.family",
    },
    "optimizer": {
        "lr": "stages.NAME.lr", "min_lr": "stages.NAME.min_lr", "weight_decay": "optimizer.weight_decay",
        "clip_grad": "optimizer.clip_grad", "bf16": "training.precision", "params_dtype": "training.precision",
        "use_distributed_optimizer": "nothing: checkpoints need it",
    },
    "ddp": {"use_distributed_optimizer": "nothing: checkpoints need it"},
}  # fmt: skip


def passthrough_problems(config: Config) -> list[str]:
    """Fields under `megatron:` that the installed Megatron-Core does not know, and kernels that are not here."""
    problems = []
    if config.model.attention == "transformer_engine" and not has_transformer_engine():
        problems.append("model.attention: transformer_engine needs a GPU and Transformer Engine; set auto or portable")
    blocks = {
        "transformer": TransformerConfig,
        "optimizer": OptimizerConfig,
        "ddp": DistributedDataParallelConfig,
    }
    for name, cls in blocks.items():
        known = {f.name for f in dataclasses.fields(cls)}
        problems += [
            f"megatron.{name}.{key}: is not a field of the installed Megatron-Core's {cls.__name__}"
            for key in getattr(config.megatron, name)
            if key not in known
        ]
        problems += [
            f"megatron.{name}.{key}: is decided elsewhere; set {OWNED[name][key]} instead"
            for key in getattr(config.megatron, name)
            if key in OWNED[name]
        ]
    return problems


def transformer_fields(config: Config, family: Family) -> dict[str, Any]:
    """The fields of TransformerConfig that make the model, `megatron.transformer` applied."""
    return {**family.transformer, **config.megatron.transformer}


def transformer_config(config: Config, family: Family) -> TransformerConfig:
    """Megatron-Core's configuration of this model, precision and layout."""
    p = config.parallel
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    fields = dict(
        activation_func=F.silu,
        qk_layernorm=family.qk_norm != "none",
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=p.tensor,
        sequence_parallel=p.tensor > 1,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline,
        context_parallel_size=p.context,
        expert_model_parallel_size=p.expert,
        expert_tensor_parallel_size=p.expert_tensor,
        # Two stages with chunks send each other several tensors at once, which batched sends would mix up.
        overlap_p2p_comm=p.virtual_pipeline is not None,
        batch_p2p_comm=p.virtual_pipeline is None,
        # The fused kernels behind these need Apex or Transformer Engine.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    return TransformerConfig(**{**fields, **transformer_fields(config, family)})


def block_spec(family: Family, fields: TransformerConfig, kind: str, pp_rank: int, vp_stage: int | None):
    """Megatron-Core's own layers for this rank's part of the stack, with our norm and core attention in them."""
    spec = get_gpt_layer_local_spec(num_experts=fields.num_moe_experts, moe_grouped_gemm=False, qk_layernorm=False)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention.core_attention = core_attention_class(kind)
    if family.qk_norm == "after_rope":
        attention.core_attention = ModuleSpec(module=NormAfterRope, params={"inner": attention.core_attention})
    elif family.qk_norm == "before_rope":
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(fields, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def padded_vocab(vocab_size: int, config: Config) -> int:
    """Vocabulary rows of the model, the same on every layout, so that a checkpoint and a loss do not depend on it."""
    return -(-vocab_size // config.model.vocab_multiple) * config.model.vocab_multiple


def build_chunks(config: Config, family: Family, vocab_size: int, groups: Groups) -> list[GPTModel]:
    """This rank's chunks of the bare model on its device, weights drawn from the seeded random states."""
    fields = transformer_config(config, family)
    virtual = config.parallel.virtual_pipeline
    first, last = groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
    chunks = []
    for chunk in range(virtual or 1):
        vp_stage = chunk if virtual else None
        model = GPTModel(
            config=fields,
            transformer_layer_spec=block_spec(family, fields, config.model.attention, groups.pp.rank(), vp_stage),
            vocab_size=padded_vocab(family.vocab_size or vocab_size, config),
            max_sequence_length=max(stage.context_tok for stage in config.stages.values()),
            pre_process=first and chunk == 0,
            post_process=last and chunk == (virtual or 1) - 1,
            share_embeddings_and_output_weights=family.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=next(iter(config.stages.values())).rope_base,
            rope_scaling=family.rope_scaling_factor is not None,
            rope_scaling_factor=family.rope_scaling_factor or 1.0,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        model.rope_scaling_factor = family.rope_scaling_factor  # for set_rope_base: GPTModel does not keep it
        chunks.append(model)
    return chunks


def wrap_for_training(chunks: Sequence[GPTModel], config: Config, groups: Groups) -> list[DistributedDataParallel]:
    """Precision and gradient buffers around the bare chunks; data-parallel replicas start from the same weights."""
    fields = chunks[0].config
    ddp = DistributedDataParallelConfig(
        **{"use_distributed_optimizer": True, "grad_reduce_in_fp32": True, **config.megatron.ddp}
    )
    wrapped = []
    for number, chunk in enumerate(chunks):
        chunk.to(groups.device)
        module = Float16Module(fields, chunk) if fields.bf16 else chunk
        wrapped.append(
            DistributedDataParallel(fields, ddp, module, disable_bucketing=number > 0, pg_collection=groups.collection)
        )
    return wrapped


def bare(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel under whatever wraps it (DDP, Float16Module). Raises ValueError if there is none."""
    while not isinstance(chunk, GPTModel):
        name = type(chunk).__name__
        if "FSDP" in name or "FullySharded" in name:
            raise ValueError(f"model: {name} keeps weights in shards; monitors need DistributedDataParallel or none")
        if not hasattr(chunk, "module"):
            raise ValueError(f"model: {name} is no GPTModel of Megatron-Core; give this rank's chunks")
        chunk = chunk.module
    return chunk


def set_rope_base(chunks: Sequence[torch.nn.Module], base: float) -> None:
    """Give every chunk rotary embeddings of this base, as the start of a stage wants.

    The module stays, for DDP's hooks hang on it; its forward is cached by length and has to forget.
    """
    for chunk in chunks:
        model = bare(chunk)
        factor = getattr(model, "rope_scaling_factor", None)
        rope = RotaryEmbedding(
            model.config.kv_channels, model.rotary_percent, rotary_base=base,
            rope_scaling=factor is not None, rope_scaling_factor=factor or 1.0,
            use_cpu_initialization=model.config.use_cpu_initialization, cp_group=model.rotary_pos_emb.cp_group,
        )  # fmt: skip
        model.rotary_pos_emb.inv_freq = rope.inv_freq
    RotaryEmbedding.forward.cache_clear()


class _Nowhere(TorchFunctionMode):
    """Every tensor is created on the meta device, whatever device the caller names."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_without_memory(config: Config, family: Family, vocab_size: int, groups: Groups) -> list[GPTModel]:
    """This rank's chunks with shapes but no storage: for counting and planning models that do not fit here."""
    no_init = {**config.megatron.transformer, "perform_initialization": False}
    megatron = dataclasses.replace(config.megatron, transformer=no_init)
    with torch.device("meta"), _Nowhere():
        return build_chunks(dataclasses.replace(config, megatron=megatron), family, vocab_size, groups)


def count_parameters(chunks: Sequence[torch.nn.Module], top_k: int | None) -> tuple[int, int]:
    """(total, active for one token) parameters of these chunks; of an expert only top_k / experts are active."""
    total = active = 0
    for chunk in chunks:
        experts = bare(chunk).config.num_moe_experts
        for name, parameter in bare(chunk).named_parameters():
            total += parameter.numel()
            active += parameter.numel() * top_k // experts if ".experts." in name else parameter.numel()
    return total, active
