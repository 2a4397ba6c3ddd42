"""The training itself: loss, speed, health, and what measuring cost.

In: steps, averages of training health, rows `window_time`. Out: frames, figures, tables and highlights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from megatron_lccp.analysis.charts.chart import Chart, Curves, NothingToDraw
from megatron_lccp.analysis.charts.parts import Runs, is_wide, lines_of_runs, over_tokens, whole
from megatron_lccp.analysis.charts.style import thin
from megatron_lccp.analysis.frames import CHECKPOINT, at_checkpoint, checkpoints
from megatron_lccp.analysis.measured.columns import MONITOR, STAGE, Column, count_cell, number_cell, table
from megatron_lccp.analysis.measured.highlight import Highlight
from megatron_lccp.analysis.measured.shown import Figure, Shown
from megatron_lccp.analysis.run import Run
from megatron_lccp.text import duration_text, tokens_text

HEALTH_BINS = 300
_PARTS = ("attention", "router", "experts", "norms", "embedding")
HEALTH = (
    ("router entropy (nat)", ("router_entropy",)),
    ("largest expert load / mean load", ("expert_load_max",)),
    ("largest attention logit", ("attention_logit_max",)),
    ("gradient norm by part", tuple(f"grad_norm_{part}" for part in _PARTS)),
    ("dropped share", ("dropped_share",)),
)


def window_times(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds each monitor took by checkpoint: monitor, time_s."""
    rows = rows[rows["metric"] == "window_time"].sort_values(["run", "tokens", "step"], kind="stable")
    return rows[[*CHECKPOINT, "monitor", "value"]].rename(columns={"value": "time_s"}).reset_index(drop=True)


def health(rows: pd.DataFrame) -> pd.DataFrame:
    """Training health, thinned to HEALTH_BINS stretches of steps: metric, value, low, high, n.

    `rows` are averages by step, as `RunStore.read_means(by=[*CHECKPOINT, "metric"])` gives them. value: mean over
    layers and the steps of a stretch; low, high: the least and the largest; n: how many numbers. The load of experts
    becomes `expert_load_max`, the largest share of an expert divided by the mean share: 1 is balanced.
    """
    load = rows["metric"] == "expert_load"
    largest = rows[load].assign(metric="expert_load_max", value=lambda part: part["high"] / part["value"])
    largest = largest.assign(low=largest["value"], high=largest["value"])
    rows = pd.concat([rows[~load], largest], ignore_index=True)
    steps = np.sort(rows["step"].unique())
    bins = np.arange(len(steps)) * min(HEALTH_BINS, len(steps)) // max(len(steps), 1)
    rows = rows.assign(bin=rows["step"].map(dict(zip(steps, bins, strict=True))))
    groups = rows.groupby(["run", "metric", "bin"], sort=False)
    thin = groups.agg(step=("step", "last"), tokens=("tokens", "last"), stage=("stage", "last"),
                      value=("value", "mean"), low=("low", "min"), high=("high", "max"), n=("n", "sum"))  # fmt: skip
    return thin.reset_index()[[*CHECKPOINT, "metric", "value", "low", "high", "n"]]


def thinned_health(run: Run) -> pd.DataFrame:
    """`health` of a run."""
    return health(run.health_means)


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
        raise NothingToDraw("training curves (steps.jsonl, which `lccp train` writes)")
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


def health_curves(runs: Runs) -> Chart:
    """Training health over tokens: routing, attention logits, gradients by part."""
    frame = whole(
        (run.derived(thinned_health) for run in runs),
        "training health (training.health_every)",
    )
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


def stage_tables(run: Run) -> Iterator[str]:
    if not len(run.steps):
        return
    every = run.steps.groupby("stage", sort=False)
    taken = run.steps[~run.steps["skipped"]].groupby("stage", sort=False)
    of_stage = pd.DataFrame(
        {
            "steps": every.size(),
            "skipped": every["skipped"].sum(),
            "first_loss": taken["loss"].first(),
            "last_loss": taken["loss"].last(),
            "rate": every["tokens_per_s"].median(),
            "time_s": every["time_s"].sum(min_count=1),
        }
    )
    columns = (
        STAGE,
        Column("tokens from", "tokens_from", tokens_text),
        Column("to", "tokens_to", tokens_text),
        Column("steps", "steps", count_cell),
        Column("skipped", "skipped", count_cell),
        Column("loss, first", "first_loss", number_cell),
        Column("loss, last", "last_loss", number_cell),
        Column("tokens/s, median", "rate", count_cell),
        Column("time", "time_s", duration_text),
    )
    yield table("t-stages", "Training by stage", run.spans.merge(of_stage, left_on="stage", right_index=True), columns)


def monitor_tables(run: Run) -> Iterator[str]:
    columns = (
        MONITOR,
        Column("windows", "size", count_cell),
        Column("mean", "mean", duration_text),
        Column("longest", "max", duration_text),
        Column("sum", "sum", duration_text),
    )
    times = (
        run.frame(window_times)
        .groupby("monitor", sort=False)["time_s"]
        .agg(["size", "mean", "max", "sum"])
        .reset_index()
    )
    yield table("t-windows", "Time of the monitors", times, columns)


def loss_highlight(run: Run) -> Iterator[Highlight]:
    losses = run.steps[~run.steps["skipped"]].dropna(subset=["loss"])
    if len(losses):
        last = losses["loss"].tail(10)
        note = f"nat per token: first step, and mean of the last {len(last)} of {len(losses):,} steps, over all stages"
        change = "no interval: every step trains on other text"
        yield Highlight("Training loss", f"{losses['loss'].iloc[0]:.3f} → {last.mean():.3f}", note, change)


def throughput_highlight(run: Run) -> Iterator[Highlight]:
    rates = run.steps.dropna(subset=["tokens_per_s"])
    if len(rates):
        medians = rates.groupby("stage", sort=False)["tokens_per_s"].median()
        each = ", ".join(f"{stage} {rate:,.0f}" for stage, rate in medians.items())
        yield Highlight(
            "Throughput", f"{medians.iloc[-1]:,.0f} tokens/s", f"median over the steps of the last stage ({each})"
        )


def window_share_highlight(run: Run) -> Iterator[Highlight]:
    measuring, training = run.frame(window_times)["time_s"].sum(), run.steps["time_s"].sum()
    if 0 < measuring < np.inf and 0 < training < np.inf:
        times = f"{duration_text(measuring)} in monitors, {duration_text(training)} in optimizer steps"
        yield Highlight(
            "Time spent measuring", f"{100 * measuring / (measuring + training):.1f} %", f"of wall time: {times}"
        )


def skipped_highlight(run: Run) -> Iterator[Highlight]:
    skipped = int(run.steps["skipped"].sum())
    if skipped:
        yield Highlight("Skipped steps", f"{skipped:,}", f"of {len(run.steps):,}: loss or gradient was not finite")


def window_scalars(run: Run) -> dict[str, float]:
    """Seconds of each monitor at the last checkpoint."""
    times = run.frame(window_times)
    last = at_checkpoint(times, checkpoints(times).iloc[-1]) if len(times) else times
    return {f"window/{line.monitor}_s": line.time_s for line in last.itertuples()}


def set_cautions(run: Run) -> Iterator[str]:
    if run.changed_sets:
        yield (
            f"The samples of {', '.join(run.changed_sets)} are not the same at all checkpoints (their sets have "
            "different hashes): differences between those checkpoints are not paired."
        )


SHOWN = Shown(
    place=90,
    figures=(
        Figure("training-curves", "Loss, gradient, learning rate and speed", "training", training_curves),
        Figure("health", "Training health", "training", health_curves),
    ),
    tables=(stage_tables, monitor_tables),
    highlights=(loss_highlight, throughput_highlight, window_share_highlight, skipped_highlight),
    scalars=window_scalars,
    cautions=set_cautions,
)
