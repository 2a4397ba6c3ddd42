"""What the monitors of a configuration cost: the prefills they would run, their operations, and how often.

In: a configuration, and a window without a model (measuring/beforehand.py). Out: the prefills of one window of each
monitor, and its share of the operations of the whole training. No ranks, no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_lccp.config.tree import Config
from megatron_lccp.data.stages import stage_steps
from megatron_lccp.measuring.flops import prefill_flops, step_flops
from megatron_lccp.measuring.prefills import Prefill, tokens_of
from megatron_lccp.measuring.runs import Work
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.model.shape import Shape
from megatron_lccp.schema import Every, Monitor


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


BLOCK_STEPS = 1 << 20
"""Steps that are looked at together: a run of billions of tokens in small steps has many."""


def windows_in(config: Config, monitor: Monitor) -> int:
    """How often the training loop measures it: when due, at the start of each stage and at the end."""
    windows, step, tokens = 1, 0, 0  # the end
    steps_of = [stage_steps(stage) for stage in config.stages.values()]
    for stage, steps in zip(config.stages.values(), steps_of):
        windows += 1  # the start of the stage; the window after its last step is the next one's, or the end
        windows += _due(monitor.every, step, steps - 1, tokens, stage.global_batch_tok)
        step, tokens = step + steps, tokens + steps * stage.global_batch_tok
    return windows


def _due(every: Every, step: int, more: int, tokens: int, step_tok: int) -> int:
    """How often something is due in so many steps of `step_tok` tokens more, after `step` steps of `tokens` tokens."""
    due = 0
    for start in range(0, more, BLOCK_STEPS):
        done = np.arange(start + 1, min(start + BLOCK_STEPS, more) + 1)
        is_due = np.zeros(len(done), bool)
        if every.steps is not None:
            is_due |= (step + done) % every.steps == 0
        if every.tokens is not None:
            after = tokens + done * step_tok
            is_due |= after // every.tokens > (after - step_tok) // every.tokens
        due += int(is_due.sum())
    return due


def training_flops(config: Config, shape: Shape, vocab_size: int) -> float:
    """Operations of all stages, without recomputation."""
    return sum(
        stage_steps(stage) * step_flops(shape, stage.context_tok, stage.global_batch_tok, vocab_size)
        for stage in config.stages.values()
    )
