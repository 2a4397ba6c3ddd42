"""A signal: what may saturate, as one number per checkpoint of the LCCP, with its samples.

In: values by checkpoint, or samples paired over checkpoints. Out: Signals. Behavioural: does the model answer right.
Probabilistic: how sure is it. Mechanistic: what do its heads do (sections 4 to 6 of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from megatron_lccp.analysis.statistics.paired import Paired
from megatron_lccp.schema import Level, Metric

MARGINS = {"share": 0.01, "nat": 0.01}
"""Gain per +25 % tokens that is no longer worth them, by unit; 1 of all others, such as points, percent and heads."""


@dataclass(frozen=True)
class Signal:
    """One number per checkpoint k, in order, and the values of samples s that it is the mean of."""

    name: str
    level: Level
    unit: str
    better: Literal[1, -1]
    """1: higher is better; -1: lower."""
    steps_k: np.ndarray
    tokens_k: np.ndarray
    """Training tokens, all stages."""
    value_k: np.ndarray
    sample_ks: np.ndarray | None = None
    """Values of independent clusters of samples, the same ones at all checkpoints; None: only the mean is known, or the
    value is none."""
    resolution: float = 0.0
    """Smallest step that the value can make."""
    bounds: tuple[float, float] | None = None
    """Worst and best value there can be."""
    turnover: bool = False
    """The value itself is what changed over +25 % tokens; it has no trend."""
    margin: float | None = None
    """Gain per +25 % tokens that is no longer worth them; None: as MARGINS says."""
    judged: bool = True
    """Whether the verdict asks if it is saturated; else it is correlated alone."""
    benchmark: bool = False
    """The score of a task after fine-tuning, which signals are correlated with."""

    @property
    def samples(self) -> int:
        return 0 if self.sample_ks is None else self.sample_ks.shape[1]

    @property
    def default_margin(self) -> float:
        return MARGINS.get(self.unit, 1.0) if self.margin is None else self.margin


def after_start(signal: Signal, lccp_from: int) -> Signal:
    """The signal's checkpoints after the start of the LCCP, each token count once, of finite values alone: those that
    have a place on a log axis of tokens."""
    kept = (signal.tokens_k > lccp_from) & np.isfinite(signal.value_k)
    kept[:-1] &= signal.tokens_k[:-1] != signal.tokens_k[1:]
    samples = None if signal.sample_ks is None else signal.sample_ks[kept]
    return Signal(**(vars(signal) | dict(
        steps_k=signal.steps_k[kept], tokens_k=signal.tokens_k[kept], value_k=signal.value_k[kept], sample_ks=samples,
    )))  # fmt: skip


def sampled(name: str, level: Level, unit: str, better, found: Paired, cells=slice(None), **more) -> Signal:
    """The mean over cells and clusters of what was measured per sample."""
    sample_ks = found.value_kcs[:, cells].mean(axis=1) if len(found) else np.zeros((0, 0))
    value_k = sample_ks.mean(axis=1) if len(found) else np.zeros(0)
    return at_checkpoints(
        found.checkpoints.iloc[: len(value_k)], name, level, unit, better, value_k, sample_ks=sample_ks, **more
    )


def at_checkpoints(
    checkpoints: pd.DataFrame, name: str, level: Level, unit: str, better, value_k: np.ndarray, **more
) -> Signal:
    steps_k, tokens_k = (checkpoints[column].to_numpy(dtype=int) for column in ("step", "tokens"))
    return Signal(name, level, unit, better, steps_k, tokens_k, value_k, **more)


def of_samples(name: str, metric: Metric, found: Paired, cells=slice(None)) -> Signal:
    """The signal of a metric that was measured per sample. The metric has a level and a better way."""
    resolution = 1 / max(1, found.value_kcs[:1].size) if metric.unit == "share" else 0.0
    return sampled(name, *_kind(metric), found, cells, resolution=resolution, **_declared(metric))


def of_means(name: str, metric: Metric, mean_k: pd.DataFrame) -> Signal:
    """The signal of a metric of which the means alone are known: CHECKPOINT and value."""
    value_k = mean_k["value"].to_numpy(dtype=float)
    return at_checkpoints(mean_k, name, *_kind(metric), value_k, **_declared(metric))


def _kind(metric: Metric) -> tuple[Level, str, Literal[1, -1]]:
    assert metric.level is not None and metric.better is not None
    return metric.level, metric.unit, 1 if metric.better == "higher" else -1


def _declared(metric: Metric) -> dict[str, Any]:
    low, high = metric.bounds
    bounds = None if low is None or high is None else (low, high) if metric.better == "higher" else (high, low)
    return dict(bounds=bounds, margin=metric.margin, judged=metric.judged, benchmark=metric.benchmark)
