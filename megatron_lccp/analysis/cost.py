"""What tokens of a run cost: measured from its steps, or planned.

In: a Run, or the JSON of `lccp plan --json`. Out: a Price, GPU-hours of any number of tokens, and the GPU-hours that a
run had spent at each step. A rank is a GPU. Windows and pauses are not counted: they are no training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from megatron_lccp.analysis.run import Run
from megatron_lccp.text import count_text, hours_text

RECENT = 200
"""Steps whose median is the speed of a run now."""
NO_RANKS = "its steps do not say on how many ranks they ran; give --ranks"
NO_TIMES = "steps.jsonl has no times of steps"


@dataclass(frozen=True)
class Price:
    """What a token costs from here on."""

    gpu_hours_per_token: float
    how: str
    """Where the number comes from: measured, 15,000 tokens/s on 2 ranks."""

    def gpu_hours(self, tokens: float) -> float:
        """Of so many tokens."""
        return tokens * self.gpu_hours_per_token


@dataclass(frozen=True)
class Unpriced:
    """Why nothing can be said."""

    why: str


def measured_price(run: Run, ranks: int | None = None) -> Price | Unpriced:
    """By the median speed of the last RECENT steps of the last stage; `ranks` where steps do not say theirs."""
    steps = run.steps
    if not len(steps):
        return Unpriced(NO_TIMES)
    steps = _with_ranks(steps[(steps["stage"] == steps["stage"].iloc[-1]) & ~steps["skipped"]], ranks)
    steps = steps[steps["tokens_per_s"] > 0].tail(RECENT)
    if not len(steps):
        return Unpriced(NO_TIMES)
    last = steps["ranks"].iloc[-1]
    if pd.isna(last):
        return Unpriced(NO_RANKS)
    speed = float(steps.loc[steps["ranks"] == last, "tokens_per_s"].median())
    how = f"measured: {speed:,.0f} tokens/s on {count_text(int(last), 'rank')}, windows not counted"
    return Price(int(last) / speed / 3600, how)


def planned_price(path: str | Path, stage: str) -> Price:
    """By what `lccp plan --json` printed into a file: of this stage, or of its last one.

    Raises ValueError in one line for a file that is none, or holds several kinds of GPU.
    """
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
        kinds, ranks = plan["gpus"], int(plan["ranks"])
        if len(kinds) != 1:
            raise ValueError(f"holds {len(kinds)} kinds of GPU; make it with lccp plan --gpu H100 --json")
        ((kind, of_kind),) = kinds.items()
        name = stage if stage in plan["stages"] else list(plan["stages"])[-1]
        hours, tokens = float(of_kind["stages"][name]["gpu_hours"]), float(plan["stages"][name]["tokens"])
        if not (hours > 0 and tokens > 0):
            raise ValueError(f"stage {name} has {hours:g} GPU-hours for {tokens:g} tokens; plan one that has some")
    except OSError as error:
        raise ValueError(f"--plan: {path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, IndexError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"--plan: {path} is not what lccp plan --json prints; make it with that") from error
    except ValueError as error:
        raise ValueError(f"--plan: {path}: {error}") from error
    return Price(hours / tokens, f"planned: stage {name} on {ranks} {kind}")


def spent_gpu_hours(run: Run, ranks: int | None = None) -> pd.DataFrame | Unpriced:
    """GPU-hours of all steps so far: step, gpu_hours; a skipped step costs as any other."""
    if not len(run.steps) or run.steps["time_s"].isna().any():
        return Unpriced(NO_TIMES)
    steps = _with_ranks(run.steps, ranks).sort_values("step", kind="stable")
    if steps["ranks"].isna().any():
        return Unpriced(NO_RANKS)
    hours = (steps["time_s"] * steps["ranks"]).cumsum() / 3600
    return pd.DataFrame({"step": steps["step"].astype(int), "gpu_hours": hours})


def _with_ranks(steps: pd.DataFrame, ranks: int | None) -> pd.DataFrame:
    said = pd.to_numeric(steps["ranks"]) if "ranks" in steps else pd.Series(np.nan, steps.index)
    return steps.assign(ranks=said if ranks is None else said.fillna(ranks))


def cost_text(gpu_hours: float) -> str:
    """0.031 GPU-hours, 12 GPU-hours, 5,300 GPU-hours."""
    return f"{hours_text(gpu_hours)} GPU-hours"
