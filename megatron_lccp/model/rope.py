"""Rotary position embedding: which frequencies a model has, as config.json says it, and back.

In: the tree of a config.json, or a stage's `rope_base` and `yarn`. Out: `Rope`, and the tree with another one. Of the
two keys that a config.json may have for it, `rope_scaling` counts, as in transformers (configuration_utils.py,
modeling_rope_utils.py: convert_rope_params_to_dict). Nothing is imported from torch or Megatron.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_lccp.config.tree import StageConfig

Kind = Literal["plain", "linear", "llama3", "yarn"]
POSITIONS = "max_position_embeddings"
"""Key of config.json: the longest context that the model is for."""


@dataclass(frozen=True)
class Rope:
    """The frequencies of a rotary embedding, and what its cosines and sines are multiplied by."""

    base: float = 10000.0
    """A static NTK alpha is part of it."""
    kind: Kind = "plain"
    """How frequencies are stretched: not, all alike, or the low ones, in Llama 3.1's way or YaRN's."""
    factor: float = 1.0
    """Low frequencies are divided by this."""
    original_tok: int = 0
    """Context before the stretching. Of llama3 and yarn."""
    slow: float = 1.0
    """Turns in the original context, below which a frequency is stretched in full. Of llama3 and yarn."""
    fast: float = 4.0
    """Turns in the original context, above which a frequency stays."""
    whole: bool = True
    """Whether YaRN rounds the pairs at both ends outwards."""
    attention: float = 1.0
    """Queries and keys are multiplied by this where they turn. Of yarn."""

    def of_stage(self, stage: StageConfig) -> Rope:
        """This rotary embedding in a stage of training, which may have a base and a stretching of its own."""
        rope = self if stage.rope_base is None else replace(self, base=stage.rope_base)
        if (yarn := stage.yarn) is None:
            return rope
        attention = yarn_attention(yarn.factor) if yarn.attention_factor is None else yarn.attention_factor
        return Rope(
            rope.base, "yarn", yarn.factor, yarn.original_tok, yarn.beta_slow, yarn.beta_fast, attention=attention
        )


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor of cosines and sines (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_key(config: Mapping[str, Any]) -> str | None:
    """The key of a config.json that is read; None if it has neither, or both are empty."""
    return next((key for key in ("rope_scaling", "rope_parameters") if config.get(key)), None)


def rope_of(config: Mapping[str, Any], width: int, base: float, static_alpha: bool) -> Rope:
    """What a config.json says of heads of this width; ValueError for what has no place here.

    `base` is what its architecture takes where the file is silent; `static_alpha` whether it reads an alpha.
    """
    key = rope_key(config)
    rope = config[key] if key else {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{key}: should be an object, is {rope!r}")
    if nested := next((name for name, value in rope.items() if isinstance(value, Mapping)), None):
        raise ValueError(f"{key}: {nested} has a rotary embedding of its own, which cannot be converted")
    base = _number(rope, "rope_theta", _number(config, "rope_theta", base))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(base)
    if kind == "dynamic" and static_alpha and rope.get("alpha"):
        return Rope(base * _number(rope, "alpha") ** (width / (width - 2)))
    if kind == "linear":
        return Rope(base, "linear", _number(rope, "factor"))
    if kind not in ("llama3", "yarn"):
        known = "default, linear, llama3 and yarn" + (", and dynamic with alpha" if static_alpha else "")
        raise ValueError(f"{key}: {kind} cannot be converted; there are {known}")
    original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    positions = original if original is not None else config.get(POSITIONS)
    if type(positions) is not int or positions < 1:
        raise ValueError(f"{key}: original_max_position_embeddings should be a whole number, is {positions!r}")
    if kind == "llama3":
        slow, fast = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        return Rope(base, "llama3", _number(rope, "factor"), positions, slow, fast)
    factor = _number(rope, "factor")
    attention = rope.get("attention_factor")
    if attention is None:
        attention = yarn_attention(factor)
        if (above := rope.get("mscale")) and (below := rope.get("mscale_all_dim")):
            attention = yarn_attention(factor, above) / yarn_attention(factor, below)
    return Rope(
        base, "yarn", factor, positions, float(rope.get("beta_slow") or 1), float(rope.get("beta_fast") or 32),
        bool(rope.get("truncate", True)), float(attention),
    )  # fmt: skip


def _number(tree: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = tree.get(key, default)
    if value is None and key not in tree:
        raise KeyError(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{key}: should be a number above 0, is {value!r}")
    return float(value)


def with_rope(config: Mapping[str, Any], rope: Rope, width: int, before: Rope) -> dict[str, Any]:
    """The config.json of the same model with another rotary embedding than `before`, in the key that is read.

    Another base is put where the old one stands: in the alpha if it has one, else in rope_theta.
    """
    changed = copy.deepcopy(dict(config))
    key = rope_key(changed)
    if replace(rope, base=before.base) != before:
        key = key or "rope_parameters"
        changed[key] = {"rope_theta": rope.base, **_stretching(rope)}
        if "rope_theta" in changed:
            changed["rope_theta"] = rope.base
        return changed
    found = changed[key] if key else {}
    theta_in = found if "rope_theta" in found else changed
    if found.get("alpha"):
        old = float(theta_in.get("rope_theta") or 10000.0)
        found["alpha"] = (rope.base / old) ** ((width - 2) / width)
    else:
        theta_in["rope_theta"] = rope.base
    return changed


def _stretching(rope: Rope) -> dict[str, Any]:
    """What config.json says of a stretching, its base apart; `type` is what transformers before 4.45 read."""
    both = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor}
    original = {"original_max_position_embeddings": rope.original_tok}
    if rope.kind == "yarn":
        ends = {"beta_fast": rope.fast, "beta_slow": rope.slow, "truncate": rope.whole}
        return both | original | ends | {"attention_factor": rope.attention}
    if rope.kind == "llama3":
        return both | original | {"low_freq_factor": rope.slow, "high_freq_factor": rope.fast}
    return both if rope.kind == "linear" else {"rope_type": "default", "type": "default"}
