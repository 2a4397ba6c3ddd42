"""What the rule of the verdict may risk, and what it makes of a rise at the end; tools/bench_verdict.py shows what it comes to."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lccp.analysis.statistics import trend


@pytest.mark.parametrize(
    ("spending", "checkpoints", "spent"),
    [(trend.EARLY, 4, 0.0), (trend.EARLY, 5, 0.031), (trend.EARLY, 6, 0.0324), (trend.EARLY, 60, 0.0512),
     (trend.LATE, 5, 0.015), (trend.LATE, 6, 0.0181), (trend.LATE, 60, 0.0588)],
)  # fmt: skip
def test_risk_of_all_looks(spending: trend.Spending, checkpoints: int, spent: float) -> None:
    tokens_k = np.arange(1, checkpoints + 1) * 1e9
    looks = [trend.risk(tokens_k[:count], spending) for count in range(1, checkpoints + 1)]
    assert sum(looks) == pytest.approx(spent, abs=5e-5)


@pytest.mark.parametrize("spending", [trend.EARLY, trend.LATE])
def test_later_looks_risk_less(spending: trend.Spending) -> None:
    """Each doubling of the tokens less than the one before, however many checkpoints are in it."""
    tokens_k = np.array([1, 2, 3, 4, 5, 10, 20, 40]) * 1e9
    looks = [trend.risk(tokens_k[:count], spending) for count in range(5, 9)]
    assert all(later < earlier for earlier, later in zip(looks, looks[1:], strict=False))


def test_without_samples_less_is_risked_at_the_first_look() -> None:
    tokens_k, value_rk = np.arange(1.0, 6), np.zeros((1, 5))
    samples = trend.Samples(np.eye(5)[None], 50)
    assert trend.interim(tokens_k, value_rk, 1.0).risk == trend.LATE.first
    assert trend.interim(tokens_k, value_rk, 1.0, samples=samples).risk == trend.EARLY.first


def test_two_doublings_that_end_in_a_rise_are_not_saturated() -> None:
    """The paper's checkpoints, flat but for the last, which rises by three margins: two doublings together hide it."""
    tokens_k, samples = np.array([20.0, 50, 100, 150, 200]) * 1e9, trend.Samples(np.eye(5)[None], 50)
    for rise, saturated in ((0.0, True), (2.0, False), (3.0, False)):
        value_rk = np.array([[0.0, 0, 0, 0, rise]])
        found = trend.interim(tokens_k, value_rk, 1.0, samples=samples)
        both = trend.gain_belief(tokens_k, value_rk, 2, samples=samples).above(1.0)
        assert both[0] < trend.EARLY.first, rise  # two doublings alone would say saturated
        assert found.under_r[0] == saturated, rise


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_small_matrices_are_inverted_as_lapack_does(columns: int) -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 50, columns, columns + 2))
    matrix = root @ root.swapaxes(-1, -2)
    inverse, log_determinant = trend._inverted(matrix)
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(log_determinant, np.linalg.slogdet(matrix)[1], atol=1e-9)
