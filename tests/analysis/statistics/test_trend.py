"""The belief with samples, what the rule of the verdict may risk, and what it makes of a rise at the end.

In: series drawn here. tools/bench_verdict.py shows what the rule comes to.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import special, stats

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
def test_a_belief_with_samples_is_generalised_least_squares(columns: int) -> None:
    """Against the textbook's formulas, one shape and size of the noise after the other: the estimate, its error by what
    the samples and the common noise do to it, and the likelihood with the design taken out (REML)."""
    rng, tokens_w, margin, count = np.random.default_rng(0), np.array([1.0, 2, 3, 4, 6, 7, 8]), 0.5, 12
    design_wp = np.stack([tokens_w**power for power in range(columns)], axis=1)
    contrast_p, noise = np.eye(columns)[-1], trend.shapes(tokens_w)
    own_ks = rng.normal(size=(7, count))
    samples, value_w = trend.samples_of(own_ks[None]), own_ks.mean(axis=1) + rng.normal(size=7)
    assert samples is not None
    own_ww = samples.covariance_rkk[0]
    rest_ww = np.eye(7) - design_wp @ np.linalg.pinv(design_wp)
    white = np.trace(rest_ww @ own_ww) / (7 - columns)
    log_weights, centres, variances, dofs = [], [], [], []
    for (shape_ww, prior), size in itertools.product(
        zip(noise.covariance_qww, noise.prior_q, strict=True), trend.SIZES * margin
    ):
        common_ww = size**2 * shape_ww
        inverse_ww = np.linalg.inv(common_ww + white * np.eye(7))
        of_beta_pp = np.linalg.inv(design_wp.T @ inverse_ww @ design_wp)
        weigh_w = contrast_p @ of_beta_pp @ design_wp.T @ inverse_ww
        left_w = value_w - design_wp @ of_beta_pp @ design_wp.T @ inverse_ww @ value_w
        own = weigh_w @ own_ww @ weigh_w
        own += max(white * weigh_w @ weigh_w - own, 0) * trend.FEW_SAMPLES / (trend.FEW_SAMPLES + count)
        variance = own + weigh_w @ common_ww @ weigh_w
        log_weight = np.linalg.slogdet(inverse_ww)[1] + np.linalg.slogdet(of_beta_pp)[1] - left_w @ inverse_ww @ left_w
        log_prior = np.log(size) + stats.t.logpdf(size / margin / trend.COMMON, trend.COMMON_DOF)
        log_weights.append(log_weight / 2 + log_prior)
        centres.append(weigh_w @ value_w)
        variances.append(variance)
        dofs.append((count - 1) * (variance / own) ** 2)
    weights = special.softmax(log_weights)
    found = trend.believe(design_wp, contrast_p, value_w[None], noise, 0.0, samples, margin)
    assert found.value_r[0] == pytest.approx(weights @ centres)
    assert found.scale_r[0] == pytest.approx(np.sqrt(weights @ variances))
    for bound in (-0.3, 0.0, 0.3):
        chance = weights @ stats.t.sf((bound - np.array(centres)) / np.sqrt(variances), dofs)
        assert found.above(bound)[0] == pytest.approx(chance)


@pytest.mark.parametrize("sampled", [False, True])
def test_many_runs_are_looked_at_as_each_alone(sampled: bool) -> None:
    """Some agree that they are flat, so that two doublings count, and some do not."""
    rng, tokens_k = np.random.default_rng(1), np.arange(1.0, 11)
    own_rks = rng.normal(size=(30, 10, 20))
    value_rk = own_rks.mean(axis=2) + rng.uniform(-2, 6, (30, 1)) * np.log(tokens_k)
    samples = trend.samples_of(own_rks) if sampled else None
    found = trend.interim(tokens_k, value_rk, 1.0, samples)
    windows = set()
    for r in range(30):
        own = trend.samples_of(own_rks[r : r + 1]) if sampled else None
        alone = trend.interim(tokens_k, value_rk[r : r + 1], 1.0, own)
        assert alone.chance_r[0] == pytest.approx(found.chance_r[r])
        assert alone.belief.above(1.0)[0] == pytest.approx(alone.chance_r[0])
        assert (alone.under_r[0], alone.over_r[0]) == (found.under_r[r], found.over_r[r])
        windows.add(alone.part.start)
    assert len(windows) == 2
