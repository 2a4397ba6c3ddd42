"""config.json of Hugging Face -> what the model is, for the architectures that Megatron-Core can build.

In: the tree of a config.json, or its path. Out: `Description`: fields of Megatron-Core's TransformerConfig by their own
names, and what these leave open. A family is one with a config.json of its own (families.py). What a file does not say
means what it means to transformers; what would change the forward pass and has no place here is refused, not ignored.
Nothing is imported from torch or Megatron.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lccp.model.rope import Rope, rope_of
from megatron_lccp.model.shape import QKNorm, Shape, shape_of

ELSEWHERE = "`lccp measure --hf` measures such a model on transformers"
SIZES = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "num_experts", "n_routed_experts",
)  # fmt: skip


@dataclass(frozen=True)
class Names:
    """How an architecture calls its parts, and what of it no field of its config.json says."""

    model_type: str
    qk_norm: QKNorm
    queries: str = "q_norm"
    keys: str = "k_norm"
    qkv_bias: bool = False
    """Whether it has one whatever its config.json says."""
    router: str | None = None
    router_bias: str | None = None
    """Of a router that scores each expert by itself."""
    shared: str | None = None
    rotary_percent: float = 1.0
    """Where its config.json says nothing of it."""
    static_alpha: bool = False
    """Whether an alpha in its rotary embedding raises the base, at any length."""
    reads: tuple[str, ...] = ()
    """Keys that are read, where other architectures have to be PLAIN."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes where the file is silent, unless all take the same."""


ARCHITECTURES = {
    "HunYuanDenseV1ForCausalLM": Names(
        "hunyuan_v1_dense", "after_rope", "query_layernorm", "key_layernorm", static_alpha=True
    ),
    "HunYuanMoEV1ForCausalLM": Names(
        "hunyuan_v1_moe", "after_rope", "query_layernorm", "key_layernorm", router="mlp.gate.wg",
        shared="mlp.shared_mlp", static_alpha=True,
    ),
    "LlamaForCausalLM": Names("llama", "none"),
    "MistralForCausalLM": Names("mistral", "none", defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "Qwen2ForCausalLM": Names("qwen2", "none", qkv_bias=True, defaults={"num_key_value_heads": 32}),
    "Qwen3ForCausalLM": Names("qwen3", "before_rope", defaults={"num_key_value_heads": 32, "head_dim": 128}),
    "Qwen3MoeForCausalLM": Names(
        "qwen3_moe", "before_rope", router="mlp.gate",
        defaults={"num_key_value_heads": 4, "moe_intermediate_size": 768},
    ),
    "Glm4MoeForCausalLM": Names(
        "glm4_moe", "before_rope", router="mlp.gate", router_bias="mlp.gate.e_score_correction_bias",
        shared="mlp.shared_experts", rotary_percent=0.5,
        reads=("attention_bias", "use_qk_norm", "routed_scaling_factor", "n_group", "topk_group"),
        defaults={"num_key_value_heads": 8, "moe_intermediate_size": 1408},
    ),
    "HYV3ForCausalLM": Names(
        "hy_v3", "before_rope", router="mlp.router.gate", router_bias="mlp.expert_bias", shared="mlp.shared_mlp",
        defaults={"num_key_value_heads": 8, "head_dim": 128, "moe_intermediate_size": 1536,
                  "rope_theta": 11_158_840.0, "router_scaling_factor": 2.826},
    ),
}  # fmt: skip

# What would change the forward pass and has no place in our models: the values with which it does not.
PLAIN = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "use_cla": (False,), "use_mla": (False,), "use_qk_norm": (True,), "use_mixed_mlp_moe": (True,),
    "moe_layer_num_skipped": (0,), "num_shared_expert": (1,), "norm_type": ("rms",), "routed_scaling_factor": (1.0,),
    "n_group": (1,), "topk_group": (1,), "group_limited_greedy": (False,), "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],), "layer_types": ("full_attention",), "quantization_config": (),
}  # fmt: skip

# How all of these models are built, and what training them takes that no config.json decides.
BUILT = {"normalization": "RMSNorm", "add_bias_linear": False, "gated_linear_unit": True}
RECIPE = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
ROUTED = {"moe_router_dtype": "fp32", "moe_token_dispatcher_type": "alltoall"}
BALANCED = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-3}
BALANCED_BY_BIAS = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1e-4}
"""A small loss within sequences beside the bias (GLM-4.5's report, arXiv 2508.06471, 2.4)."""


@dataclass(frozen=True)
class Description:
    """What a model is."""

    architecture: str
    """As `architectures` of config.json calls it."""
    transformer: dict[str, Any]
    """Fields of TransformerConfig that decide what its weights compute."""
    recipe: dict[str, Any]
    """Fields of TransformerConfig by which such a model is trained, unless others are given."""
    vocab_size: int | None
    """Tokens in the vocabulary before padding; None takes the tokenizer's."""
    tied_embeddings: bool
    """One matrix for the input embedding and the output layer."""
    qk_norm: QKNorm
    """RMSNorm over each query and key head, and on which side of the rotary embedding it stands."""
    rope: Rope
    """Its rotary embedding, as its weights were trained."""
    rotary_percent: float = 1.0
    """Share of a head that the rotary embedding turns."""
    dense_layers: int | None = None
    """First layers without experts, where its file says how many rather than which."""

    @property
    def names(self) -> Names:
        return ARCHITECTURES[self.architecture]

    @property
    def vocabulary(self) -> int:
        """Tokens, of a model that says so."""
        assert self.vocab_size is not None
        return self.vocab_size

    def fields(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The fields of TransformerConfig that make the model, with those `given` in place of its own."""
        fields = {**self.recipe, **self.transformer, **(given or {})}
        if self.dense_layers is not None and type(layers := fields["num_layers"]) is int:
            fields |= {"moe_layer_freq": _routed(self.dense_layers, layers), **(given or {})}
        return fields

    @cached_property
    def shape(self) -> Shape:
        """What its layers consist of."""
        return self.shape_with(self.fields())

    def shape_with(self, fields: Mapping[str, Any]) -> Shape:
        """What layers consist of with these fields."""
        return shape_of(fields, self.qk_norm, self.tied_embeddings, self.rotary_percent)


def read_config(path: Path) -> tuple[Description, str]:
    """What a config.json, or that of a folder, says, and its text. ValueError names the file and what is wrong."""
    path = path if path.suffix == ".json" else path / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
        found = describe(_sizes_checked(json.loads(text)))
        if found.vocab_size is None:
            raise ValueError("vocab_size: is missing")
        return found, text
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def _sizes_checked(config: Any) -> dict[str, Any]:
    """A config.json whose sizes are such, if they are there. ValueError names the first that is none."""
    if not isinstance(config, dict):
        raise ValueError("is no object of JSON; name the folder of a model of Hugging Face's")
    for name in SIZES:
        for size in value if isinstance(value := config.get(name), list) else [value]:  # by layer, in some models
            if size is not None and not (type(size) is int and 0 < size < 1 << 31):
                raise ValueError(f"{name}: should be a whole number of at least 1, is {size!r}")
    return config


def describe(config: Mapping[str, Any]) -> Description:
    """What the tree of a config.json says; ValueError names what cannot be built on Megatron-Core."""
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"architectures: {architecture} cannot be converted; there are {known}; {ELSEWHERE}")
    names = ARCHITECTURES[architecture]
    if (kind := config.get("model_type", names.model_type)) != names.model_type:
        raise ValueError(f"model_type: {kind} is none of {architecture}, which is {names.model_type}; correct one")
    config = {**names.defaults, **config}
    for key, plain in PLAIN.items():
        if key not in names.reads and (value := _one(config, key)) is not None and value not in plain:
            raise _refusal(key, value, plain)
    if names.model_type == "mistral" and (window := config["sliding_window"]) is not None:
        raise _refusal("sliding_window", window, ())  # others read it only with use_sliding_window
    try:
        transformer = _fields(config, names)
        rope = rope_of(config, transformer["kv_channels"], 10000.0, names.static_alpha)
        return Description(
            architecture,
            transformer,
            recipe=_recipe(config, names),
            vocab_size=config.get("vocab_size"),
            # transformers' default, where the file is silent, is untied for all of them
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm="none" if "use_qk_norm" in names.reads and not config.get("use_qk_norm") else names.qk_norm,
            rope=rope,
            rotary_percent=_rotary_percent(config, names),
            dense_layers=config.get("first_k_dense_replace", 1)
            if names.router_bias and not config.get("mlp_layer_types")
            else None,
        )
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: is missing") from error


def _refusal(key: str, value: Any, plain: tuple[Any, ...]) -> ValueError:
    expected = " or ".join(map(repr, plain)) or None
    return ValueError(f"{key}: {value!r} cannot be converted; expected {expected}; {ELSEWHERE}")


def _one(config: Mapping[str, Any], key: str) -> Any:
    """A value that some files give once for all layers and some once for each; ValueError if layers differ."""
    value = config.get(key)
    if not isinstance(value, list) or not value:
        return value
    if any(v != value[0] for v in value):
        raise ValueError(f"{key}: layers differ, {value}; only equal layers can be converted; {ELSEWHERE}")
    return value[0]


def _fields(config: Mapping[str, Any], names: Names) -> dict[str, Any]:
    heads, hidden, ffn = config["num_attention_heads"], config["hidden_size"], _one(config, "intermediate_size")
    if ffn is None:
        raise KeyError("intermediate_size")
    fields = BUILT | dict(
        num_layers=config["num_hidden_layers"], hidden_size=hidden, num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("attention_head_dim") or config.get("head_dim") or hidden // heads,
        ffn_hidden_size=ffn, layernorm_epsilon=config["rms_norm_eps"],
    )  # fmt: skip
    if names.qkv_bias or "attention_bias" in names.reads:
        fields["add_qkv_bias"] = names.qkv_bias or bool(config.get("attention_bias"))
    if names.router is None:
        return fields
    experts = next(filter(None, (_one(config, f"{of}_experts") for of in ("num", "num_local", "n_routed"))), None)
    top_k = _one(config, "moe_topk") or config.get("num_experts_per_tok")
    if not experts or not top_k:
        raise KeyError("num_experts" if not experts else "moe_topk or num_experts_per_tok")
    width = _one(config, "moe_intermediate_size") or ffn
    fields |= dict(num_moe_experts=experts, moe_router_topk=top_k, moe_ffn_hidden_size=width)
    if names.router_bias:
        return fields | _scored_singly(config, fields)
    fields["moe_router_score_function"] = "softmax"
    if names.shared:
        if not config.get("norm_topk_prob", True):
            raise ValueError("norm_topk_prob: False cannot be converted; Hunyuan renormalises the chosen experts")
        # softmax over the chosen experts = softmax over all, top-k, renormalised
        return fields | dict(moe_shared_expert_intermediate_size=ffn, moe_router_pre_softmax=False)
    return fields | dict(moe_router_pre_softmax=not config.get("norm_topk_prob", False))


def _scored_singly(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a router that scores each expert by itself (sigmoid), and of what stands beside its experts."""
    layers, top_k = fields["num_layers"], fields["moe_router_topk"]
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    shared = config.get("n_shared_experts", config.get("num_shared_experts", 1))
    freq = _routed(config.get("first_k_dense_replace", 1), layers)
    if kinds := config.get("mlp_layer_types"):
        freq = [int(kind == "sparse") for kind in kinds]
        if len(kinds) != layers or {*kinds} - {"dense", "sparse"}:
            expected = f"dense or sparse for {layers} layers"
            raise ValueError(f"mlp_layer_types: {kinds} cannot be converted; expected {expected}")
    if not config.get("norm_topk_prob", True) or top_k < 2:  # (transformers' 1, Megatron-Core's the score)
        raise ValueError(f"norm_topk_prob: Megatron-Core renormalises the chosen experts, if at least 2; here {top_k}")
    if groups > 1 and top_k != 2 * chosen:
        raise ValueError(
            f"topk_group: {chosen} of {top_k} experts cannot be converted; Megatron-Core weighs a group by its best "
            f"num_experts_per_tok / topk_group experts, transformers by its best 2; {ELSEWHERE}"
        )
    return dict(
        moe_layer_freq=freq, moe_shared_expert_intermediate_size=shared * fields["moe_ffn_hidden_size"],
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
        moe_router_num_groups=groups if groups > 1 else None, moe_router_group_topk=chosen if groups > 1 else None,
        moe_router_topk_scaling_factor=float(
            config.get("routed_scaling_factor", config.get("router_scaling_factor", 1.0))
        ),
    )  # fmt: skip


def _routed(dense: int, layers: int) -> list[int]:
    """moe_layer_freq of a model whose first `dense` layers have no experts."""
    dense = min(dense, layers)
    return [0] * dense + [1] * (layers - dense)


def _recipe(config: Mapping[str, Any], names: Names) -> dict[str, Any]:
    given = config.get("initializer_range")
    recipe = RECIPE | ({} if given is None else {"init_method_std": float(given)})
    if names.router is None:
        return recipe
    return recipe | ROUTED | (BALANCED_BY_BIAS if names.router_bias else BALANCED)


def _rotary_percent(config: Mapping[str, Any], names: Names) -> float:
    """Share of a head that turns: as the rotary embedding says, else the file, else the architecture."""
    for tree in (config.get("rope_scaling") or config.get("rope_parameters") or {}, config):
        if (part := tree.get("partial_rotary_factor")) is not None:
            break
    else:
        return names.rotary_percent
    if part != 1.0 and names.rotary_percent == 1.0:
        raise _refusal("partial_rotary_factor", part, (1.0,))
    return float(part)
