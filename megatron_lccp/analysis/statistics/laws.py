"""Two laws of a signal over tokens, and when each brings its gain per +25 % tokens under a margin.

In: tokens of the LCCP and values of the checkpoints. Out: Forecasts, the law that predicts better first.
log: y = B + A ln N, the paper's section 7.1, whose gain never changes. plateau: y = c + a N^-alpha, which ends at c.
Legend: k checkpoints, j bootstrap draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Law = Literal["log", "plateau"]
ALPHAS = np.geomspace(0.05, 4, 28)
GOLDEN, SECTIONS = (1 + 5**0.5) / 2, 30
HELD_OUT = 30
NEVER = 1000.0
"""Times the tokens so far: what a law puts off for longer counts as never."""
MIN_CHECKPOINTS = 5
"""To fit the plateau law's three numbers and still be wrong by something."""
DRAWS = 200


@dataclass(frozen=True)
class Forecast:
    """When a law, fitted to what was measured, brings the gain of a signal under its margin."""

    law: Law
    tokens: float
    """Training tokens, all stages, at which its gain per +25 % tokens is under the margin, no earlier than the last
    checkpoint; inf: never."""
    low: float
    """95 % interval of `tokens`: residuals drawn anew in blocks, samples in clusters."""
    high: float
    error: float
    """Root mean square error in predicting each checkpoint from those before it, in the unit of the signal."""


@dataclass(frozen=True)
class Fit:
    """One law fitted to one or many series at once: y = offset + slope f(N), f = ln N or N^-alpha (N over the last)."""

    offset_j: np.ndarray
    slope_j: np.ndarray
    alpha_j: np.ndarray | None

    def at(self, scaled_k: np.ndarray) -> np.ndarray:
        """Values [j, k] at tokens / last tokens."""
        return self.offset_j[:, None] + self.slope_j[:, None] * _feature(scaled_k, self.alpha_j)

    def under(self, margin: float) -> np.ndarray:
        """Tokens / last tokens from which on the gain per +25 % tokens is under the margin, for values that should
        rise; at least 1, inf if not within NEVER."""
        if self.alpha_j is None:
            return np.where(self.slope_j * np.log(1.25) < margin, 1.0, np.inf)
        first_j = -self.slope_j * (1 - 1.25**-self.alpha_j)  # the gain from 1 to 1.25; it falls with N^-alpha
        with np.errstate(divide="ignore", over="ignore"):
            when_j = np.maximum(first_j / margin, 1.0) ** (1 / self.alpha_j)
        return np.where(when_j > NEVER, np.inf, when_j)


def _feature(scaled_k: np.ndarray, alpha_j: np.ndarray | None) -> np.ndarray:
    return np.log(scaled_k)[None] if alpha_j is None else scaled_k[None] ** -alpha_j[:, None]


def fit(law: Law, scaled_k: np.ndarray, value_jk: np.ndarray) -> Fit:
    """Least squares; the plateau law's alpha is the best of ALPHAS, then refined between its neighbours there by golden
    sections, of all series at once."""
    if law == "log":
        return Fit(*_line(_feature(scaled_k, None), value_jk)[:2], None)
    error_aj = np.stack([_line(_feature(scaled_k, np.array([alpha])), value_jk)[2] for alpha in ALPHAS])
    best_j = error_aj.argmin(axis=0)
    low_j, high_j = (np.log(ALPHAS[np.clip(best_j + step, 0, len(ALPHAS) - 1)]) for step in (-1, 1))
    for _ in range(SECTIONS):
        reach_j = (high_j - low_j) / GOLDEN
        ends = high_j - reach_j, low_j + reach_j
        one_j, two_j = (_line(_feature(scaled_k, np.exp(end_j)), value_jk)[2] for end_j in ends)
        low_j, high_j = np.where(one_j < two_j, low_j, ends[0]), np.where(one_j < two_j, ends[1], high_j)
    alpha_j = np.exp((low_j + high_j) / 2)
    return Fit(*_line(_feature(scaled_k, alpha_j), value_jk)[:2], alpha_j)


def _line(feature_jk: np.ndarray, value_jk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(offset, slope, sum of squared errors) of the least-squares line of each series over its feature."""
    mean_j = feature_jk.mean(axis=1)
    apart_jk = feature_jk - mean_j[:, None]
    slope_j = (apart_jk * value_jk).sum(axis=1) / (apart_jk**2).sum(axis=1)
    offset_j = value_jk.mean(axis=1) - slope_j * mean_j
    error_jk = value_jk - offset_j[:, None] - slope_j[:, None] * feature_jk
    return offset_j, slope_j, (error_jk**2).sum(axis=1)


def prediction_error(law: Law, tokens_k: np.ndarray, value_k: np.ndarray) -> float:
    """Root mean square error of predicting each of the last HELD_OUT checkpoints from those before it, of which there
    are MIN_CHECKPOINTS; NaN if there are no more."""
    errors = []
    for count in range(max(MIN_CHECKPOINTS, len(tokens_k) - HELD_OUT), len(tokens_k)):
        scaled_k = tokens_k[: count + 1] / tokens_k[count - 1]
        fitted = fit(law, scaled_k[:-1], value_k[None, :count])
        errors.append(fitted.at(scaled_k[-1:])[0, 0] - value_k[count])
    return float(np.sqrt(np.mean(np.square(errors)))) if errors else np.nan


def forecasts(
    tokens_k: np.ndarray, gain_k: np.ndarray, margin: float, tokens_from: int, sample_ks: np.ndarray | None = None
) -> tuple[Forecast, ...]:
    """Of both laws, the one that predicts held-out checkpoints better first; none with too few checkpoints.

    tokens_k: of the LCCP, which began at `tokens_from`. gain_k: values that should rise; sample_ks: the samples whose
    mean they are.
    """
    if len(tokens_k) < MIN_CHECKPOINTS:
        return ()
    last, scaled_k = tokens_k[-1], tokens_k / tokens_k[-1]
    rng, found = np.random.default_rng(0), []
    for law in ("log", "plateau"):
        fitted_k = fit(law, scaled_k, gain_k[None]).at(scaled_k)[0]
        drawn_jk = fitted_k + _blocks(rng, gain_k - fitted_k, freedom=len(tokens_k) - (2 if law == "log" else 3))
        if sample_ks is not None and sample_ks.shape[1] > 1:
            samples = sample_ks.shape[1]
            chosen_js = rng.integers(samples, size=(DRAWS, samples))
            drawn_jk = drawn_jk + sample_ks[:, chosen_js].mean(axis=2).T - sample_ks.mean(axis=1)
        at = tokens_from + last * fit(law, scaled_k, gain_k[None]).under(margin)[0]
        spread_j = tokens_from + last * fit(law, scaled_k, drawn_jk).under(margin)
        low, high = np.quantile(spread_j, [0.025, 0.975], method="nearest")
        found.append(Forecast(law, float(at), float(low), float(high), prediction_error(law, tokens_k, gain_k)))
    return tuple(sorted(found, key=lambda forecast: forecast.error))


def _blocks(rng: np.random.Generator, residual_k: np.ndarray, freedom: int) -> np.ndarray:
    """Residuals drawn anew [draws, k] in circular blocks of k^(1/3), scaled to the noise that fitting took away, each
    draw by another spread that so few of them may have had (as in stats.sample_draws)."""
    count = len(residual_k)
    length = max(1, round(count ** (1 / 3)))
    starts = rng.integers(count, size=(DRAWS, -(-count // length)))
    index = (starts[:, :, None] + np.arange(length)) % count
    wider_j = np.sqrt(count / rng.chisquare(max(freedom, 1), size=DRAWS))
    return wider_j[:, None] * residual_k[index.reshape(DRAWS, -1)[:, :count]]
