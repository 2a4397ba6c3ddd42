"""What the stages of a configuration say of their data, before any of it is opened.

In: a configuration. Out: shares of sources, steps, orders.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from megatron_lccp.config.tree import Config, StageConfig


def mixture_weights(stage: StageConfig) -> dict[str, float]:
    """Source -> share of the stage's tokens, in [0, 1], adding up to 1; a source of several parts gets the sum."""
    weights: dict[str, float] = defaultdict(float)
    all_shares = sum(part.share for part in stage.mixture.values())
    for part in stage.mixture.values():
        for source, weight in part.sources.items():
            weights[source] += part.share / all_shares * weight / sum(part.sources.values())
    return dict(weights)


def stage_steps(stage: StageConfig) -> int:
    """Optimizer steps that reach the stage's token budget."""
    return math.ceil(stage.tokens / stage.global_batch_tok)


def order_of(stages: Mapping[str, StageConfig], name: str) -> tuple[str, int]:
    """(stage whose order of samples this one follows, itself unless it goes on from another; steps of that order done
    before it begins)."""
    done = 0
    while (before := stages[name].goes_on_from) is not None:
        name, done = before, done + stage_steps(stages[before])
    return name, done


def trained_on(config: Config) -> tuple[str, ...]:
    """Every source that some stage trains on, in the order of the configuration."""
    mixtures = (part for stage in config.stages.values() for part in stage.mixture.values())
    return tuple(dict.fromkeys(source for part in mixtures for source in part.sources))
