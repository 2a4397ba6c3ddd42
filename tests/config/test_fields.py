"""Fields of TransformerConfig that contradict each other, the layout or the kernels are refused before anything runs.

Where Megatron-Core itself objects when it is built, it is asked whether it agrees.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from megatron.core.transformer.enums import AttnBackend, AttnMaskType

from megatron_lccp.config.fields import NOT_TRAINED, field_problems
from megatron_lccp.config.load import parse_config
from megatron_lccp.config.tree import Config
from megatron_lccp.model.attention import PortableAttention
from megatron_lccp.model.build import (
    passthrough_problems,
    refused_by_megatron,
    transformer_config,
)
from megatron_lccp.model.quantize import require_single_experts
from megatron_lccp.model.resolved import resolve

HUNYUAN = Path(__file__).resolve().parents[2] / "examples/hunyuan_a13b_64k.yaml"
FP8 = ["--training.fp8=tensorwise"]
FULL = ["--megatron.transformer.recompute_granularity=full"]
SELECTIVE = ["--megatron.transformer.recompute_granularity=selective"]
OFFLOAD = ["--megatron.transformer.fine_grained_activation_offloading=true"]
ONE_STAGE = ["--parallel.pipeline=1"]
FLEX = ["--megatron.transformer.moe_token_dispatcher_type=flex"]
CP8 = ["--parallel.context=8", "--parallel.tensor=1"]


def t(name: str, value: object) -> str:
    return f"--megatron.transformer.{name}={value}"


def config_of(*overrides: str) -> Config:
    plain = ["--megatron={}", "--training.precision=bf16", "--parallel.virtual_pipeline=null", "--parallel.context=1"]
    return parse_config(HUNYUAN, [*plain, *overrides])


def problems_of(config: Config, te_layers: bool = True) -> list[str]:
    return field_problems(config, resolve(config).fields, te_layers)


# overrides, what the one problem says, whether Megatron-Core objects when it is built
REFUSED = [
    ([t("num_layers", 4), t("moe_layer_freq", "[0, 1, 1]")], "moe_layer_freq: [0, 1, 1] should have a 0 or a 1 for "
     "each of 4 layers", False),
    ([t("moe_layer_freq", 0)], "moe_layer_freq: 0 should be a whole number", False),
    (["--model.family=llama3_8b", "--parallel.expert=1", t("moe_layer_freq", 2)], "moe_layer_freq: this model has no "
     "experts", False),
    ([*FP8, "--training.precision=fp32"], "training.fp8: tensorwise needs BF16", False),
    (["--training.measure_in=fp8"], "training.measure_in: fp8 measures", False),
    ([*FP8, "--stages.lccp.context_tok=65544", "--stages.lccp.global_batch_tok=16779264"],
     "stages.lccp.context_tok", False),
    ([*FP8, t("moe_ffn_hidden_size", 3080)], "moe_ffn_hidden_size: leaves 3080 columns", False),
    (["--training.fp8=delayed", t("first_last_layers_bf16", "true")], "first_last_layers_bf16: delayed", True),
    (["--training.fp8=blockwise", t("fp8_dot_product_attention", "true")], "fp8_dot_product_attention", False),
    (["--training.fp8=delayed", *SELECTIVE, t("recompute_modules", "[layernorm]")],
     "layernorm cannot be recomputed", True),
    ([*FP8, t("moe_token_dispatcher_type", "allgather"), t("moe_router_padding_for_quantization", "true")],
     "moe_router_padding_for_quantization: the allgather dispatcher", True),
    ([t("moe_router_padding_for_quantization", "true")],
     "moe_router_padding_for_quantization: has nothing to do", True),
    ([t("fp8_param", "true")], "fp8_param: has nothing to do", True),
    ([t("recompute_granularity", "half")], "recompute_granularity: 'half' should be", True),
    ([t("recompute_modules", "[moe]")], "recompute_modules: has no effect", False),
    ([*SELECTIVE, t("recompute_num_layers", 1)], "recompute_num_layers and recompute_method: have no effect", True),
    ([*SELECTIVE, t("recompute_modules", "[moe, experts]")], "recompute_modules: 'experts' is unknown", True),
    ([*SELECTIVE, t("recompute_modules", "[mla_up_proj]")], "mla_up_proj is a part of", True),
    ([*SELECTIVE, t("recompute_modules", "[shared_experts]"), t("moe_shared_expert_overlap", "true")],
     "shared_experts cannot be recomputed with moe_shared_expert_overlap", True),
    ([*FULL, t("recompute_num_layers", 1)], "recompute_method: None should be", True),
    ([*FULL, t("recompute_method", "uniform")], "recompute_num_layers: None should be 1 to 4", True),
    ([*FULL, t("recompute_method", "block"), t("recompute_num_layers", 5)], "5 should be 1 to 4", False),
    ([t("cpu_offloading", "true"), t("cpu_offloading_num_layers", 2)], "cpu_offloading: knows no pipeline", True),
    ([*ONE_STAGE, t("cpu_offloading", "true"), *SELECTIVE, t("cpu_offloading_num_layers", 2)],
     "cpu_offloading: cannot be combined with recompute_granularity", True),
    ([*ONE_STAGE, t("cpu_offloading", "true"), t("cpu_offloading_num_layers", 32)],
     "32 should be less than the 32", True),
    ([*OFFLOAD], "offload_modules: is empty", True),
    ([*OFFLOAD, t("offload_modules", "[moe]")], "offload_modules: 'moe' is unknown", True),
    ([*OFFLOAD, t("offload_modules", "[attn_proj]")], "add core_attn", True),
    ([*OFFLOAD, t("offload_modules", "[moe_act]"), *SELECTIVE, t("recompute_modules", "[moe]")],
     "moe_act is inside moe", False),
    ([t("offload_modules", "[core_attn]")], "offload_modules: has no effect", False),
    ([t("num_layers", 0)], "num_layers: should be a whole number of at least 1, is 0", False),
    ([t("hidden_size", "'4k'")], "hidden_size: should be a whole number of at least 1, is '4k'", False),
    ([t("num_query_groups", 5)], "num_query_groups: 5 does not divide the attention heads (32)", False),
    ([t("kv_channels", 63)], "kv_channels: 63 is odd", False),
    ([t("moe_router_topk", 65)], "moe_router_topk: 65 should be 1 to 64", False),
    ([t("moe_apply_probs_on_input", "true")], "works with one expert a token only; moe_router_topk is 8", False),
    ([t("moe_router_load_balancing_type", "sinkhorn")], "sinkhorn routing takes no auxiliary loss", False),
    ([t("moe_router_num_groups", 8)], "moe_router_num_groups: has no effect", False),
    ([t("moe_router_num_groups", 16), t("moe_router_group_topk", 1)], "1 groups of 4 experts are asked for 8", False),
    ([t("moe_router_num_groups", 16), t("moe_router_group_topk", 9)], "9 groups of 4 experts are asked for 8", False),
    ([t("add_bias_linear", "true")], "add_bias_linear: the shared expert takes no bias", False),
    ([t("moe_token_dispatcher_type", "all2all")], "'all2all' should be one of", False),
    ([t("moe_token_dispatcher_type", "allgather"), t("moe_shared_expert_overlap", "true")],
     "works with alltoall and flex", True),
    ([t("moe_token_dispatcher_type", "allgather"), t("variable_seq_lengths", "true")],
     "variable_seq_lengths: the allgather", True),
    ([t("moe_enable_deepep", "true")], "moe_enable_deepep: is a backend of flex", True),
    ([*FLEX, "--parallel.expert=1", "--parallel.expert_tensor=1"], "flex needs expert x expert_tensor", False),
    ([*FLEX, t("moe_router_dtype", "fp64")], "moe_router_dtype: the flex dispatcher", False),
    ([*FLEX, t("moe_expert_capacity_factor", 1.0), t("moe_pad_expert_input_to_capacity", "true")],
     "DeepEP cannot", True),
    ([*CP8, t("cp_comm_type", "ring")], "'ring' should be one of", False),
    ([*CP8, t("cp_comm_type", "[p2p, a2a]")], "has 2 entries for 32 layers", True),
    (["--parallel.context=4", "--parallel.tensor=4", t("cp_comm_type", "a2a")], "spreads the 2 key/value heads", False),
    ([*CP8, t("cp_comm_type", "a2a+p2p")], "needs parallel.context_levels", False),
    ([*CP8, t("cp_comm_type", "a2a+p2p"), "--parallel.context_levels=[2, 2]"], "[2, 2] should be two factors", False),
    ([*CP8, "--parallel.context_levels=[2, 4]"], "parallel.context_levels: has no effect", False),
    ([*CP8, t("cp_comm_type", "p2p"), "--model.attention=portable"], "set model.attention: transformer_engine", False),
]  # fmt: skip

MORE_THAN_PLAIN = {
    "window_size": "[128, 0]", "softmax_type": "learnable", "attention_dropout": "0.1", "qk_clip": "true",
    "log_max_attention_logit": "true",
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "text", "megatron_too"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_contradictions_are_refused_in_one_line(overrides: list[str], text: str, megatron_too: bool) -> None:
    config = config_of(*overrides)
    (problem,) = problems_of(config)
    assert text in problem and "\n" not in problem
    assert problem.startswith(("megatron.transformer.", "training.", "stages.", "parallel.")), problem
    if megatron_too:
        assert refused_by_megatron(config, resolve(config))


@pytest.mark.parametrize("name", MORE_THAN_PLAIN)
def test_portable_attention_refuses_what_it_would_ignore(name: str) -> None:
    """Before anything is built, and when it is built by others."""
    config = config_of(t(name, MORE_THAN_PLAIN[name]), "--model.layers=portable")
    (problem,) = problems_of(config, te_layers=False)
    assert problem.startswith(f"megatron.transformer.{name}: portable attention cannot do") and "\n" not in problem
    assert problems_of(config) == []  # where Transformer Engine does it
    fields = transformer_config(config, resolve(config))
    with pytest.raises(ValueError, match=f"megatron.transformer.{name}: portable attention"):
        PortableAttention(fields, 1, AttnMaskType.causal)


GOOD = [
    [],
    [t("num_layers", 4), t("moe_layer_freq", "[0, 1, 1, 0]")],
    [t("moe_layer_freq", 2)],
    [
        "--model.family=hy3",
        *FULL,
        t("recompute_method", "uniform"),
        t("recompute_num_layers", 2),
        t("num_layers_in_first_pipeline_stage", 2),
        t("num_layers_in_last_pipeline_stage", 6),
    ],
    ["--training.fp8=delayed", *SELECTIVE, t("recompute_modules", "[moe, core_attn]")],
    ["--training.fp8=blockwise", "--training.measure_in=fp8", t("moe_router_padding_for_quantization", "true")],
    [*FULL, t("recompute_method", "uniform"), t("recompute_num_layers", 4)],
    [*ONE_STAGE, t("cpu_offloading", "true"), t("cpu_offloading_num_layers", 31)],
    [*OFFLOAD, t("offload_modules", "[core_attn, attn_proj, moe_act]")],
    [*CP8, t("cp_comm_type", "a2a")],
    [*CP8, t("cp_comm_type", "a2a+p2p"), "--parallel.context_levels=[2, 4]"],
    [*CP8, t("cp_comm_type", "[" + "p2p, a2a, " * 15 + "all_gather, p2p]")],
    [t("moe_shared_expert_overlap", "true")],
    [t("moe_router_num_groups", 16), t("moe_router_group_topk", 2)],
    [t("moe_router_num_groups", 16), t("moe_router_group_topk", 8)],
    FLEX,
]


@pytest.mark.parametrize("overrides", GOOD, ids=lambda x: " ".join(x).replace("--megatron.transformer.", "") or "plain")
def test_what_fits_together_is_taken(overrides: list[str]) -> None:
    assert problems_of(config_of(*overrides)) == []


UNTRAINED = {
    "transformer": {
        "calculate_per_token_loss": "true", "heterogeneous_block_specs": "true",
        "mtp_num_layers": 1, "multi_latent_attention": "true", "experimental_attention_variant": "dsa",
        "hybrid_context_parallel": "true", "num_microbatches_with_partial_activation_checkpoints": 1,
        "overlap_moe_expert_parallel_comm": "true", "tp_comm_overlap": "true",
        "apply_residual_connection_post_layernorm": "true", "qk_l2_norm": "true", "moe_router_topk_limited_devices": 2,
        "test_mode": "true", "cuda_graph_impl": "local", "enable_cuda_graph": "true", "external_cuda_graph": "true",
    },
    "optimizer": {
        "optimizer": "sgd", "loss_scale": 65536, "use_precision_aware_optimizer": "true",
        "optimizer_cpu_offload": "true", "overlap_param_gather_with_optimizer_step": "true",
        "grad_norm_skip_threshold": 1.0, "log_num_zeros_in_grad": "true",
    },
    "ddp": {"num_distributed_optimizer_instances": 2, "use_megatron_fsdp": "true", "use_custom_fsdp": "true"},
}  # fmt: skip


@pytest.mark.parametrize(("block", "name"), [(block, name) for block, fields in UNTRAINED.items() for name in fields])
def test_what_would_be_trained_wrongly_is_refused(block: str, name: str) -> None:
    """`calculate_per_token_loss`, say, would multiply every gradient by the number of replicas, without a word."""
    assert NOT_TRAINED[block].keys() == UNTRAINED[block].keys()
    (problem,) = problems_of(config_of(f"--megatron.{block}.{name}={UNTRAINED[block][name]}"))
    assert problem.startswith(f"megatron.{block}.{name}: ") and "cannot be trained here" in problem
    taken = NOT_TRAINED[block][name][0]
    text = {None: "null", math.inf: ".inf"}.get(taken, taken)
    assert problems_of(config_of(f"--megatron.{block}.{name}={text}")) == []


def test_megatron_core_is_asked_about_every_block() -> None:
    assert refused_by_megatron(config_of(), resolve(config_of())) == []
    config = config_of("--megatron.ddp.bucket=1", "--megatron.optimizer.rate=1", t("layers", 2))
    problems = refused_by_megatron(config, resolve(config))
    blocks = [problem.split(": Megatron-Core refuses this: ")[0] for problem in problems]
    assert blocks == ["megatron.transformer", "megatron.optimizer", "megatron.ddp"]


def test_a_layout_of_layers_has_the_chunks_of_the_pipeline() -> None:
    """Megatron-Core would take two for the one that is built, and leave half of the layers out."""
    given = ["--parallel.pipeline=2", t("num_layers", 4)]
    for text, found in (
        ("Et|t|t|tL", ["has 2 chunks for a pipeline stage; set parallel.virtual_pipeline: 2"]),
        ("Et|tttL", []),
    ):
        config = config_of(*given, t("pipeline_model_parallel_layout", f"'{text}'"))
        problems = refused_by_megatron(config, resolve(config))
        assert [problem.split("layout ")[1] for problem in problems] == found


def test_kernels_of_attention_go_by_name() -> None:
    te = "--model.attention=transformer_engine"
    for backend in AttnBackend:
        config = config_of(t("attention_backend", backend.name), te)
        assert problems_of(config) == []
        assert transformer_config(config, resolve(config)).attention_backend is backend
    (problem,) = problems_of(config_of(t("attention_backend", "ring"), te))
    assert "'ring' should be one of auto, flash" in problem
    (problem,) = problems_of(config_of(t("attention_backend", "flash"), "--model.attention=portable"))
    assert "set model.attention: transformer_engine" in problem


@pytest.mark.parametrize(
    "overrides",
    [FP8, [*SELECTIVE, t("recompute_modules", "[moe_act]")], [*ONE_STAGE, t("cpu_offloading", "true")],
     [*OFFLOAD, t("offload_modules", "[core_attn]")], [t("moe_permute_fusion", "true")], [t("moe_latent_size", 64)],
     [t("moe_router_fusion", "true")], [t("use_te_activation_func", "true")]],
)  # fmt: skip
def test_what_needs_transformer_engine_says_so(overrides: list[str]) -> None:
    config = config_of(*overrides)
    assert problems_of(config) == []
    (problem,) = problems_of(config, te_layers=False)
    assert "needs Transformer Engine's layers" in problem and "model.layers" in problem


def test_unknown_fields_have_a_hint_and_machines_are_asked_only_here() -> None:
    def elsewhere(*overrides: str) -> list[str]:
        config = config_of(*overrides)
        return passthrough_problems(config, resolve(config), here=False)

    (problem,) = elsewhere(t("recompute_module", "[moe]"))
    assert problem.endswith("TransformerConfig; did you mean recompute_modules?")
    te = ["--model.layers=transformer_engine", *FP8]
    assert elsewhere(*te) == []
    owned = {"fp8": "training.fp8", "moe_grouped_gemm": "model.layers", "layernorm_zero_centered_gamma": "model.config"}
    (problem,) = elsewhere("--megatron.optimizer.fp16=true")
    assert problem.startswith("megatron.optimizer.fp16: is decided elsewhere; set training.precision")
    for name, by in owned.items():
        (problem,) = elsewhere(t(name, "true"))
        assert f"megatron.transformer.{name}: is decided elsewhere; set {by}" in problem


def test_grouped_experts_are_not_quantized() -> None:
    te, dense = "--model.layers=transformer_engine", ["--model.family=llama3_8b", *ONE_STAGE, "--parallel.expert=1"]
    with pytest.raises(ValueError, match="cannot be quantized; give --model.layers=portable"):
        require_single_experts(config_of(te))
    require_single_experts(config_of("--model.layers=portable"))
    require_single_experts(config_of(te, *dense))


@pytest.mark.parametrize("fp8", ["none", "delayed", "tensorwise", "blockwise"])
def test_recipes_reach_megatron_core(fp8: str) -> None:
    dense = [f"--training.fp8={fp8}", "--model.family=llama3_8b", *ONE_STAGE, "--parallel.expert=1"]
    built = transformer_config(config_of(*dense), resolve(config_of(*dense)))
    assert built.fp8 == {"none": None, "blockwise": "e4m3"}.get(fp8, "hybrid")
    assert built.fp8_recipe == ("delayed" if fp8 == "none" else fp8)  # without FP8 the default has no effect
    assert built.fp8_amax_history_len == (1024 if fp8 == "delayed" else 1)
    given = config_of(*dense, t("fp8_amax_history_len", 16))
    assert transformer_config(given, resolve(given)).fp8_amax_history_len == 16
