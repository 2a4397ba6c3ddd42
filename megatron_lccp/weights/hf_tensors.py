"""Which tensors of a Hugging Face model make which tensors of Megatron-Core's, for six architectures, both ways.

In: the tree of a config.json. Out: what the model is (`HFModel`), and a list of `Piece`: each says which tensors under
transformers' names make which part of which tensor under Megatron's sharded key, and `join` and `split` carry values
across, bit by bit. Which tensors a layer has and how large they are is the shape's to say (model/shape.py); here is
what they are called. Nothing here reads files or builds models.

Whole tensors stack layers, unless these differ, and experts below them, in leading axes: a piece is what one (layer,
expert) index picks. A layer's qkv is [its queries, key, value] for each key/value head, fc1 is [gate; up].
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lccp.model.families import FAMILIES, Family
from megatron_lccp.model.resolved import ResolvedModel
from megatron_lccp.model.shape import Part, QKNorm, Shape

LAYERS = "decoder.layers."
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class HFModel:
    """What a config.json says."""

    architecture: str
    model: Family
    """The model; its fields of TransformerConfig are those that the file decides."""
    rope_base: float

    @property
    def names(self) -> Names:
        return ARCHITECTURES[self.architecture]

    @property
    def transformer(self) -> dict[str, Any]:
        """The fields of TransformerConfig that it decides."""
        return self.model.fields()

    @property
    def shape(self) -> Shape:
        """What its layers consist of; all are gated."""
        return self.model.shape({"gated_linear_unit": True, **self.transformer})

    @property
    def vocab_size(self) -> int:
        assert self.model.vocab_size is not None
        return self.model.vocab_size

    @property
    def tied_embeddings(self) -> bool:
        return self.model.tied_embeddings


@dataclass(frozen=True)
class Names:
    """How an architecture calls its parts, and what of it no field of its config.json says."""

    qk_norm: QKNorm
    queries: str = "q_norm"
    keys: str = "k_norm"
    router: str | None = None
    router_bias: str | None = None
    """Of a router that scores each expert by itself."""
    shared: str | None = None
    rotary_percent: float = 1.0
    """Where its config.json says nothing of it."""
    reads: tuple[str, ...] = ()
    """Keys that are read, where other architectures have to be PLAIN."""


ARCHITECTURES = {
    "HunYuanMoEV1ForCausalLM": Names(
        "after_rope", "query_layernorm", "key_layernorm", "mlp.gate.wg", shared="mlp.shared_mlp"
    ),
    "LlamaForCausalLM": Names("none"),
    "Qwen3ForCausalLM": Names("before_rope"),
    "Qwen3MoeForCausalLM": Names("before_rope", router="mlp.gate"),
    "Glm4MoeForCausalLM": Names(
        "before_rope", router="mlp.gate", router_bias="mlp.gate.e_score_correction_bias", shared="mlp.shared_experts",
        rotary_percent=0.5,
        reads=("attention_bias", "use_qk_norm", "routed_scaling_factor", "n_group", "topk_group"),
    ),
    "HYV3ForCausalLM": Names(
        "before_rope", router="mlp.router.gate", router_bias="mlp.expert_bias", shared="mlp.shared_mlp"
    ),
}  # fmt: skip

# What would change the forward pass and has no place in our models: the values with which it does not.
PLAIN = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "use_cla": (False,), "use_mla": (False,), "use_qk_norm": (True,), "use_mixed_mlp_moe": (True,),
    "moe_layer_num_skipped": (0,), "num_shared_expert": (1,), "norm_type": ("rms",), "routed_scaling_factor": (1.0,),
    "n_group": (1,), "topk_group": (1,), "group_limited_greedy": (False,), "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],), "quantization_config": (),
}  # fmt: skip


def describe(config: Mapping[str, Any]) -> HFModel:
    """What the tree of a config.json says; ValueError names what cannot be converted."""
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"architectures: {architecture} cannot be converted; there are {known}")
    names = ARCHITECTURES[architecture]
    for key, plain in PLAIN.items():
        if key in names.reads:
            continue
        if (value := _one(config, key)) is not None and value not in plain:
            raise ValueError(f"{key}: {value!r} cannot be converted; expected {' or '.join(map(repr, plain)) or None}")
    try:
        fields = _fields(config, names)
        base, factor, rotary_percent = _rope(config, names, fields["kv_channels"])
        model = Family(
            transformer=fields,
            vocab_size=config["vocab_size"],
            # transformers' default, where the file is silent, is untied for all of them
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm="none" if "use_qk_norm" in names.reads and not config.get("use_qk_norm") else names.qk_norm,
            rope_scaling_factor=factor,
            rotary_percent=rotary_percent,
        )
        return HFModel(architecture, model, base)
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
    if "attention_bias" in names.reads:
        fields["add_qkv_bias"] = bool(config.get("attention_bias"))
    if names.router is None:
        return fields
    experts = next(filter(None, (_one(config, f"{of}_experts") for of in ("num", "num_local", "n_routed"))), None)
    top_k = _one(config, "moe_topk") or config.get("num_experts_per_tok")
    if not experts or not top_k:
        raise KeyError("num_experts" if not experts else "moe_topk or num_experts_per_tok")
    width = _one(config, "moe_intermediate_size") or fields["ffn_hidden_size"]
    fields |= dict(num_moe_experts=experts, moe_router_topk=top_k, moe_ffn_hidden_size=width)
    if names.router_bias:
        return fields | _scored_singly(config, fields)
    if names.shared:
        if not config.get("norm_topk_prob", True):
            raise ValueError("norm_topk_prob: False cannot be converted; Hunyuan renormalises the chosen experts")
        fields["moe_shared_expert_intermediate_size"] = fields["ffn_hidden_size"]
    else:
        fields["moe_router_pre_softmax"] = not config.get("norm_topk_prob", False)
    return fields


def _scored_singly(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a router that scores each expert by itself (sigmoid), and of what stands beside its experts."""
    layers, top_k = fields["num_layers"], fields["moe_router_topk"]
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    shared = config.get("n_shared_experts", config.get("num_shared_experts", 1))
    dense = config.get("first_k_dense_replace", 1)
    kinds = config.get("mlp_layer_types") or ["dense"] * min(dense, layers) + ["sparse"] * (layers - dense)
    if len(kinds) != layers or {*kinds} - {"dense", "sparse"}:
        raise ValueError(f"mlp_layer_types: {kinds} cannot be converted; expected dense or sparse for {layers} layers")
    if not config.get("norm_topk_prob", True) or top_k < 2:  # (transformers' 1, Megatron-Core's the score)
        raise ValueError(f"norm_topk_prob: Megatron-Core renormalises the chosen experts, if at least 2; here {top_k}")
    if groups > 1 and top_k != 2 * chosen:
        raise ValueError(
            f"topk_group: {chosen} of {top_k} experts cannot be converted; Megatron-Core weighs a group by its best "
            f"num_experts_per_tok / topk_group experts, transformers by its best 2"
        )
    return dict(
        moe_layer_freq=[int(kind == "sparse") for kind in kinds],
        moe_shared_expert_intermediate_size=shared * fields["moe_ffn_hidden_size"],
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
        moe_router_num_groups=groups if groups > 1 else None, moe_router_group_topk=chosen if groups > 1 else None,
        moe_router_topk_scaling_factor=float(
            config.get("routed_scaling_factor", config.get("router_scaling_factor", 1.0))
        ),
    )  # fmt: skip


def _rope(config: Mapping[str, Any], names: Names, width: int) -> tuple[float, float | None, float]:
    """(rotary base, Llama 3.1's factor, share of a head that is turned); a static NTK alpha is part of the base."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    part = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or names.rotary_percent
    if part != 1.0 and names.rotary_percent == 1.0:
        raise ValueError(f"partial_rotary_factor: {part} cannot be converted; expected 1.0")
    if kind == "dynamic" and rope.get("alpha"):
        return base * rope["alpha"] ** (width / (width - 2)), None, part
    if kind == "llama3":
        fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if wrong := [f"{key}={rope.get(key)}" for key, value in fixed.items() if rope.get(key) != value]:
            raise ValueError(f"rope_scaling: {', '.join(wrong)} cannot be converted; expected {fixed}")
        return base, float(rope["factor"]), part
    if kind != "default":
        raise ValueError(f"rope_scaling: {kind} cannot be converted; there are default, llama3, dynamic with alpha")
    return base, None, part


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


def family_for(source: HFModel) -> tuple[str | None, dict[str, Any]]:
    """(the family that is this model, or the first of its kind; fields to give under megatron.transformer).

    The family is None if none has such embeddings, QK-norm, experts and rotary embedding.
    """
    alike = [(name, family()) for name, family in FAMILIES.items() if _kind(family()) == _kind(source.model)]
    for name, family in alike:
        own = family.fields()
        if family.vocab_size == source.vocab_size and not _other(source.transformer, own):
            return name, {}
    for name, family in alike:
        if family.vocab_size is None:
            return name, source.transformer
    return None, source.transformer


def differences(source: HFModel, model: ResolvedModel) -> list[str]:
    """What makes a model another one than the source's."""
    found = [
        f"{key} is {source.transformer[key]}, here {model.fields.get(key)}"
        for key in _other(source.transformer, model.fields)
    ]
    there, here = _kind(source.model), _kind(model.family, model.fields)
    return found + [f"{what} {there[what]}, here {here[what]}" for what in there if there[what] != here[what]]


def _other(wanted: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Keys of the fields that are not as wanted; what is absent counts as False, and as None."""
    return [key for key, value in wanted.items() if (fields.get(key) or None) != (value or None)]


def _kind(family: Family, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What makes models different whatever their sizes, in words."""
    fields = family.fields(given)
    return {
        "embeddings tied": family.tied_embeddings, "QK-norm": family.qk_norm,
        "rotary scaling factor": family.rope_scaling_factor, "rotary share": family.rotary_percent,
        "experts": "num_moe_experts" in fields, "shared expert": "moe_shared_expert_intermediate_size" in fields,
        "router": fields.get("moe_router_score_function", "softmax"),
    }  # fmt: skip


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
    """Key/value heads, for queries, keys and values; None where tensors are simply stacked."""
    rows: int | None = None
    """Rows with the padding of the vocabulary."""

    @property
    def part_shape(self) -> tuple[int, ...]:
        rows = self.rows or sum(shape[0] for shape in self.shapes)
        return (rows, *self.shapes[0][1:])

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return (*self.axes, *self.part_shape)


def pieces_of(source: HFModel, vocab_rows: int) -> list[Piece]:
    """Every piece of the model; `vocab_rows` of Megatron's embedding, of which those past the vocabulary are zero."""
    shape, vocab = source.shape, (source.vocab_size, source.shape.hidden)
    if vocab_rows < source.vocab_size:
        raise ValueError(f"{EMBEDDING}: has {vocab_rows} rows, the vocabulary {source.vocab_size}")
    pieces = [Piece(EMBEDDING, (), ("model.embed_tokens.weight",), (vocab,), rows=vocab_rows)]
    for layer in range(shape.layers):
        pieces += _layer(shape, source.names, layer)
    pieces.append(Piece("decoder.final_layernorm.weight", (), ("model.norm.weight",), ((shape.hidden,),)))
    if not shape.tied:
        pieces.append(Piece(HEAD, (), ("lm_head.weight",), (vocab,), rows=vocab_rows))
    return pieces


# A tensor of a layer -> what a checkpoint calls it, if that is another name: norms are part of the linear after them.
STORED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.experts.linear_fc1.weight": "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.linear_fc2.weight": "mlp.experts.experts.linear_fc2.weight",
}


def _theirs(names: Names) -> dict[str, tuple[str, ...]]:
    """A tensor of a layer -> transformers' tensors that make it, in the order in which files have them."""
    qkv, gate_up = [f"self_attn.{x}_proj" for x in "qkv"], ("gate_proj.weight", "up_proj.weight")
    norms = {"after_rope": "self_attention.core_attention.", "before_rope": "self_attention."}

    def mlp(to: str, of: str) -> dict[str, tuple[str, ...]]:
        return {
            f"{to}.linear_fc1.weight": tuple(f"{of}.{x}" for x in gate_up),
            f"{to}.linear_fc2.weight": (f"{of}.down_proj.weight",),
        }

    return {
        "input_layernorm.weight": ("input_layernorm.weight",),
        "self_attention.linear_qkv.weight": tuple(f"{x}.weight" for x in qkv),
        "self_attention.linear_qkv.bias": tuple(f"{x}.bias" for x in qkv),
        "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
        f"{norms.get(names.qk_norm)}q_layernorm.weight": (f"self_attn.{names.queries}.weight",),
        f"{norms.get(names.qk_norm)}k_layernorm.weight": (f"self_attn.{names.keys}.weight",),
        "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
        **mlp("mlp", "mlp"),
        "mlp.router.weight": (f"{names.router}.weight",),
        "mlp.router.expert_bias": (f"{names.router_bias}",),
        **mlp("mlp.shared_experts", f"{names.shared}"),
        **mlp("mlp.experts", "mlp.experts.EXPERT"),
    }


def _layer(shape: Shape, names: Names, layer: int) -> Iterator[Piece]:
    parts, prefix = {part.name: part for part in shape.parts(layer)}, f"model.layers.{layer}."
    keys, at, axes = (LAYERS, (layer,), (shape.layers,)) if shape.stacked else (f"{LAYERS}{layer}.", (), ())
    ordered = [(parts.pop(name), theirs) for name, theirs in _theirs(names).items() if name in parts]
    assert not parts, parts

    def piece(part: Part, theirs: Sequence[str], *expert: int) -> Piece:
        named = tuple(f"{prefix}{name}".replace("EXPERT", "".join(map(str, expert))) for name in theirs)
        of_experts = (shape.experts,) if expert else ()
        key = f"{keys}{STORED.get(part.name, part.name)}"
        return Piece(key, (*at, *expert), named, part.shapes, (*axes, *of_experts), part.groups)

    yield from (piece(part, theirs) for part, theirs in ordered if part.over != "expert")
    of_each = [(part, theirs) for part, theirs in ordered if part.over == "expert"]
    yield from (piece(part, theirs, expert) for expert in range(shape.experts) for part, theirs in of_each)


def join(piece: Piece, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The part of Megatron's tensor from transformers'."""
    if piece.groups is not None:
        by_group = [t.view(piece.groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(by_group, dim=1).view(piece.part_shape)
    padding = [tensors[0].new_zeros(piece.rows - piece.shapes[0][0], *piece.shapes[0][1:])] if piece.rows else []
    return torch.cat([*tensors, *padding]) if len(tensors) + len(padding) > 1 else tensors[0]


def split(piece: Piece, part: torch.Tensor) -> list[torch.Tensor]:
    """transformers' tensors from the part of Megatron's; rows that pad the vocabulary are dropped."""
    rows = [shape[0] for shape in piece.shapes]
    if piece.groups is not None:
        by_group = part.view(piece.groups, -1, *part.shape[1:]).split([r // piece.groups for r in rows], dim=1)
        return [t.reshape(shape) for t, shape in zip(by_group, piece.shapes)]
    return list(part[: sum(rows)].split(rows))


def check_names(where: str, found: set[str], expected: Mapping[str, object]) -> None:
    """ValueError names tensors that nothing would use, or that nothing would fill."""
    for problem, names in (("nothing takes", found - set(expected)), ("are missing", set(expected) - found)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(f"{where}: {len(names)} tensors {problem}: {some}")
