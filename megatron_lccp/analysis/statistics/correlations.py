"""Correlations of signals with benchmarks over checkpoints (Tables 3, 4, 6, 7), each beside its noise floor.

In: tidy frames of values by tokens. Out: a frame, one line per pair.

The floor of an r. Two series that fall over the same tokens correlate, whatever they have to do with each other, so r
is read against what unrelated series would reach that have the same trends and the same smoothness. A trend is the
polynomial of degree sqrt(n), rounded, in log tokens, least squares: 2 for 6 checkpoints, which holds the log law and
most of a plateau. What is left of each series is drawn anew as AR(1) noise of the autocorrelation that it shows
(uncertain, from 0.2 to 0.9), apart for the two, and r is put together again from the trends as they are and the new
rest, in its measured size. The floor is the |r| that 95 % of these draws stay under.
An r over its floor says that the two go up and down together from checkpoint to checkpoint; one under it may still be
no accident, but these checkpoints do not show more than that both have a trend. Of unrelated series with a log law or
a plateau each, 3 to 7 % are over it, of plateaus with noise of 1 % of their fall 15 % with 6 checkpoints, and 8 % or
less with more: bends that a polynomial cannot follow, at the same place and without noise, count as going together.
tests/analysis/statistics/test_correlations.py plants both kinds. Legend: k checkpoints (n in all), j draws, p terms of a trend.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import linalg

from megatron_lccp.analysis.statistics import trend
from megatron_lccp.analysis.statistics.stats import LEVEL, pearson

DRAWS = 1000
AUTOCORRELATIONS = np.linspace(0.2, 0.9, 8)
FEWEST = 5
"""Checkpoints for a floor: with fewer, a trend leaves nothing that could go together."""


def correlations(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """Pearson correlation of every signal of `left` with every one of `right` over the checkpoints that both have.

    Both have columns signal, tokens, value; of several values at the same tokens the last counts. One line per pair:
    left, right, r, p, low, high, n, floor.
    """
    lines = []
    for (name, of_name), (other, of_other) in (
        (a, b) for a in left.groupby("signal", sort=False) for b in right.groupby("signal", sort=False)
    ):
        once = (part.drop_duplicates("tokens", keep="last") for part in (of_name, of_other))
        both = pd.merge(*once, on="tokens", suffixes=("", "_other")).sort_values("tokens")
        tokens_k, x_k, y_k = both[["tokens", "value", "value_other"]].to_numpy(float).T
        found = pearson(x_k, y_k)
        lines.append({"left": name, "right": other, **vars(found), "floor": noise_floor(tokens_k, x_k, y_k)})
    return pd.DataFrame(lines, columns=["left", "right", "r", "p", "low", "high", "n", "floor"])


def noise_floor(tokens_k: np.ndarray, x_k: np.ndarray, y_k: np.ndarray) -> float:
    """The |r| that a share LEVEL of unrelated series with the trends and the smoothness of these two stay under.

    tokens_k ascend. NaN with fewer than FEWEST finite pairs, and for a series that is the same throughout.
    """
    finite_k = np.isfinite(x_k) & np.isfinite(y_k)
    tokens_k, values = tokens_k[finite_k], [x_k[finite_k], y_k[finite_k]]
    if len(tokens_k) < FEWEST or any(np.ptp(value_k) == 0 for value_k in values):
        return np.nan
    rng = np.random.default_rng(len(tokens_k))
    trend_kp = _trend_terms(tokens_k)
    trends, sizes, rests = [], [], []
    for value_k in values:
        value_k = (value_k - value_k.mean()) / np.linalg.norm(value_k - value_k.mean())
        trends.append(trend_kp @ (trend_kp.T @ value_k))
        sizes.append(np.linalg.norm(value_k - trends[-1]))
        rest_jk = _noise_like(rng, tokens_k, trend_kp, value_k)
        rests.append(rest_jk / np.linalg.norm(rest_jk, axis=1, keepdims=True))
    r_j = trends[0] @ trends[1] + sizes[0] * sizes[1] * (rests[0] * rests[1]).sum(axis=1)
    return float(np.quantile(np.abs(r_j), LEVEL))


def _trend_terms(tokens_k: np.ndarray) -> np.ndarray:
    """An orthonormal basis [k, p] of the trends; the log axis begins a usual distance of checkpoints before the
    first, so that one at no tokens has a place on it."""
    log_k = np.log1p((tokens_k - tokens_k[0]) / np.median(np.diff(tokens_k)))
    return np.linalg.qr(np.polynomial.legendre.legvander(2 * log_k / log_k[-1] - 1, round(np.sqrt(len(log_k)))))[0]


def _noise_like(rng: np.random.Generator, tokens_k: np.ndarray, trend_kp: np.ndarray, value_k: np.ndarray):
    """AR(1) noise [j, k] like what a series has beyond its trend, less the trend that it has itself."""
    clock_k = tokens_k / np.median(np.diff(tokens_k))
    noise = trend.shapes_of(trend.ar_shape(clock_k, each) for each in AUTOCORRELATIONS)
    belief = trend.believe(trend_kp, np.eye(trend_kp.shape[1])[0], value_k[None], noise)
    chosen_j = rng.choice(len(noise), p=belief.weight_qr[:, 0], size=DRAWS)
    noise_jk = rng.normal(size=(DRAWS, len(tokens_k)))
    for number in np.unique(chosen_j):
        lower = linalg.cholesky(noise.covariance_qww[number], lower=True)
        noise_jk[chosen_j == number] @= lower.T
    return noise_jk - noise_jk @ trend_kp @ trend_kp.T
