"""Correlations and means of a few checkpoints or samples, none without n and an interval.

In: plain arrays. Out: small frozen dataclasses. The arithmetic is scipy's; what is not defined (too few, all the same)
is NaN. Samples are resampled in whole clusters: a needle and its haystack, with all its cells, at all checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

DRAWS = 1000
LEVEL = 0.95
"""Of every interval."""
ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
"""Its quantiles."""


@dataclass(frozen=True)
class Correlation:
    """A correlation coefficient of n pairs, its two-sided p-value, and its interval."""

    r: float
    p: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Estimate:
    """A mean over n clusters of samples, or a difference of two, and its interval."""

    value: float
    low: float
    high: float
    n: int


def pearson(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Pearson's r of the pairs that are finite; p and interval as in `pearson_of`."""
    x, y = _pairs(x, y)
    return pearson_of(_coefficient(stats.pearsonr, x, y), len(x))


def pearson_of(r: float, n: int) -> Correlation:
    """p (Student's t, n - 2 degrees of freedom) and interval (Fisher's z) of a Pearson correlation, as published."""
    return _correlation(r, n, widening=1.0)


def spearman(x: ArrayLike, y: ArrayLike) -> Correlation:
    """Spearman's rank correlation of the pairs that are finite; p by Student's t, interval by Fisher's z with the
    standard error 1.03 / sqrt(n - 3) (Fieller, Hartley and Pearson, 1957: variance 1.06 / (n - 3))."""
    x, y = _pairs(x, y)
    return _correlation(_coefficient(stats.spearmanr, x, y), len(x), widening=np.sqrt(1.06))


def _coefficient(function, x: np.ndarray, y: np.ndarray) -> float:
    varied = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return float(function(x, y).statistic) if varied else np.nan


def _correlation(r: float, n: int, widening: float) -> Correlation:
    r, p, low, high = np.clip(np.float64(r), -1, 1), np.nan, np.nan, np.nan
    if n > 2 and not np.isnan(r):
        with np.errstate(divide="ignore"):
            p = 2 * stats.t.sf(abs(r) * np.sqrt((n - 2) / (1 - r**2)), n - 2)
    if n > 3 and not np.isnan(r):
        reach = stats.norm.ppf(ENDS[1]) * widening / np.sqrt(n - 3)
        with np.errstate(divide="ignore"):
            low, high = np.tanh(np.arctanh(r) + np.array([-reach, reach]))
    return Correlation(float(r), float(p), float(low), float(high), n)


def _pairs(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    finite = np.isfinite(x) & np.isfinite(y)
    return x[finite], y[finite]


@cache
def sample_draws(samples: int) -> np.ndarray:
    """Bootstrap weights [DRAWS, samples] whose product with the values of samples is the error of their mean.

    A plain bootstrap is too narrow for a few samples: by sqrt((n - 1) / n), and for not knowing their spread. Each draw
    is widened by a spread that n samples may have had, so that normal samples get the interval of Student's t.
    """
    assert samples > 1
    rng = np.random.default_rng(samples)
    drawn_js = rng.multinomial(samples, np.full(samples, 1 / samples), size=DRAWS) / samples - 1 / samples
    return drawn_js * np.sqrt(samples / rng.chisquare(samples - 1, size=DRAWS))[:, None]


def interval(value_sm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interval of the mean over samples (axis 0) of one or many columns at once; NaN with a single sample."""
    if len(value_sm) < 2:
        nothing = np.full(value_sm.shape[1:], np.nan)
        return nothing, nothing
    error_jm = np.tensordot(sample_draws(len(value_sm)), value_sm, axes=1)
    low, high = np.quantile(error_jm, ENDS, axis=0)
    mean = value_sm.mean(axis=0)
    return mean + low, mean + high


def change_of(before_sm: np.ndarray, after_sm: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> Estimate:
    """of(mean after) - of(mean before), the same samples (axis 0) at two checkpoints, drawn anew together.

    `of` takes means [..., m] to numbers [...]: exp of a mean, or how many means are over a threshold. An interval of
    such steps need not be around the change, and is widened to hold it.
    """
    change = float(of(after_sm.mean(axis=0)) - of(before_sm.mean(axis=0)))
    if len(before_sm) < 2:
        return Estimate(change, np.nan, np.nan, len(before_sm))
    draw_js = sample_draws(len(before_sm))
    before_j, after_j = (of(value_sm.mean(axis=0) + draw_js @ value_sm) for value_sm in (before_sm, after_sm))
    low, high = np.quantile(after_j - before_j, ENDS)
    return Estimate(change, float(np.minimum(low, change)), float(np.maximum(high, change)), len(before_sm))


def mean_over_samples(value_s: ArrayLike, cluster_s: Sequence | None = None) -> Estimate:
    """Mean of samples with its interval; samples of one cluster count as one. Clusters weigh the same."""
    value_c = np.asarray(value_s, dtype=float)
    if cluster_s is not None:
        value_c = pd.Series(value_c).groupby(np.asarray(cluster_s), sort=False).mean().to_numpy()
    if not len(value_c):
        return Estimate(np.nan, np.nan, np.nan, 0)
    low, high = interval(value_c)
    return Estimate(float(value_c.mean()), float(low), float(high), len(value_c))


def paired_difference(before_s: ArrayLike, after_s: ArrayLike, cluster_s: Sequence | None = None) -> Estimate:
    """Mean change from `before_s` to `after_s`, the same samples in the same order at two checkpoints."""
    before_s, after_s = np.asarray(before_s, dtype=float), np.asarray(after_s, dtype=float)
    assert before_s.shape == after_s.shape
    return mean_over_samples(after_s - before_s, cluster_s)
