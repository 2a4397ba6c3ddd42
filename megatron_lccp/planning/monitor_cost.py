"""What the monitors of a configuration cost: the prefills they would run, their operations, and how often.

In: a configuration; and its tokenizer and held-out text, or stand-ins for them where nothing is prepared. Out: the
prefills of one window of each monitor, and its share of the operations of the whole training. No ranks, no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np

from megatron_lccp.config.tree import Config
from megatron_lccp.data.haystacks import BUNDLED
from megatron_lccp.data.loader import stage_steps, trained_on
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.measuring.flops import prefill_flops, step_flops
from megatron_lccp.measuring.prefills import Prefill, tokens_of
from megatron_lccp.measuring.runs import Work
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.model.shape import Shape
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.schema import Monitor

HAYSTACK_ID = 2**20
"""Id of every token of a stand-in text; a stand-in tokenizer never gets as far."""


class StandInTokenizer(Tokenizer):
    """Four characters a token, as English text has on average; gives a text back unchanged."""

    def __init__(self) -> None:
        super().__init__(Path("a stand-in"), "", vocab_size=HAYSTACK_ID, eod=-1)
        self._pieces: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return [self._pieces.setdefault(text[i : i + 4], len(self._pieces)) for i in range(0, len(text), 4)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""
        pieces = list(self._pieces)
        return "".join(pieces[i] for i in ids)


def stand_in_text(config: Config) -> Callable[[str, int], np.ndarray]:
    """Held-out text of any length, of the sources that the configuration has; ValueError for another name."""

    def text(name: str, at_least_tok: int) -> np.ndarray:
        if name not in config.data.sources and name not in BUNDLED and config.data.sources:
            raise ValueError(f"{name!r} is not in data.sources, nor one of {', '.join(BUNDLED)}")
        return np.full(at_least_tok, HAYSTACK_ID, np.int32)

    return text


def planning_window(
    config: Config,
    shape: Shape,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    text: Callable[[str, int], np.ndarray] | None = None,
) -> EvalWindow:
    """A window for asking monitors what they would run on a model of this shape; without tokenizer and text, stand-ins
    for them."""
    nobody = cast(Groups, SimpleNamespace())  # a plan talks to no ranks, and has no groups to make
    return EvalWindow(
        chunks=(), groups=nobody, run=config.name, tokenizer=tokenizer or StandInTokenizer(),
        vocab_size=vocab_size, config_hash="", stage="", step=0, tokens=0, text=text or stand_in_text(config),
        corpora=trained_on(config), sizes=(shape.layers, shape.heads),
    )  # fmt: skip


@dataclass(frozen=True)
class WindowCost:
    """One monitor in one window, over all replicas."""

    monitor: str
    cells: int
    """Cells of its grid, or corpora."""
    samples: int
    prefills: int
    tokens_alone: int
    """Tokens if every sample had a forward of its own."""
    tokens: int
    """Tokens that go through the model."""
    flops: float


def prefills_of(work: Work, shared: bool) -> list[Prefill]:
    """What a window runs of this work, once."""
    return [prefill for tree in (work.planned if shared else work.alone) for prefill in tree]


def window_cost(monitor: Monitor, window: EvalWindow, shape: Shape, shared: bool, vocab_size: int) -> WindowCost | None:
    """What a window of this monitor runs; None if it does not say. ValueError as it raises."""
    if (work := monitor.work(window)) is None:
        return None
    prefills = prefills_of(work, shared)
    return WindowCost(
        monitor.name, work.cells, work.samples, work.times * len(prefills),
        work.times * sum(map(tokens_of, work.alone)), work.times * tokens_of(prefills),
        work.times * prefill_flops(shape, prefills, vocab_size),
    )  # fmt: skip


def planned_cost(
    monitor: Monitor, window: EvalWindow, shape: Shape, shared: bool, vocab_size: int
) -> WindowCost | None:
    """`window_cost` from one sample of each cell, for large grids: samples have facts of about the same length."""
    one, count = monitor, 1
    if dataclasses.is_dataclass(monitor) and (count := getattr(monitor, "samples", 1)) > 1:
        one = dataclasses.replace(monitor, samples=1)
    cost = window_cost(one, window, shape, shared, vocab_size)
    if cost is None or count == 1:
        return cost
    times = {name: count * getattr(cost, name) for name in ("samples", "prefills", "tokens_alone", "tokens", "flops")}
    return dataclasses.replace(cost, **times)


def windows_in(config: Config, monitor: Monitor) -> int:
    """How often the training loop measures it: when due, at the start of each stage and at the end."""
    windows, step, tokens = 1, 0, 0  # the end
    steps_of = [stage_steps(stage) for stage in config.stages.values()]
    for stage, steps in zip(config.stages.values(), steps_of):
        windows += 1  # the start of the stage; the window after its last step is the next one's, or the end
        for _ in range(steps - 1):
            before, step, tokens = tokens, step + 1, tokens + stage.global_batch_tok
            windows += monitor.every.due(step, tokens, before)
        step, tokens = step + 1, tokens + stage.global_batch_tok
    return windows


def training_flops(config: Config, shape: Shape, vocab_size: int) -> float:
    """Operations of all stages, without recomputation."""
    return sum(
        stage_steps(stage) * step_flops(shape, stage.context_tok, stage.global_batch_tok, vocab_size)
        for stage in config.stages.values()
    )
