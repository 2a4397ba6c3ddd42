"""What measuring a published model takes, before it is loaded: operations, time, memory.

In: the configuration that transformers reads, the prefills that monitors will run, the time of one of them. Out: numbers,
and the lines that say them. The model is built without memory (on torch's meta device) to count its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lccp.measuring.flops import work_in
from megatron_lccp.measuring.prefills import Prefill
from megatron_lccp.text import count_text

EXPERTS = re.compile(r"\.experts(\.|$)")
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
GB = 1e9


@dataclass(frozen=True)
class PublishedSizes:
    """What is counted of a model of transformers."""

    parameters: int
    """All of them, tied ones once."""
    active: int
    """Of the layers, those that one token is multiplied with."""
    layers: int
    heads: int
    kv_heads: int
    width: int
    """Of a head."""
    hidden: int
    wide: int
    """Of the widest activation between two matrices of a layer, for one token."""
    vocab: int
    """Rows of the output layer."""
    context_tok: int
    """Tokens that the model was trained for, by its configuration."""

    def flops(self, prefills: Sequence[Prefill]) -> float:
        """Operations of some prefills, as measuring/flops.py counts them. Windows of attention are not taken off."""
        tokens, pairs, rows = work_in(prefills)
        attention = 4.0 * self.layers * self.heads * self.width * pairs
        return 2.0 * self.active * tokens + attention + 2.0 * self.hidden * self.vocab * rows

    def kept_bytes(self, tokens: int, element: int) -> int:
        """Of keys and values of so many tokens, in elements of so many bytes."""
        return 2 * self.layers * self.kv_heads * self.width * tokens * element

    def prefill_bytes(self, tokens: int, element: int) -> int:
        """Of the largest activations of a prefill, at about the same time."""
        return tokens * (4 * self.hidden + 3 * self.wide) * element


def sizes_of(config: Any) -> PublishedSizes:
    """Count the model of a configuration of transformers. Raises what transformers raises where it cannot build it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    text = config.get_text_config(decoder=True)
    experts = next((n for name in EXPERT_COUNTS if (n := getattr(text, name, None))), 1)
    of_token = getattr(text, "num_experts_per_tok", None) or experts
    ends = {id(model.get_input_embeddings().weight)}
    if (head := model.get_output_embeddings()) is not None:
        ends.add(id(head.weight))
    parameters, active = 0, 0.0
    for name, weight in model.named_parameters():
        parameters += weight.numel()
        if id(weight) not in ends and weight.dim() > 1:
            active += weight.numel() * (of_token / experts if EXPERTS.search(name) else 1)
    heads = text.num_attention_heads
    return PublishedSizes(
        parameters=parameters, active=round(active), layers=text.num_hidden_layers, heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        width=getattr(text, "head_dim", None) or text.hidden_size // heads, hidden=text.hidden_size,
        wide=max(getattr(text, "intermediate_size", None) or 0, 3 * text.hidden_size), vocab=text.vocab_size,
        context_tok=getattr(text, "max_position_embeddings", None) or 0,
    )  # fmt: skip


@dataclass(frozen=True)
class Needs:
    """What the monitors take on one model."""

    tokens: int
    prefills: int
    flops: float
    weights_bytes: int
    kept_bytes: int
    prefill_bytes: int

    @property
    def bytes(self) -> int:
        return self.weights_bytes + self.kept_bytes + self.prefill_bytes

    def text(self) -> str:
        """Work and memory in a line."""
        parts = (
            ("weights", self.weights_bytes),
            ("keys and values", self.kept_bytes),
            ("a prefill", self.prefill_bytes),
        )
        memory = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts)
        return (
            f"{self.tokens:,} tokens in {count_text(self.prefills, 'prefill')}, {self.flops / 1e12:,.1f} TFLOP; about "
            f"{self.bytes / GB:.1f} GB of memory ({memory})"
        )


def needs_of(sizes: PublishedSizes, trees: Sequence[tuple[int, Sequence[Sequence[Prefill]]]], element: int) -> Needs:
    """Of the trees of each monitor, run so many times, with elements of so many bytes."""
    tokens = prefills = longest = kept = 0
    flops = 0.0
    for times, of_monitor in trees:
        flat = [prefill for tree in of_monitor for prefill in tree]
        tokens += times * sum(map(len, flat))
        prefills += times * len(flat)
        flops += times * sizes.flops(flat)
        longest = max(longest, *map(len, flat), 0)
        kept = max(kept, *(sum(map(len, tree)) for tree in of_monitor), 0)
    kept_bytes = sizes.kept_bytes(kept, element)
    return Needs(
        tokens, prefills, flops, sizes.parameters * element, kept_bytes, sizes.prefill_bytes(longest, element)
    )  # fmt: skip
