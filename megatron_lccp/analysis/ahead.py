"""What the configuration of a run still plans: tokens to go, a decay of the learning rate, stages not yet begun.

In: a Run with its resolved configuration, config.yaml as text. Out: Ahead, or None where none was kept (a loop of
others) or it cannot be read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import yaml

from megatron_lccp.analysis.run import Run
from megatron_lccp.text import span_text


@dataclass(frozen=True)
class Ahead:
    """What is still to come of a run."""

    tokens_left: int
    """Training tokens that the stages still plan."""
    decay: str
    """The next fall of the learning rate, as "stage decay, 100B to 120B tokens"; empty: none is planned."""
    stages: tuple[str, ...]
    """Stages that have not begun."""


def ahead_of(run: Run) -> Ahead | None:
    """What config.yaml plans after the tokens on record."""
    try:
        tree = yaml.safe_load(run.config_text)
        stages, cap = dict(tree["stages"]), (tree.get("training") or {}).get("steps")
        return _ahead(stages, cap, _now(run))
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        return None


def _now(run: Run) -> int:
    return int(pd.concat([frame["tokens"] for frame in (run.steps, run.rows) if len(frame)]).max())


def _ahead(stages: Mapping[str, Mapping[str, Any]], cap: int | None, now: int) -> Ahead:
    """`cap`: training.steps, which ends the run before its stages do."""
    start, decay, left, to_come, rate = 0, "", 0, [], None
    for name, stage in stages.items():
        batch = int(stage["global_batch_tok"])
        steps = math.ceil(int(stage["tokens"]) / batch)
        steps = steps if cap is None else max(0, min(steps, cap))
        cap = None if cap is None else cap - steps
        end, peak = start + steps * batch, float(stage["lr"])
        if end > now:
            left += end - max(now, start)
            to_come += [name] * (start >= now)
            falls = stage.get("lr_schedule", "constant") != "constant" and float(stage.get("min_lr", 0.0)) < peak
            if not decay and (falls or (rate is not None and peak < rate)):
                decay = f"stage {name}, {span_text(max(now, start), end)} tokens"
        start, rate = end, peak
    return Ahead(left, decay, tuple(to_come))
