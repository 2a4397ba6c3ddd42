"""The learning rate of every step, against its formula: in tokens, from the start of each stage and after a resume."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest

from megatron_lccp.config.tree import Config, StageConfig
from megatron_lccp.training.optimizer import make_scheduler

BATCH, TOKENS, WARMUP, LR, MIN_LR = 100, 1000, 200, 1e-2, 1e-3


def naive(kind: str, tokens: int) -> float:
    """The rate of the step that takes the stage's count to `tokens`."""
    if tokens <= WARMUP:
        return LR * tokens / WARMUP
    gone = min(1.0, (tokens - WARMUP) / (TOKENS - WARMUP))
    left = {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}[kind]
    return MIN_LR + (LR - MIN_LR) * left


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("resumed_after", [0, 1, 2, 5, 9])
def test_rates_of_a_stage(kind: str, resumed_after: int) -> None:
    stage = StageConfig(
        tokens=TOKENS, global_batch_tok=BATCH, lr=LR, min_lr=MIN_LR, lr_schedule=kind, warmup_tokens=WARMUP
    )
    # as an earlier stage left them: the second group without weight decay
    left = [{"max_lr": 7.0, "min_lr": 5.0, "lr": 6.0, "wd_mult": wd_mult} for wd_mult in (1.0, 0.0)]
    groups = [{**group, "params": [], "weight_decay": 9.0} for group in left]
    config = dataclasses.replace(Config(), stages={"before": StageConfig(), "it": stage})
    scheduler = make_scheduler(SimpleNamespace(param_groups=groups), config, stage, resumed_after * BATCH)
    for step in range(resumed_after + 1, 13):  # two of them beyond the budget, to which steps are rounded up
        scheduler.step(increment=BATCH)
        assert [group["lr"] for group in groups] == pytest.approx([naive(kind, step * BATCH)] * 2), step
        assert [group["weight_decay"] for group in groups] == [config.optimizer.weight_decay, 0.0]
