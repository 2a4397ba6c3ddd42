"""The figures of the training itself: loss and speed, and the health of routing, gradients and attention.

In: RunFrames. Out: Charts, as in `figures`.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from megatron_lccp.analysis.charts.chart import Chart, Curves, NothingToDraw
from megatron_lccp.analysis.charts.parts import Runs, is_wide, lines_of_runs, over_tokens, whole
from megatron_lccp.analysis.charts.style import thin


def training_curves(runs: Runs) -> Chart:
    """Loss, gradient norm, learning rate and tokens/s over training tokens."""
    wanted = [
        ("loss", "loss (nat/token)", {}), ("grad_norm", "gradient norm", {}), ("lr", "learning rate", {"zero": True}),
        ("tokens_per_s", "tokens/s", {"zero": True}),
    ]  # fmt: skip
    parts = []
    for run in runs:
        taken = run.steps[~run.steps["skipped"]]
        for column, _, _ in wanted:
            x, y, low, high = thin(taken["tokens"].to_numpy(float), taken[column].to_numpy(float))
            bounds = (y, y) if low is None else (low, high)
            values = {"tokens": x, "value": y, "low": bounds[0], "high": bounds[1]}
            parts.append(pd.DataFrame({"run": run.name, "quantity": column} | values))
        skipped = run.steps.loc[run.steps["skipped"], "tokens"].astype(float)
        parts.append(pd.DataFrame({"run": run.name, "quantity": "skipped", "tokens": skipped, "value": np.nan}))
    frame = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    if not len(frame):
        raise NothingToDraw("No training curves: steps.jsonl is missing or empty; `lccp train` writes it.")
    panels = []
    for color, (column, label, options) in enumerate(wanted):
        part = frame[frame["quantity"] == column]
        if len(part):
            log = column == "grad_norm" and is_wide(part["value"])
            lines = lines_of_runs(runs, part, "value", "", color, low="low", high="high", marks=len(part) <= 40)
            panels.append(over_tokens(runs, lines, label, log_y=log, **options))
    skipped = int((frame["quantity"] == "skipped").sum())
    caption = (
        "Loss (mean over the batch's tokens), gradient norm before clipping, learning rate and throughput over "
        "training tokens; vertical lines mark where a stage begins. Where there are more steps than room, "
        "the line is the mean "
        "of neighbouring steps and the shade runs from the lowest to the highest of them. "
        + (f"{skipped} steps were skipped and are left out." if skipped else "No step was skipped.")
    )
    return Curves("", "", caption, frame, tuple(panels))


_PARTS = ("attention", "router", "experts", "norms", "embedding")
HEALTH = (
    ("router entropy (nat)", ("router_entropy",)),
    ("largest expert load / mean load", ("expert_load_max",)),
    ("largest attention logit", ("attention_logit_max",)),
    ("gradient norm by part", tuple(f"grad_norm_{part}" for part in _PARTS)),
    ("dropped share", ("dropped_share",)),
)


def health_curves(runs: Runs) -> Chart:
    """Training health over tokens: routing, attention logits, gradients by part."""
    frame = whole(runs, "health", "No training health: no rows of health; set training.health_every to 1 or more.")
    panels = []
    for label, metrics in HEALTH:
        lines = []
        for color, metric in enumerate(metrics):
            part = frame[frame["metric"] == metric]
            if len(part) and not (metric == "dropped_share" and not part["high"].any()):
                name = metric.removeprefix("grad_norm_") if len(metrics) > 1 else ""
                band = {} if len(metrics) > 1 else {"low": "low", "high": "high"}
                lines += lines_of_runs(runs, part, "value", name, color, marks=False, **band)
        if lines:
            log = len(metrics) > 1 and is_wide(pd.concat([line.frame["value"] for line in lines]))
            panels.append(over_tokens(runs, lines, label, log_y=log))
    caption = (
        "Over training tokens: mean over layers and neighbouring steps, with a shade from the least to the largest. "
        "Router entropy: 0 is a router that knows one expert for each token. Expert load: 1 is balanced. The largest "
        "attention logit is of a sample of rows; growth without end precedes overflow. Gradients before clipping."
    )
    return Curves("", "", caption, frame, tuple(panels))
