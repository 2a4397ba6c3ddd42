"""Needle samples for monitors: built once a run from held-out documents, the same at every checkpoint.

In: an open window and a monitor with lengths, depths, families and a seed. Out: a NeedleSet and row coordinates.
"""

from __future__ import annotations

from typing import Any, Protocol

from megatron_lccp.data.loader import heldout_tokens
from megatron_lccp.data.needles import NeedleSample, NeedleSet, NeedleSetSpec, build_needle_set
from megatron_lccp.training.window import EvalWindow


class WantsNeedles(Protocol):
    """What a monitor says of the samples it wants."""

    lengths_tok: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    families: tuple[str, ...]
    haystacks: tuple[str, ...]
    seed: int


def needle_set(window: EvalWindow, wanted: WantsNeedles) -> NeedleSet:
    """The set a monitor wants; kept in the window's cache, so that it is built once a run."""
    spec = NeedleSetSpec(
        families=tuple(wanted.families), lengths_tok=tuple(wanted.lengths_tok), depths=tuple(wanted.depths),
        samples=wanted.samples, seed=wanted.seed, haystacks=tuple(wanted.haystacks),
    )  # fmt: skip
    if spec not in window.cache:
        window.cache[spec] = build_needle_set(
            spec, window.tokenizer, lambda source: heldout_tokens(window.config, source)
        )
    return window.cache[spec]


def place_of(sample: NeedleSample, sample_set: str) -> dict[str, Any]:
    """The coordinates of a sample for its rows."""
    return dict(
        length_tok=sample.length_tok, depth=sample.depth, depth_cell=sample.depth_cell, before_tok=sample.before_tok,
        after_tok=sample.after_tok, family=sample.family, sample=sample.sample, sample_set=sample_set,
    )  # fmt: skip
