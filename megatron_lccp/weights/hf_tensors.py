"""Which tensors of a Hugging Face model make which tensors of Megatron-Core's, for four architectures, both ways.

In: the tree of a config.json. Out: what the model is (`Source`), and a list of `Piece`: each says which tensors under
transformers' names make which part of which tensor under Megatron's sharded key, and `join` and `split` carry values
across, bit by bit. Nothing here reads files or builds models.

Whole tensors stack layers, and experts below them, in leading axes: a piece is what one (layer, expert) index picks.
A layer's qkv is [its queries, key, value] for each key/value head, fc1 is [gate; up].
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_lccp.model.families import FAMILIES, Family

LAYERS = "decoder.layers."
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Source:
    """What a config.json says."""

    architecture: str
    transformer: dict[str, Any]
    """The fields of TransformerConfig that it decides."""
    vocab_size: int
    tied_embeddings: bool
    rope_base: float
    rope_scaling_factor: float | None

    @property
    def names(self) -> Names:
        return ARCHITECTURES[self.architecture]


@dataclass(frozen=True)
class Names:
    """How an architecture calls its parts, and where they go."""

    model_type: str
    qk_norm: Literal["after_rope", "before_rope", "none"]
    queries: str = "q_norm"
    keys: str = "k_norm"
    router: str | None = None
    shared: str | None = None


ARCHITECTURES = {
    "HunYuanMoEV1ForCausalLM": Names(
        "hunyuan_v1_moe", "after_rope", "query_layernorm", "key_layernorm", "mlp.gate.wg", "mlp.shared_mlp"
    ),
    "LlamaForCausalLM": Names("llama", "none"),
    "Qwen3ForCausalLM": Names("qwen3", "before_rope"),
    "Qwen3MoeForCausalLM": Names("qwen3_moe", "before_rope", router="mlp.gate"),
}

# What would change the forward pass and has no place in our models: the values with which it does not.
PLAIN = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "use_cla": (False,), "use_mla": (False,), "use_qk_norm": (True,), "use_mixed_mlp_moe": (True,),
    "moe_layer_num_skipped": (0,), "num_shared_expert": (1,), "norm_type": ("rms",), "routed_scaling_factor": (1.0,),
    "n_group": (1,), "topk_group": (1,), "group_limited_greedy": (False,), "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],), "quantization_config": (),
}  # fmt: skip


def describe(config: Mapping[str, Any]) -> Source:
    """What the tree of a config.json says; ValueError names what cannot be converted."""
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"architectures: {architecture} cannot be converted; there are {known}")
    for key, plain in PLAIN.items():
        if (value := _one(config, key)) is not None and value not in plain:
            raise ValueError(f"{key}: {value!r} cannot be converted; expected {' or '.join(map(repr, plain)) or None}")
    try:
        fields = _fields(config, ARCHITECTURES[architecture])
        base, factor = _rope(config, fields["kv_channels"])
        # transformers' default, where the file is silent, is untied for all four
        tied = bool(config.get("tie_word_embeddings", False))
        return Source(architecture, fields, config["vocab_size"], tied, base, factor)
    except KeyError as error:
        raise ValueError(f"{error.args[0]}: is missing") from error


def _one(config: Mapping[str, Any], key: str) -> Any:
    """A value that some files give once for all layers and some once for each; ValueError if layers differ."""
    value = config.get(key)
    if not isinstance(value, list) or not value:
        return value
    if any(v != value[0] for v in value):
        raise ValueError(f"{key}: layers differ, {value}; only equal layers can be converted")
    return value[0]


def _fields(config: Mapping[str, Any], names: Names) -> dict[str, Any]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    fields = dict(
        num_layers=config["num_hidden_layers"], hidden_size=hidden, num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("attention_head_dim") or config.get("head_dim") or hidden // heads,
        ffn_hidden_size=_one(config, "intermediate_size"), layernorm_epsilon=config["rms_norm_eps"],
    )  # fmt: skip
    if names.router is None:
        return fields
    experts = _one(config, "num_experts") or _one(config, "num_local_experts")
    top_k = _one(config, "moe_topk") or config.get("num_experts_per_tok")
    if not experts or not top_k:
        raise KeyError("num_experts" if not experts else "moe_topk or num_experts_per_tok")
    width = _one(config, "moe_intermediate_size") or fields["ffn_hidden_size"]
    fields |= dict(num_moe_experts=experts, moe_router_topk=top_k, moe_ffn_hidden_size=width)
    if names.shared:
        if not config.get("norm_topk_prob", True):
            raise ValueError("norm_topk_prob: False cannot be converted; Hunyuan renormalises the chosen experts")
        fields["moe_shared_expert_intermediate_size"] = fields["ffn_hidden_size"]
    else:
        fields["moe_router_pre_softmax"] = not config.get("norm_topk_prob", False)
    return fields


def _rope(config: Mapping[str, Any], width: int) -> tuple[float, float | None]:
    """(rotary base, Llama 3.1's factor); a static NTK alpha is part of the base."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if (part := rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor: {part} cannot be converted; expected 1.0")
    if kind == "dynamic" and rope.get("alpha"):
        return base * rope["alpha"] ** (width / (width - 2)), None
    if kind == "llama3":
        fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if wrong := [f"{key}={rope.get(key)}" for key, value in fixed.items() if rope.get(key) != value]:
            raise ValueError(f"rope_scaling: {', '.join(wrong)} cannot be converted; expected {fixed}")
        return base, float(rope["factor"])
    if kind != "default":
        raise ValueError(f"rope_scaling: {kind} cannot be converted; there are default, llama3, dynamic with alpha")
    return base, None


def with_rope_base(config: Mapping[str, Any], base: float) -> dict[str, Any]:
    """The config.json of the same model with another rotary base: in its alpha if it has one, else in rope_theta."""
    changed, source = copy.deepcopy(dict(config)), describe(config)
    where = next((key for key in ("rope_parameters", "rope_scaling") if changed.get(key)), None)
    rope = changed[where] if where else {}
    theta_in = rope if "rope_theta" in rope else changed
    if rope.get("alpha"):
        width = source.transformer["kv_channels"]
        rope["alpha"] = (base / float(theta_in.get("rope_theta") or 10000.0)) ** ((width - 2) / width)
    else:
        theta_in["rope_theta"] = base
    return changed


def family_for(source: Source) -> tuple[str | None, dict[str, Any]]:
    """(the family that is this model, or the first of its kind; fields to give under megatron.transformer).

    The family is None if none has such embeddings, QK-norm, experts and rotary scaling.
    """
    alike = [(name, family()) for name, family in FAMILIES.items() if _is_kind(family(), source)]
    for name, family in alike:
        same = all(family.transformer.get(key, False) == value for key, value in source.transformer.items())
        if same and family.vocab_size == source.vocab_size:
            return name, {}
    for name, family in alike:
        if family.vocab_size is None:
            return name, source.transformer
    return None, source.transformer


def differences(source: Source, family: Family, fields: Mapping[str, Any]) -> list[str]:
    """What makes the model of a family, with these fields of TransformerConfig, another one than the source's."""
    found = [
        f"{key} is {value}, here {fields.get(key)}"
        for key, value in source.transformer.items()
        if fields.get(key, False) != value
    ]
    kinds = {
        "embeddings tied": (source.tied_embeddings, family.tied_embeddings),
        "QK-norm": (source.names.qk_norm, family.qk_norm),
        "rotary scaling factor": (source.rope_scaling_factor, family.rope_scaling_factor),
        "experts": ("num_moe_experts" in source.transformer, "num_moe_experts" in fields),
    }
    return found + [f"{what} {there}, here {here}" for what, (there, here) in kinds.items() if there != here]


def _is_kind(family: Family, source: Source) -> bool:
    shared = "moe_shared_expert_intermediate_size"
    return (
        family.tied_embeddings == source.tied_embeddings and family.qk_norm == source.names.qk_norm
        and family.rope_scaling_factor == source.rope_scaling_factor
        and ("num_moe_experts" in family.transformer) == ("num_moe_experts" in source.transformer)
        and (shared in family.transformer) == (shared in source.transformer)
    )  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Tensors under transformers' names that make one part of a tensor of Megatron's."""

    key: str
    at: tuple[int, ...]
    """Leading indices: (layer), (layer, expert) or none."""
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the named tensors."""
    axes: tuple[int, ...] = ()
    """Lengths of the leading axes."""
    groups: int | None = None
    """Key/value heads, for a qkv; None where tensors are simply stacked."""
    rows: int | None = None
    """Rows with the padding of the vocabulary."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        rows = self.rows or sum(shape[0] for shape in self.shapes)
        return (rows, *self.shapes[0][1:])

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return (*self.axes, *self.part_shape)


def pieces_of(source: Source, vocab_rows: int) -> list[Piece]:
    """Every piece of the model; `vocab_rows` of Megatron's embedding, of which those past the vocabulary are zero."""
    hidden, vocab = source.transformer["hidden_size"], (source.vocab_size, source.transformer["hidden_size"])
    if vocab_rows < source.vocab_size:
        raise ValueError(f"{EMBEDDING}: has {vocab_rows} rows, the vocabulary {source.vocab_size}")
    pieces = [Piece(EMBEDDING, (), ("model.embed_tokens.weight",), (vocab,), rows=vocab_rows)]
    for layer in range(source.transformer["num_layers"]):
        pieces += _layer(source, layer)
    pieces.append(Piece("decoder.final_layernorm.weight", (), ("model.norm.weight",), ((hidden,),)))
    if not source.tied_embeddings:
        pieces.append(Piece(HEAD, (), ("lm_head.weight",), (vocab,), rows=vocab_rows))
    return pieces


def _layer(source: Source, layer: int) -> Iterator[Piece]:
    f, names = source.transformer, source.names
    hidden, width, groups, axes = f["hidden_size"], f["kv_channels"], f["num_query_groups"], (f["num_layers"],)
    queries, keys, prefix = f["num_attention_heads"] * width, groups * width, f"model.layers.{layer}."

    def one(key: str, name: str, *shape: int) -> Piece:
        return Piece(f"{LAYERS}{key}", (layer,), (f"{prefix}{name}.weight",), (shape,), axes)

    qkv = tuple(f"{prefix}self_attn.{x}_proj.weight" for x in "qkv")
    shapes = ((queries, hidden), (keys, hidden), (keys, hidden))
    yield one("self_attention.linear_qkv.layer_norm_weight", "input_layernorm", hidden)
    yield Piece(f"{LAYERS}self_attention.linear_qkv.weight", (layer,), qkv, shapes, axes, groups=groups)
    yield one("self_attention.linear_proj.weight", "self_attn.o_proj", hidden, queries)
    if names.qk_norm != "none":
        inside = "self_attention.core_attention." if names.qk_norm == "after_rope" else "self_attention."
        yield one(f"{inside}q_layernorm.weight", f"self_attn.{names.queries}", width)
        yield one(f"{inside}k_layernorm.weight", f"self_attn.{names.keys}", width)
    yield one("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm", hidden)
    if names.router is None:
        yield from _mlp("mlp.", f"{prefix}mlp.", (layer,), axes, hidden, f["ffn_hidden_size"])
        return
    experts = f["num_moe_experts"]
    yield one("mlp.router.weight", names.router, experts, hidden)
    if names.shared:
        shared = f["moe_shared_expert_intermediate_size"]
        yield from _mlp("mlp.shared_experts.", f"{prefix}{names.shared}.", (layer,), axes, hidden, shared)
    for expert in range(experts):
        at, of = (layer, expert), f"{prefix}mlp.experts.{expert}."
        yield from _mlp("mlp.experts.experts.", of, at, (*axes, experts), hidden, f["moe_ffn_hidden_size"])


def _mlp(to: str, of: str, at: tuple[int, ...], axes: tuple[int, ...], hidden: int, width: int) -> Iterator[Piece]:
    up = (f"{of}gate_proj.weight", f"{of}up_proj.weight")
    yield Piece(f"{LAYERS}{to}linear_fc1.weight", at, up, ((width, hidden),) * 2, axes)
    yield Piece(f"{LAYERS}{to}linear_fc2.weight", at, (f"{of}down_proj.weight",), ((hidden, width),), axes)


def join(piece: Piece, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The part of Megatron's tensor from transformers'."""
    if piece.groups is not None:
        by_group = [t.view(piece.groups, -1, t.shape[-1]) for t in tensors]
        return torch.cat(by_group, dim=1).view(piece.part_shape)
    padding = [tensors[0].new_zeros(piece.rows - piece.shapes[0][0], *piece.shapes[0][1:])] if piece.rows else []
    return torch.cat([*tensors, *padding]) if len(tensors) + len(padding) > 1 else tensors[0]


def split(piece: Piece, part: torch.Tensor) -> list[torch.Tensor]:
    """transformers' tensors from the part of Megatron's; rows that pad the vocabulary are dropped."""
    rows = [shape[0] for shape in piece.shapes]
    if piece.groups is not None:
        by_group = part.view(piece.groups, -1, part.shape[-1]).split([r // piece.groups for r in rows], dim=1)
        return [t.reshape(shape) for t, shape in zip(by_group, piece.shapes)]
    return list(part[: sum(rows)].split(rows))


def check_names(where: str, found: set[str], expected: Mapping[str, object]) -> None:
    """ValueError names tensors that nothing would use, or that nothing would fill."""
    for problem, names in (("nothing takes", found - set(expected)), ("are missing", set(expected) - found)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{where}: {len(names)} tensors {problem}: {some}")
