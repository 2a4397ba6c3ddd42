"""Correlations over checkpoints: r is scipy's, and its noise floor is what unrelated series reach.

The floor is compared with one written out here another way, and asked of pairs planted to be linked, or not.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import signal, stats

from megatron_lccp.analysis.statistics import correlations

PAPER_TOKENS = np.array([0, 20, 50, 100, 150, 200.0]) * 1e9


def tokens_of(n: int) -> np.ndarray:
    """Those of the paper's six checkpoints, or evenly spaced ones."""
    return PAPER_TOKENS if n == 6 else np.arange(n) * 4e9


def test_every_signal_against_every_benchmark_over_shared_checkpoints() -> None:
    tokens = np.arange(1, 8) * 10
    signals = pd.DataFrame({"signal": "niah", "tokens": tokens, "value": [1.0, 2, 3, 4, 5, 6, 100]})
    ruler = pd.DataFrame({"signal": "ruler", "tokens": tokens[:6], "value": [2.0, 1, 4, 3, 6, 5]})
    mrcr = ruler.assign(signal="mrcr", value=-ruler["value"])
    found = correlations.correlations(signals, pd.concat([ruler, mrcr]))
    assert found[["left", "right"]].to_numpy().tolist() == [["niah", "ruler"], ["niah", "mrcr"]]
    expected = stats.pearsonr(range(6), [2, 1, 4, 3, 6, 5])
    assert found["r"].tolist() == pytest.approx([expected.statistic, -expected.statistic])
    assert found["p"].tolist() == pytest.approx([expected.pvalue] * 2) and (found["n"] == 6).all()


def test_a_stage_that_ends_where_the_next_begins_counts_once() -> None:
    """Both measure at the same tokens; pairs of one with the other are none."""
    tokens = np.array([10, 20, 20, 30, 40, 50])
    left = pd.DataFrame({"signal": "nll", "tokens": tokens, "value": [6.0, 9, 5, 4, 2, 3]})
    right = pd.DataFrame({"signal": "ruler", "tokens": tokens, "value": [1.0, 9, 2, 3, 5, 4]})
    found = correlations.correlations(left, right).iloc[0]
    assert found["n"] == 5 and found["r"] == pytest.approx(stats.pearsonr([6, 5, 4, 2, 3], [1, 2, 3, 5, 4])[0])
    assert 0.9 < found["floor"] <= 1


def drawn(rng: np.random.Generator, kind: str, tokens_k: np.ndarray) -> np.ndarray:
    """A series of its own: what it does over tokens, and its noise."""
    n = len(tokens_k)
    at = tokens_k / tokens_k[-1]
    noise = rng.normal(size=n)
    if "ar" in kind:
        noise = signal.lfilter([1.0], [1.0, -0.5], rng.normal(size=n + 50))[50:] * np.sqrt(0.75)
    if "log" in kind:
        return -np.log1p(at * n) + 0.15 * noise
    if "plateau" in kind:
        return -np.exp(-at * rng.uniform(2, 6)) + 0.05 * noise
    return noise


@pytest.mark.parametrize(
    ("kind", "n"), [("white", 6), ("ar", 20), ("log", 6), ("log, ar", 60), ("plateau", 6), ("plateau", 40)]
)
def test_unrelated_series_stay_under_their_floor(kind: str, n: int) -> None:
    """95 % of them, and what 200 pairs leave to chance, whether they trend or not."""
    rng, tokens_k = np.random.default_rng(n), tokens_of(n)
    over = []
    for _ in range(200):
        x_k, y_k = (drawn(rng, kind, tokens_k) for _ in range(2))
        over.append(abs(stats.pearsonr(x_k, y_k)[0]) > correlations.noise_floor(tokens_k, x_k, y_k))
    assert 0.005 < np.mean(over) < 0.1


@pytest.mark.parametrize(("n", "least"), [(6, 0.4), (20, 0.95)])
def test_what_goes_up_and_down_together_is_over_its_floor(n: int, least: float) -> None:
    """A benchmark that follows a falling NLL, its noise too; with opposite noise it is no more than a trend."""
    rng, tokens_k = np.random.default_rng(n), tokens_of(n)
    over = {1: [], -1: []}
    for _ in range(60):
        shared = rng.normal(size=n)
        x_k = -np.log1p(np.arange(n)) + 0.3 * shared
        for sign in over:
            y_k = np.log1p(np.arange(n)) - sign * 0.3 * (0.95 * shared + 0.3 * rng.normal(size=n))
            r = stats.pearsonr(x_k, y_k)[0]
            assert r < -0.3
            over[sign].append(abs(r) > correlations.noise_floor(tokens_k, x_k, y_k))
    assert np.mean(over[1]) > least and np.mean(over[-1]) == 0


@pytest.mark.parametrize("n", [8, 60])
def test_the_floor_is_the_trends_and_noise_drawn_anew(n: int) -> None:
    """Against surrogates made one by one: polynomials by polyfit, AR(1) noise by recursion with an autocorrelation of
    0.2 to 0.9 weighed by how likely it makes the rest of the series."""
    rng, tokens_k = np.random.default_rng(n), np.arange(n) * 2e9
    x_k, y_k = 3 - np.log1p(np.arange(n)) + rng.normal(size=n), 6 / n * np.arange(n) + rng.normal(size=n)
    log_k, degree, fits = np.log1p(np.arange(n)), round(n**0.5), []
    for value_k in (x_k, y_k):
        fitted_k = np.polyval(np.polyfit(log_k, value_k, degree), log_k)
        fits.append((fitted_k, value_k - fitted_k, likelihoods(value_k, log_k, degree)))
    found = []
    for _ in range(3000):
        series = []
        for fitted_k, rest_k, weight_q in fits:
            autocorrelation = rng.choice(np.linspace(0.2, 0.9, 8), p=weight_q)
            noise = [rng.normal()]
            for _ in range(n - 1):
                noise.append(autocorrelation * noise[-1] + np.sqrt(1 - autocorrelation**2) * rng.normal())
            noise -= np.polyval(np.polyfit(log_k, noise, degree), log_k)
            series.append(fitted_k + noise * np.linalg.norm(rest_k) / np.linalg.norm(noise))
        found.append(abs(stats.pearsonr(*series)[0]))
    assert correlations.noise_floor(tokens_k, x_k, y_k) == pytest.approx(np.quantile(found, 0.95), abs=0.015)


def likelihoods(value_k: np.ndarray, log_k: np.ndarray, degree: int) -> np.ndarray:
    """Of each autocorrelation, what is left of the likelihood when trend and spread are integrated out: from the
    density of n - p combinations of the values that hold no trend."""
    n = len(value_k)
    free_mk = np.linalg.svd(np.vander(log_k, degree + 1).T)[2][degree + 1 :]
    contrast_m, found = free_mk @ value_k, []
    for autocorrelation in np.linspace(0.2, 0.9, 8):
        covariance_mm = free_mk @ autocorrelation ** np.abs(np.subtract.outer(range(n), range(n))) @ free_mk.T
        quadratic = contrast_m @ np.linalg.solve(covariance_mm, contrast_m)
        found.append(-0.5 * np.linalg.slogdet(covariance_mm)[1] - 0.5 * len(contrast_m) * np.log(quadratic))
    weight_q = np.exp(np.array(found) - max(found))
    return weight_q / weight_q.sum()


def test_what_has_no_floor_has_none() -> None:
    tokens_k, rng = np.arange(6) * 1.0, np.random.default_rng(0)
    x_k, y_k = rng.normal(size=(2, 6))
    assert np.isnan(correlations.noise_floor(tokens_k[:4], x_k[:4], y_k[:4]))
    assert np.isnan(correlations.noise_floor(tokens_k, x_k, np.ones(6)))
    assert np.isnan(correlations.noise_floor(tokens_k, np.where(tokens_k < 2, np.nan, x_k), y_k))
    straight = correlations.noise_floor(tokens_k, np.log1p(tokens_k), 1 - np.log1p(tokens_k))
    assert straight == pytest.approx(1)  # two trends and nothing else: no r is over it
