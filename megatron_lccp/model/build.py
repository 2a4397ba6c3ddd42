"""Config -> Megatron-Core model on this rank, laid out as the config says.

In: the config, what model it means, the process groups. Out: a list of model chunks (one unless the pipeline is
interleaved), bare or wrapped for training.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_find_correction_range,
    _yarn_linear_ramp_mask,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_lccp.config.fields import field_problems
from megatron_lccp.config.tree import Config, ModelConfig, StageConfig
from megatron_lccp.config.unknown import WORDS, closest
from megatron_lccp.model.attention import NormAfterRope, core_attention_class, has_transformer_engine
from megatron_lccp.model.norm import RMSNorm, te_norm_class
from megatron_lccp.model.resolved import ResolvedModel
from megatron_lccp.model.rope import Rope
from megatron_lccp.model.vocabulary import MaskedGPT
from megatron_lccp.parallel.compat import one_a_layer, scale_rotary
from megatron_lccp.parallel.groups import Groups

# What the weights of a checkpoint fit or do not fit.
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "moe_layer_freq", "add_qkv_bias", "moe_router_enable_expert_bias",
)  # fmt: skip
# By what the same weights are another function; the other fields of TransformerConfig may change on a resume.
FUNCTION = (
    "layernorm_epsilon", "normalization", "layernorm_zero_centered_gamma", "gated_linear_unit", "glu_linear_offset",
    "activation_func_clamp_value", "softmax_scale", "softmax_type", "window_size", "window_attn_skip_freq",
    "rotary_interleaved", "no_rope_freq", "attention_output_gate", "moe_router_pre_softmax",
    "moe_router_score_function", "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk",
    "moe_router_force_load_balancing", "moe_router_force_biased", "moe_apply_probs_on_input",
    "moe_shared_expert_gate", "use_mup", "mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult",
    "mup_output_mult", "mup_base_head_dim", "mup_attn_scale_power",
)  # fmt: skip

# What other fields of the configuration decide; a value passed through beside them would contradict those.
OWNED = {
    "transformer": {
        "tensor_model_parallel_size": "parallel.tensor", "sequence_parallel": "parallel.tensor",
        "pipeline_model_parallel_size": "parallel.pipeline", "context_parallel_size": "parallel.context",
        "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline",
        "expert_model_parallel_size": "parallel.expert", "expert_tensor_parallel_size": "parallel.expert_tensor",
        "bf16": "training.precision", "fp16": "training.precision", "params_dtype": "training.precision",
        "pipeline_dtype": "training.precision", "fp8": "training.fp8", "fp8_recipe": "training.fp8",
        "qk_layernorm": "model.config or model.family", "normalization": "model.config or model.family",
        "layernorm_zero_centered_gamma": "model.config or model.family", "moe_grouped_gemm": "model.layers",
        "hierarchical_context_parallel_sizes": "parallel.context_levels", "activation_func": "model.config or model.family",
    },
    "optimizer": {
        "lr": "stages.NAME.lr", "min_lr": "stages.NAME.min_lr", "weight_decay": "optimizer.weight_decay",
        "clip_grad": "optimizer.clip_grad", "bf16": "training.precision", "fp16": "training.precision",
        "params_dtype": "training.precision", "decoupled_lr": "stages.NAME.lr",
        "decoupled_min_lr": "stages.NAME.min_lr",
        "use_distributed_optimizer": "nothing: checkpoints need it",
    },
    "ddp": {"use_distributed_optimizer": "nothing: checkpoints need it"},
}  # fmt: skip


# What a recipe of training.fp8 is in TransformerConfig. Delayed scaling follows the largest value of many steps, for
# Megatron-Core's own default, the last one, follows every outlier; blocks are scaled finely enough for E4M3 backward.
FP8: dict[str, dict[str, Any]] = {
    "none": {},
    "delayed": {
        "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max",
    },
    "tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}  # fmt: skip


def default_of(name: str) -> Any:
    """What the installed Megatron-Core takes for a field of TransformerConfig that is not given; None if unknown."""
    field = next((f for f in dataclasses.fields(TransformerConfig) if f.name == name), None)
    return None if field is None or field.default is dataclasses.MISSING else field.default


def te_parts(model: ModelConfig) -> tuple[bool, bool]:
    """Whether (layers, core attention) are Transformer Engine's on this machine."""
    layers = model.layers == "transformer_engine" or (model.layers == "auto" and has_transformer_engine())
    return layers, layers if model.attention == "auto" else model.attention == "transformer_engine"


def passthrough_problems(config: Config, resolved: ResolvedModel, here: bool = True) -> list[str]:
    """Fields under `megatron:` that the installed Megatron-Core does not know or that contradict others.

    And kernels that this machine does not have, unless the model is to run elsewhere (`here=False`).
    """
    problems = []
    if here and not has_transformer_engine():
        problems += [
            f"model.{part}: transformer_engine needs a GPU and Transformer Engine; set auto or portable"
            for part in ("layers", "attention")
            if getattr(config.model, part) == "transformer_engine"
        ]
    blocks = {
        "transformer": TransformerConfig,
        "optimizer": OptimizerConfig,
        "ddp": DistributedDataParallelConfig,
    }
    for name, cls in blocks.items():
        known, given = [f.name for f in dataclasses.fields(cls)], getattr(config.megatron, name)
        problems += [
            f"megatron.{name}.{key}: is not a field of the installed Megatron-Core's {cls.__name__}"
            f"{closest(key, known)}"
            for key in given
            if key not in known
        ]
        problems += [
            f"megatron.{name}.{key}: is decided elsewhere; set {OWNED[name][key]} instead"
            for key in given
            if key in OWNED[name]
        ]
    problems += [
        text for name, cls in blocks.items() for text in _wrong_kinds(name, cls, getattr(config.megatron, name))
    ]
    if problems:
        return problems
    te_layers = te_parts(config.model)[0] if here else config.model.layers != "portable"
    return problems + field_problems(config, resolved.fields, te_layers)


def _wrong_kinds(block: str, cls: type, given: Mapping[str, Any]) -> Iterator[str]:
    """Values that are not of the plain type that Megatron-Core gives their field, which it looks at in the first step."""
    hints = typing.get_type_hints(cls)
    for name in given.keys() & hints.keys():
        kinds = [kind for kind in typing.get_args(hints[name]) or (hints[name],) if kind is not type(None)]
        if given[name] is not None and not any(_may_be(given[name], kind) for kind in kinds):
            words = [WORDS[typing.get_origin(kind) or kind] for kind in kinds]
            yield f"megatron.{block}.{name}: should {' or '.join(words)}, is {given[name]!r}"


def _may_be(value: Any, kind: Any) -> bool:
    """False for a value that is not of a plain type, or of a list of one; true where the type says less."""
    if typing.get_origin(kind) is list and typing.get_args(kind)[0] in WORDS:
        return isinstance(value, (list, tuple)) and all(_may_be(one, typing.get_args(kind)[0]) for one in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return type(value) is kind if kind in (bool, int, str) else True


def refused_by_megatron(config: Config, resolved: ResolvedModel) -> list[str]:
    """What Megatron-Core has against the fields that no rule of ours names; of each block its first objection."""
    makers = {
        "transformer": lambda: transformer_config(config, resolved),
        "optimizer": lambda: OptimizerConfig(**{"use_distributed_optimizer": True, **config.megatron.optimizer}),
        "ddp": lambda: ddp_config(config),
    }
    problems = []
    for block, make in makers.items():
        try:
            make()
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"megatron.{block}: Megatron-Core refuses this: {' '.join(str(error).split())}")
    return problems


def transformer_config(config: Config, resolved: ResolvedModel) -> TransformerConfig:
    """Megatron-Core's configuration of this model, precision and layout."""
    p = config.parallel
    dtype = torch.bfloat16 if resolved.precision == "bf16" else torch.float32
    given, (te_layers, _) = dict(resolved.fields), te_parts(config.model)
    te_experts = te_layers and bool(given.get("num_moe_experts"))
    fields = dict(
        activation_func=F.silu,
        qk_layernorm=resolved.description.qk_norm != "none",
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=p.tensor,
        sequence_parallel=p.tensor > 1,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline,
        context_parallel_size=p.context,
        hierarchical_context_parallel_sizes=list(p.context_levels) if p.context_levels else None,
        expert_model_parallel_size=p.expert,
        expert_tensor_parallel_size=p.expert_tensor,
        # Two stages with chunks send each other several tensors at once, which batched sends would mix up.
        overlap_p2p_comm=p.virtual_pipeline is not None,
        batch_p2p_comm=p.virtual_pipeline is None,
        # Transformer Engine adds weight gradients to FP32 sums inside the product; the embedding needs Apex for it.
        gradient_accumulation_fusion=te_layers and tensor_parallel_layers._grad_accum_fusion_available,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=te_layers,
        moe_grouped_gemm=te_experts,
        moe_permute_fusion=te_experts,
    )
    if "attention_backend" in given:  # as a text, Megatron-Core would take none of its kernels for the one meant
        given["attention_backend"] = AttnBackend[given["attention_backend"]]
    made = TransformerConfig(**{**fields, **FP8[config.training.fp8], **given})
    if (chunks := made.virtual_pipeline_model_parallel_size) != p.virtual_pipeline:  # it sets that without a word
        text = f"has {chunks} chunks for a pipeline stage; set parallel.virtual_pipeline: {chunks}"
        raise ValueError(f"pipeline_model_parallel_layout {text}")
    if isinstance(made.cp_comm_type, list):
        made.cp_comm_type = one_a_layer(made.cp_comm_type)
    return made


def layer_spec(resolved: ResolvedModel, fields: TransformerConfig, model: ModelConfig, layer: int) -> ModuleSpec:
    """Megatron-Core's own layer with our norm and core attention in it; the number of the layer is from 0."""
    te_layers, te_attention = te_parts(model)
    experts, norm = fields.num_moe_experts if resolved.shape.routed[layer] else None, norm_class(model)
    if te_layers:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=fields.moe_grouped_gemm, qk_layernorm=False
        )
        # Where Transformer Engine cannot fuse this norm, in front of experts, a checkpoint of portable layers has it
        # under the name of the fused one: one name for both.
        spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        if experts:  # else it is part of the first linear layer
            spec.submodules.pre_mlp_layernorm = norm
    else:
        spec = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False, qk_layernorm=False)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = core_attention_class(te_attention)
    if resolved.shape.qk_norm == "after_rope":
        parts = {"inner": attention.core_attention, "norm": norm}
        attention.core_attention = ModuleSpec(module=NormAfterRope, params=parts)
    elif resolved.shape.qk_norm == "before_rope":
        attention.q_layernorm = attention.k_layernorm = norm
    return spec


def norm_class(model: ModelConfig) -> type[torch.nn.Module]:
    """The norm of layers and of the end of the stack."""
    return te_norm_class() if te_parts(model)[0] else RMSNorm


def block_spec(
    resolved: ResolvedModel, fields: TransformerConfig, model: ModelConfig, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this rank's part of the stack."""
    first = get_transformer_layer_offset(fields, vp_stage, pp_rank)
    layers = range(first, first + get_num_layers_to_build(fields, vp_stage, pp_rank))
    specs = [layer_spec(resolved, fields, model, layer) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm_class(model))


def build_chunks(config: Config, resolved: ResolvedModel, groups: Groups) -> list[GPTModel]:
    """This rank's chunks of the bare model on its device, weights drawn from the seeded random states."""
    fields, found = transformer_config(config, resolved), resolved.description
    virtual = config.parallel.virtual_pipeline
    first, last = groups.pp.rank() == 0, groups.pp.rank() == groups.pp.size() - 1
    chunks = []
    for chunk in range(virtual or 1):
        vp_stage = chunk if virtual else None
        model = MaskedGPT(
            config=fields,
            transformer_layer_spec=block_spec(resolved, fields, config.model, groups.pp.rank(), vp_stage),
            vocab_size=resolved.vocab_rows,
            max_sequence_length=max(stage.context_tok for stage in config.stages.values()),
            pre_process=first and chunk == 0,
            post_process=last and chunk == (virtual or 1) - 1,
            share_embeddings_and_output_weights=found.tied_embeddings,
            position_embedding_type="rope",
            rotary_percent=found.rotary_percent,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        model.vocabulary, model.own_rope = resolved.vocabulary, found.rope
        chunks.append(model)
    set_rope(chunks, next(iter(config.stages.values())))
    return chunks


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """How gradients are reduced; `megatron.ddp` wins over our fields."""
    ours = {"use_distributed_optimizer": True, "grad_reduce_in_fp32": True}
    return DistributedDataParallelConfig(**{**ours, **config.megatron.ddp})


def wrap_for_training(chunks: Sequence[GPTModel], config: Config, groups: Groups) -> list[DistributedDataParallel]:
    """Precision and gradient buffers around the bare chunks; data-parallel replicas start from the same weights."""
    fields = chunks[0].config
    ddp = ddp_config(config)
    wrapped = []
    for number, chunk in enumerate(chunks):
        module = in_precision(chunk.to(groups.device))
        wrapped.append(
            DistributedDataParallel(fields, ddp, module, disable_bucketing=number > 0, pg_collection=groups.collection)
        )
    return wrapped


def in_precision(chunk: GPTModel) -> MegatronModule:
    """The bare chunk in the precision of its configuration; what routers keep beside weights stays FP32.

    Float16Module would round their biases, which decide between experts that score alike, and count their tokens in
    BF16, which knows no odd number above 256.
    """
    if not chunk.config.bf16:
        return chunk
    routers = [module for module in chunk.modules() if isinstance(module, Router)]
    kept = [(router, dict(router.named_buffers(recurse=False))) for router in routers]
    wrapped = Float16Module(chunk.config, chunk)
    for router, buffers in kept:
        for name, buffer in buffers.items():
            setattr(router, name, buffer)
    return wrapped


def bare(chunk: MegatronModule) -> GPTModel:
    """The GPTModel under whatever wraps it (DDP, Float16Module). Raises ValueError if there is none."""
    while not isinstance(chunk, GPTModel):
        name = type(chunk).__name__
        if "FSDP" in name or "FullySharded" in name:
            raise ValueError(f"model: {name} keeps weights in shards; monitors need DistributedDataParallel or none")
        if not hasattr(chunk, "module"):
            raise ValueError(f"model: {name} is no GPTModel of Megatron-Core; give this rank's chunks")
        chunk = chunk.module
    return chunk


def set_rope(chunks: Sequence[torch.nn.Module], stage: StageConfig) -> None:
    """Give every chunk that `build_chunks` made the rotary embedding of a stage.

    The module stays, for DDP's hooks hang on it; its forward is cached by length and has to forget.
    """
    for chunk in chunks:
        model = bare(chunk)
        rope = model.own_rope.of_stage(stage)
        model.rotary_pos_emb.inv_freq = _frequencies(model, rope)
        scale_rotary(model, rope.attention)
    RotaryEmbedding.forward.cache_clear()


def _frequencies(model: GPTModel, rope: Rope) -> torch.Tensor:
    """Radians a token of each pair of a head's rotated part, by Megatron-Core's own functions.

    Its own rotary embedding knows Llama 3.1's stretching with its published values alone, and YaRN of whole heads alone.
    """
    plain = RotaryEmbedding(
        model.config.kv_channels, model.rotary_percent, rotary_base=rope.base,
        use_cpu_initialization=model.config.use_cpu_initialization, cp_group=model.rotary_pos_emb.cp_group,
    )  # fmt: skip
    freq_p = plain.inv_freq
    if rope.kind == "linear":
        return freq_p / rope.factor
    if rope.kind == "llama3":
        return plain._apply_scaling(freq_p, rope.factor, rope.slow, rope.fast, rope.original_tok)
    if rope.kind == "plain":
        return freq_p
    ends = rope.fast, rope.slow, 2 * len(freq_p), rope.base, rope.original_tok, rope.whole
    stretched_p = _yarn_linear_ramp_mask(*_yarn_find_correction_range(*ends), len(freq_p), device=freq_p.device)
    return freq_p / rope.factor * stretched_p + freq_p * (1 - stretched_p)
