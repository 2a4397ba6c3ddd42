"""Correlations and intervals: against scipy on the same numbers, and against the paper's p-values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from megatron_lccp.analysis.statistics import stats

# Tables 3 and 6, 4 and 7 of the paper: r and its p-value, over six checkpoints.
PUBLISHED = [
    (0.8552, 0.0299), (-0.9115, 0.0114), (0.8927, 0.0166), (-0.9231, 0.0087), (0.4977, 0.3151), (-0.6283, 0.1816),
    (0.8243, 0.0436), (0.8956, 0.0158), (0.8326, 0.0397), (0.8469, 0.0334), (0.5715, 0.2361), (0.6210, 0.1882),
]  # fmt: skip


def test_the_papers_p_values() -> None:
    """To four digits for 10 of 12; the other two differ by 1 in the last one, as r itself was rounded to four: some r
    that rounds to it has the paper's p."""
    printed = [f"{stats.pearson_of(r, 6).p:.4f}" for r, _ in PUBLISHED]
    same = [text == f"{p:.4f}" for text, (_, p) in zip(printed, PUBLISHED, strict=True)]
    assert sum(same) == 10, printed
    assert all(abs(float(text) - p) < 1.5e-4 for text, (_, p) in zip(printed, PUBLISHED, strict=True)), printed
    for r, p in PUBLISHED:
        most, least = (stats.pearson_of(abs(r) + half, 6).p for half in (-5e-5, 5e-5))
        assert least - 5e-5 < p < most + 5e-5, (r, p)


@pytest.mark.parametrize("n", [4, 6, 50])
def test_pearson_is_scipys(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(scale=0.01, size=n)
    y = 0.6 * x + rng.normal(scale=0.01, size=n)
    found, theirs = stats.pearson(x, y), scipy_stats.pearsonr(x, y)
    assert (found.r, found.p) == pytest.approx((theirs.statistic, theirs.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert found.n == n


def test_a_perfect_correlation_is_certain() -> None:
    found = stats.pearson([1, 2, 3, 4], [2, 4, 6, 8])
    assert (found.r, found.p) == pytest.approx((1, 0), abs=1e-7) and found.low == pytest.approx(1)
    assert stats.pearson_of(-1, 6) == stats.Correlation(-1, 0, -1, -1, 6)


def test_spearman_is_scipys_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, size=40), rng.integers(0, 5, size=40)
    found, theirs = stats.spearman(x, y), scipy_stats.spearmanr(x, y)
    assert (found.r, found.p) == pytest.approx((theirs.statistic, theirs.pvalue))


def test_spearmans_interval_covers() -> None:
    """Of normal pairs with a known rank correlation, 95 % of the intervals hold it."""
    rng, rho, held = np.random.default_rng(1), 0.6, 0
    truth = 6 / np.pi * np.arcsin(rho / 2)
    for _ in range(400):
        x, z = rng.normal(size=(2, 30))
        found = stats.spearman(x, rho * x + np.sqrt(1 - rho**2) * z)
        held += found.low < truth < found.high
    assert 0.92 < held / 400 < 0.98


@pytest.mark.parametrize(
    ("x", "y", "n"), [([1.0], [2.0], 1), ([1, 1, 1, 1], [1, 2, 3, 4], 4), ([1, np.nan, 3], [1, 2, np.inf], 1)]
)
def test_what_is_not_defined_is_nan(x, y, n: int) -> None:
    for found in (stats.pearson(x, y), stats.spearman(x, y)):
        assert np.isnan([found.r, found.p, found.low, found.high]).all() and found.n == n


def test_interval_of_many_samples_is_the_plain_bootstraps() -> None:
    value_s = np.random.default_rng(2).exponential(size=300)
    found = stats.mean_over_samples(value_s)
    theirs = scipy_stats.bootstrap((value_s,), np.mean, method="percentile", rng=0, n_resamples=4000)
    assert found.value == value_s.mean() and found.n == 300
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.1 * width)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.1 * width)


@pytest.mark.parametrize("samples", [4, 8])
def test_interval_of_few_samples_covers(samples: int) -> None:
    """Where a plain bootstrap of 4 samples holds the mean in 80 % of cases only."""
    rng = np.random.default_rng(samples)
    low, high = stats.interval(rng.normal(size=(samples, 4000)))
    assert 0.93 < ((low < 0) & (high > 0)).mean() < 0.98


def test_paired_difference_leaves_out_how_hard_a_sample_is() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(scale=10, size=20)
    after = hard - 0.5 + rng.normal(scale=0.1, size=20)
    found = stats.paired_difference(hard, after)
    theirs = scipy_stats.ttest_1samp(after - hard, 0).confidence_interval(0.95)
    assert found.value == pytest.approx((after - hard).mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_the_change_of_a_mean_is_the_mean_of_the_changes_and_of_its_exp_the_delta_methods() -> None:
    rng = np.random.default_rng(4)
    before = rng.normal([2.0, 1.0], 0.2, size=(200, 2))
    after = before - 0.3 + rng.normal(scale=0.1, size=(200, 2))
    plain = stats.change_of(before, after, lambda mean: mean.mean(axis=-1))
    expected = stats.paired_difference(before.mean(axis=1), after.mean(axis=1))
    assert vars(plain) == pytest.approx(vars(expected))
    found = stats.change_of(before, after, lambda mean: np.exp(mean).mean(axis=-1))
    ends = np.exp([before.mean(axis=0), after.mean(axis=0)])
    error = 1.96 * np.std((ends[1] * after - ends[0] * before).mean(axis=1), ddof=1) / np.sqrt(200)
    assert found.value == pytest.approx((ends[1] - ends[0]).mean())
    assert (found.low, found.high) == pytest.approx((found.value - error, found.value + error), abs=0.1 * error)


def test_the_interval_of_a_count_holds_the_change() -> None:
    """All heads stand just above the threshold at first: redraws take some of that count away, and add to none."""
    rng = np.random.default_rng(5)
    before, after = (shift + rng.normal(scale=0.05, size=(8, 40)) for shift in (0.0, 0.3))
    before += 0.101 - before.mean(axis=0)
    found = stats.change_of(before, after, lambda score: (score > 0.1).sum(axis=-1))
    naive = (after.mean(axis=0) > 0.1).sum() - (before.mean(axis=0) > 0.1).sum()
    assert found.value == naive == 0 and found.low == 0 and found.high > 10
    of_one, of_two = (stats.change_of(before[:n], after[:n], lambda score: score.sum(axis=-1)) for n in (1, 2))
    assert np.isnan(of_one.low) and np.isfinite(of_two.low)


def test_samples_of_a_cluster_count_as_one() -> None:
    value_s, cluster_s = np.repeat([1.0, 2.0, 4.0], 50), np.repeat(["a", "b", "c"], 50)
    found, of_three = stats.mean_over_samples(value_s, cluster_s), stats.mean_over_samples([1.0, 2.0, 4.0])
    assert found == of_three and found.n == 3
    assert np.isnan(stats.mean_over_samples([1.0]).low) and np.isfinite(stats.mean_over_samples([1.0, 2.0]).low)
