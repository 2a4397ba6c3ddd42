"""Which tensors of a Hugging Face model make which tensors of Megatron-Core's, both ways.

In: what a config.json says (model/hf_config.py). Out: a list of `Piece`: each says which tensors under transformers'
names make which part of which tensor under Megatron's sharded key, and `join` and `split` carry values across, bit by
bit. Which tensors a layer has and how large they are is the shape's to say (model/shape.py); here is what they are
called. Nothing here reads files or builds models.

Whole tensors stack layers, unless these differ, and experts below them, in leading axes: a piece is what one (layer,
expert) index picks. A layer's qkv is [its queries, key, value] for each key/value head, fc1 is [gate; up].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lccp.model.hf_config import Description, Names
from megatron_lccp.model.resolved import ResolvedModel
from megatron_lccp.model.shape import Part, Shape

LAYERS = "decoder.layers."
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def differences(source: Description, model: ResolvedModel) -> list[str]:
    """What makes a model another one than the source's, its rotary base apart."""
    found = [
        f"{key} is {value}, here {model.fields.get(key)}"
        for key, value in source.transformer.items()
        if (model.fields.get(key) or None) != (value or None)  # what is absent counts as False, and as None
    ]
    there, here = _beside_fields(source), _beside_fields(model.description)
    return found + [f"{what} {there[what]}, here {here[what]}" for what in there if there[what] != here[what]]


def _beside_fields(model: Description) -> dict[str, Any]:
    """What no field of TransformerConfig says of a model, in words."""
    rope = model.rope
    stretched = f"{rope.kind} {[rope.factor, rope.original_tok, rope.slow, rope.fast, rope.whole, rope.attention]}"
    return {
        "embeddings tied": model.tied_embeddings, "QK-norm": model.qk_norm, "rotary share": model.rotary_percent,
        "rotary frequencies": "plain" if rope.kind == "plain" else stretched,
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


def pieces_of(source: Description, vocab_rows: int) -> list[Piece]:
    """Every piece of the model; `vocab_rows` of Megatron's embedding, of which those past the vocabulary are zero."""
    shape, vocab = source.shape, (source.vocabulary, source.shape.hidden)
    if vocab_rows < source.vocabulary:
        raise ValueError(f"{EMBEDDING}: has {vocab_rows} rows, the vocabulary {source.vocabulary}")
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
