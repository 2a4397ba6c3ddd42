"""Fields of Megatron-Core's TransformerConfig that contradict each other, the layout or the kernels.

In: a `Config`, the model's fields with `megatron.transformer` applied, whether its layers are Transformer Engine's.
Out: every problem as one line that names the field and the remedy. Nothing is imported from torch or Megatron, which
checks the same later, one at a time, some only in the first step (0.16.1 and 0.19.2: transformer_config.py,
transformer_block.py, moe/token_dispatcher.py; Transformer Engine: context_parallel.py, recipe/__init__.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_lccp.config.rules import size_problems
from megatron_lccp.config.tree import Config

RECOMPUTED = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
OFFLOADED = ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act")
CONTEXT = ("p2p", "all_gather", "a2a", "a2a+p2p")
DISPATCHERS = ("allgather", "alltoall", "flex")
PLAIN_ATTENTION: dict[str, Any] = {
    "window_size": None, "softmax_type": "vanilla", "attention_dropout": 0.0, "qk_clip": False,
    "log_max_attention_logit": False,
}  # fmt: skip
"""What portable attention does, by the field that asks another kernel for more."""
FP8_TOKENS = 16
"""Rows and columns of an FP8 product are multiples of this."""

BACKENDS = ("auto", "flash", "fused", "unfused", "local")
"""Names of Megatron-Core's AttnBackend (transformer/enums.py)."""
NOT_TRAINED: dict[str, dict[str, tuple[Any, str]]] = {
    "transformer": {
        "calculate_per_token_loss": (False, "losses here are means, and gradients would not be averaged over replicas"),
        "heterogeneous_block_specs": (False, "all layers are built alike"),
        "mtp_num_layers": (None, "no layers that predict further tokens are built"),
        "multi_latent_attention": (False, "no such attention is built"),
        "experimental_attention_variant": (None, "no such attention is built"),
        "hybrid_context_parallel": (False, "sequences are cut alike on all ranks"),
        "num_microbatches_with_partial_activation_checkpoints": (None, "the forward step does not take turns"),
        "overlap_moe_expert_parallel_comm": (False, "the forward step gives no plan of its layers"),
        "tp_comm_overlap": (False, "its buffers are made by Megatron-LM's own start alone"),
        "apply_residual_connection_post_layernorm": (False, "layers of Megatron-Core do not look at it"),
        "cuda_graph_impl": ("none", "the loop records no graphs"),
        "enable_cuda_graph": (False, "the loop records no graphs"),
        "external_cuda_graph": (False, "the loop records no graphs"),
        "test_mode": (False, "it wants a norm of queries and keys before RoPE, and changes nothing"),
        "qk_l2_norm": (False, "the model says which norm is built"),
        "moe_router_topk_limited_devices": (None, "routing would depend on the layout; set moe_router_group_topk"),
    },
    "optimizer": {
        "optimizer": ("adam", "checkpoints keep Adam's state alone"),
        "loss_scale": (None, "losses are not scaled, and gradients would be divided by it"),
        "use_precision_aware_optimizer": (False, "its gradients would be neither clipped nor its state resumed"),
        "optimizer_cpu_offload": (False, "its state would not be resumed"),
        "overlap_param_gather_with_optimizer_step": (False, "it takes two chunks apart that are updated together"),
        "grad_norm_skip_threshold": (math.inf, "only a step whose gradient is not finite is skipped"),
        "log_num_zeros_in_grad": (False, "nothing writes them down"),
    },
    "ddp": {
        "num_distributed_optimizer_instances": (1, "one instance is started"),
        "use_megatron_fsdp": (False, "weights are whole on every replica"),
        "use_custom_fsdp": (False, "weights are whole on every replica"),
    },
}  # fmt: skip
"""Fields that this training would take wrongly, some of them without a word: the value that it takes, and why."""

TE_ONLY = ("moe_permute_fusion", "moe_router_fusion", "moe_latent_size", "use_te_activation_func")
NEEDS_TE = "needs Transformer Engine's layers, so a GPU; set model.layers: transformer_engine there"


def field_problems(config: Config, fields: Mapping[str, Any], te_layers: bool) -> list[str]:
    """Every problem; `te_layers` says whether the layers are, or would be, Transformer Engine's."""
    found = size_problems(fields) or [
        *_not_trained(config),
        *_number_problems(config, fields),
        *_fp8_problems(config, te_layers),
        *(f"megatron.transformer.{name}: {NEEDS_TE}" for name in TE_ONLY if fields.get(name) and not te_layers),
        *(
            f"megatron.transformer.{text}"
            for problems in (
                _head_problems,
                _quantized_problems,
                _recompute_problems,
                _offload_problems,
                _router_problems,
                _pattern_problems,
                _dispatch_problems,
            )
            for text in problems(config, fields, te_layers)
        ),
        *_attention_problems(config, fields, te_layers),
        *_context_problems(config, fields, te_layers),
    ]
    return found


def _number_problems(config: Config, f: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that torch would stop at in the first step, or that would make the loss none."""
    for name, least, word in (("layernorm_epsilon", 0.0, "above"), ("init_method_std", 0.0, "at least")):
        value = f.get(name)
        if value is not None and not (least < value < math.inf or (word == "at least" and value == least)):
            yield f"megatron.transformer.{name}: should be {word} {least:g}, is {value}"
    bucket = config.megatron.ddp.get("bucket_size")
    if bucket is not None and bucket < 1:
        yield f"megatron.ddp.bucket_size: should be at least 1, is {bucket}"


def _not_trained(config: Config) -> Iterator[str]:
    for block, fields in NOT_TRAINED.items():
        for name, given in getattr(config.megatron, block).items():
            taken, why = fields.get(name, (given, ""))
            if given != taken:
                yield f"megatron.{block}.{name}: {given!r} cannot be trained here ({why}); leave it out"


def _fp8_problems(config: Config, te_layers: bool) -> Iterator[str]:
    training, p = config.training, config.parallel
    if training.fp8 == "none":
        if training.measure_in == "fp8":
            yield "training.measure_in: fp8 measures what trains in FP8; set bf16 or a recipe in training.fp8"
        return
    if not te_layers:
        yield f"training.fp8: {training.fp8} {NEEDS_TE}"
    if training.precision == "fp32":
        yield f"training.fp8: {training.fp8} needs BF16 beside it; set training.precision: bf16"
    multiple = FP8_TOKENS * p.tensor * p.context
    for name, stage in config.stages.items():
        if stage.context_tok * stage.micro_batch % multiple:
            yield (
                f"stages.{name}.context_tok: {stage.context_tok} x micro_batch is not a multiple of {multiple}, as "
                f"training.fp8 wants: {FP8_TOKENS} tokens x parallel.tensor x parallel.context"
            )


def _head_problems(config: Config, f: Mapping[str, Any], te_layers: bool) -> Iterator[str]:
    heads, groups = f["num_attention_heads"], f.get("num_query_groups")
    if groups and heads % groups:
        yield f"num_query_groups: {groups} does not divide the attention heads ({heads})"
    if (width := f.get("kv_channels") or f["hidden_size"] // heads) % 2:
        yield f"kv_channels: {width} is odd; the rotary embedding turns pairs"


def _quantized_problems(config: Config, f: Mapping[str, Any], te_layers: bool) -> Iterator[str]:
    recipe = config.training.fp8
    if recipe == "none":
        for name in ("fp8_param", "fp8_dot_product_attention", "fp8_multi_head_attention", "first_last_layers_bf16",
                     "moe_router_padding_for_quantization", "moe_router_padding_for_fp8"):  # fmt: skip
            if f.get(name):
                yield f"{name}: has nothing to do without training.fp8; leave it out"
        return
    if recipe == "delayed" and f.get("first_last_layers_bf16"):
        yield "first_last_layers_bf16: delayed scaling has one context for all layers; set training.fp8: tensorwise"
    if recipe == "blockwise" and (f.get("fp8_dot_product_attention") or f.get("fp8_multi_head_attention")):
        yield "fp8_dot_product_attention: blockwise scaling has no FP8 attention; leave it out"
    padded = f.get("moe_router_padding_for_quantization") or f.get("moe_router_padding_for_fp8")
    if padded and f.get("moe_token_dispatcher_type", "allgather") == "allgather":
        yield "moe_router_padding_for_quantization: the allgather dispatcher cannot; set moe_token_dispatcher_type"
    for name, of in _widths(config, f).items():
        if of % FP8_TOKENS:
            yield f"{name}: leaves {of} columns to a rank; training.fp8 needs a multiple of {FP8_TOKENS}"


def _widths(config: Config, f: Mapping[str, Any]) -> dict[str, int]:
    """Columns of the matrices that a rank multiplies, by the field that decides them."""
    tensor, experts = config.parallel.tensor, config.parallel.expert_tensor or config.parallel.tensor
    widths = {"hidden_size": f["hidden_size"]}
    for name, ranks in (
        ("ffn_hidden_size", tensor), ("moe_shared_expert_intermediate_size", tensor), ("moe_ffn_hidden_size", experts)
    ):  # fmt: skip
        if f.get(name):
            widths[name] = f[name] // ranks
    return widths


def _recompute_problems(config: Config, f: Mapping[str, Any], te_layers: bool) -> Iterator[str]:
    granularity, modules = f.get("recompute_granularity"), f.get("recompute_modules") or ()
    method, layers = f.get("recompute_method"), f.get("recompute_num_layers")
    if granularity not in (None, "full", "selective"):
        yield f"recompute_granularity: {granularity!r} should be full or selective"
    if granularity != "selective" and modules:
        yield "recompute_modules: has no effect; set recompute_granularity: selective"
    if granularity != "full" and (method is not None or layers is not None):
        yield "recompute_num_layers and recompute_method: have no effect; set recompute_granularity: full"
    if granularity == "full":
        mine = _fewest_layers(config, f)
        if method not in ("block", "uniform"):
            yield f"recompute_method: {method!r} should be block or uniform where recompute_granularity is full"
        if not isinstance(layers, int) or not 1 <= layers <= mine:
            yield f"recompute_num_layers: {layers!r} should be 1 to {mine}, the layers of a pipeline stage's chunk"
    if granularity != "selective":
        return
    if unknown := sorted(set(modules) - set(RECOMPUTED)):
        yield f"recompute_modules: {unknown[0]!r} is unknown; there are {', '.join(RECOMPUTED)}"
    if "moe_act" in modules and not te_layers:
        yield f"recompute_modules: moe_act {NEEDS_TE}, or recompute moe"
    if "mla_up_proj" in modules:
        yield "recompute_modules: mla_up_proj is a part of multi-latent attention; leave it out"
    if "shared_experts" in modules and f.get("moe_shared_expert_overlap"):
        yield "recompute_modules: shared_experts cannot be recomputed with moe_shared_expert_overlap; drop one of them"
    if config.training.fp8 == "delayed" and (late := sorted({"moe_act", "layernorm"} & set(modules))):
        yield f"recompute_modules: {late[0]} cannot be recomputed under delayed scaling; set another training.fp8"


def _fewest_layers(config: Config, f: Mapping[str, Any]) -> int:
    """Layers of the smallest chunk of a pipeline stage."""
    p = config.parallel
    ends = [f.get(f"num_layers_in_{which}_pipeline_stage") for which in ("first", "last")]
    given = [layers for layers in ends if type(layers) is int]
    middle = p.pipeline - len(given)
    stages = [*given, *([(f["num_layers"] - sum(given)) // middle] if middle > 0 else [])]
    return min(stages) // (p.virtual_pipeline or 1)


def _offload_problems(config: Config, f: Mapping[str, Any], te_layers: bool) -> Iterator[str]:
    whole, parts = f.get("cpu_offloading"), f.get("fine_grained_activation_offloading")
    modules = f.get("offload_modules") or ()
    if whole:
        if not te_layers:
            yield f"cpu_offloading: {NEEDS_TE}"
        if config.parallel.pipeline > 1:
            yield "cpu_offloading: knows no pipeline; set parallel.pipeline: 1 or fine_grained_activation_offloading"
        if f.get("recompute_granularity") is not None:
            yield "cpu_offloading: cannot be combined with recompute_granularity; drop one of them"
        if not 0 <= (count := f.get("cpu_offloading_num_layers") or 0) < f["num_layers"]:
            yield f"cpu_offloading_num_layers: {count} should be less than the {f['num_layers']} layers"
        if parts:
            yield "fine_grained_activation_offloading: cannot be combined with cpu_offloading; drop one of them"
    if modules and not parts:
        yield "offload_modules: has no effect; set fine_grained_activation_offloading: true"
    if not parts:
        return
    if not te_layers:
        yield f"fine_grained_activation_offloading: {NEEDS_TE}"
    if not modules:
        yield f"offload_modules: is empty; name some of {', '.join(OFFLOADED)}"
    if unknown := sorted(set(modules) - set(OFFLOADED)):
        yield f"offload_modules: {unknown[0]!r} is unknown; there are {', '.join(OFFLOADED)}"
    if "attn_proj" in modules and "core_attn" not in modules:
        yield "offload_modules: attn_proj takes what core_attn gives, which its backward needs; add core_attn"
    if inside := sorted({"moe_act", "expert_fc1"} & set(modules)):
        if f.get("recompute_granularity") == "selective" and "moe" in (f.get("recompute_modules") or ()):
            yield f"offload_modules: {inside[0]} is inside moe, which recompute_modules recomputes; drop one of them"


def _router_problems(config: Config, f: Mapping[str, Any], te_layers: bool) -> Iterator[str]:
    experts, top = f.get("num_moe_experts"), f.get("moe_router_topk", 2)
    groups, chosen = f.get("moe_router_num_groups"), f.get("moe_router_group_topk")
    if not experts:
        return
    if not 1 <= top <= experts:
        yield f"moe_router_topk: {top} should be 1 to {experts}, the experts"
    elif f.get("moe_apply_probs_on_input") and top > 1:
        yield f"moe_apply_probs_on_input: works with one expert a token only; moe_router_topk is {top}"
    elif f.get("moe_router_load_balancing_type") == "sinkhorn" and f.get("moe_aux_loss_coeff"):
        yield "moe_aux_loss_coeff: sinkhorn routing takes no auxiliary loss; set 0"
    elif groups and not chosen:
        yield "moe_router_num_groups: has no effect; set moe_router_group_topk"
    elif groups and experts % groups == 0 and not chosen <= top <= chosen * experts // groups:
        yield (
            f"moe_router_group_topk: {chosen} groups of {experts // groups} experts are asked for {top} experts; they "
            f"should be {chosen} to {chosen * experts // groups}"
        )


def _pattern_problems(config: Config, f: Mapping[str, Any], te_layers: bool) -> Iterator[str]:
    pattern, layers = f.get("moe_layer_freq", 1), f["num_layers"]
    if pattern == 1:
        return
    if not f.get("num_moe_experts"):
        yield "moe_layer_freq: this model has no experts; leave it out"
    elif isinstance(pattern, (list, tuple)):
        if len(pattern) != layers or {*pattern} - {0, 1}:
            yield f"moe_layer_freq: {list(pattern)} should have a 0 or a 1 for each of {layers} layers"
    elif type(pattern) is not int or pattern < 1:
        yield f"moe_layer_freq: {pattern!r} should be a whole number of at least 1, or a list of 0 and 1"


def _dispatch_problems(config: Config, f: Mapping[str, Any], te_layers: bool) -> Iterator[str]:
    if not f.get("num_moe_experts"):
        return
    kind, backend = f.get("moe_token_dispatcher_type", "allgather"), f.get("moe_flex_dispatcher_backend", "deepep")
    if kind not in DISPATCHERS:
        yield f"moe_token_dispatcher_type: {kind!r} should be one of {', '.join(DISPATCHERS)}"
    if f.get("add_bias_linear") and f.get("moe_shared_expert_intermediate_size"):
        yield "add_bias_linear: the shared expert takes no bias; leave it out"
    if f.get("moe_shared_expert_overlap"):
        if kind == "allgather":
            yield "moe_shared_expert_overlap: works with alltoall and flex; set moe_token_dispatcher_type"
        if not f.get("moe_shared_expert_intermediate_size"):
            yield "moe_shared_expert_overlap: this model has no shared expert; leave it out"
    if kind == "allgather" and f.get("variable_seq_lengths"):
        yield "variable_seq_lengths: the allgather dispatcher cannot; set moe_token_dispatcher_type: alltoall"
    if f.get("moe_enable_deepep") and kind != "flex":
        yield "moe_enable_deepep: is a backend of flex; set moe_token_dispatcher_type: flex"
    if kind != "flex":
        return
    if (config.parallel.expert_tensor or config.parallel.tensor) * config.parallel.expert < 2:
        yield "moe_token_dispatcher_type: flex needs expert x expert_tensor ranks above 1; set alltoall, or raise them"
    if f.get("moe_router_dtype") != "fp32":
        yield "moe_router_dtype: the flex dispatcher takes FP32 probabilities only; set fp32"
    if f.get("moe_pad_expert_input_to_capacity") and backend == "deepep":
        yield "moe_pad_expert_input_to_capacity: DeepEP cannot; set moe_flex_dispatcher_backend: hybridep"


def _portable_attention(config: Config, te_layers: bool) -> bool:
    return config.model.attention == "portable" or (config.model.attention == "auto" and not te_layers)


def _attention_problems(config: Config, f: Mapping[str, Any], te_layers: bool) -> Iterator[str]:
    name = "megatron.transformer.attention_backend"
    if (backend := f.get("attention_backend", "auto")) not in BACKENDS:
        yield f"{name}: {backend!r} should be one of {', '.join(BACKENDS)}"
    if not _portable_attention(config, te_layers):
        return
    if backend in BACKENDS[1:]:
        yield f"{name}: chooses among Transformer Engine's kernels; set model.attention: transformer_engine"
    yield from beyond_plain_attention(f)


def beyond_plain_attention(f: Mapping[str, Any]) -> list[str]:
    """Fields of TransformerConfig that portable attention would ignore."""
    return [
        f"megatron.transformer.{name}: portable attention cannot do {f[name]!r}; set {plain!r}, or model.attention: "
        "transformer_engine on a GPU"
        for name, plain in PLAIN_ATTENTION.items()
        if f.get(name, plain) != plain
    ]


def _context_problems(config: Config, f: Mapping[str, Any], te_layers: bool) -> Iterator[str]:
    """Context parallelism by Transformer Engine, whose all-to-all hands each rank some of the heads."""
    p, given = config.parallel, f.get("cp_comm_type")
    kinds = list(given) if isinstance(given, (list, tuple)) else [given] * (given is not None)
    name = "megatron.transformer.cp_comm_type"
    if isinstance(given, (list, tuple)) and len(kinds) != f["num_layers"]:
        yield f"{name}: has {len(kinds)} entries for {f['num_layers']} layers; give one for all, or one for each"
    if unknown := [kind for kind in kinds if kind not in CONTEXT]:
        yield f"{name}: {unknown[0]!r} should be one of {', '.join(CONTEXT)}"
    if kinds and p.context > 1 and _portable_attention(config, te_layers):
        yield f"{name}: portable attention gathers keys and values; set model.attention: transformer_engine"
    levels = p.context_levels
    if levels is not None and (len(levels) != 2 or min(levels) < 1 or math.prod(levels) != p.context):
        yield f"parallel.context_levels: {list(levels)} should be two factors of parallel.context ({p.context})"
        return
    if levels is not None and "a2a+p2p" not in kinds:
        yield f"parallel.context_levels: has no effect; set {name}: a2a+p2p"
    if "a2a+p2p" in kinds and levels is None and p.context > 1:
        yield f"{name}: a2a+p2p needs parallel.context_levels, two factors of parallel.context ({p.context})"
    groups = f.get("num_query_groups") or f["num_attention_heads"]
    here = max(1, groups // p.tensor)
    for kind, ranks in (("a2a", p.context), ("a2a+p2p", levels[0] if levels else 1)):
        if kind in kinds and here % ranks:
            yield f"{name}: {kind} spreads the {here} key/value heads of a rank over {ranks} ranks; set p2p"
