"""How much a series of checkpoints still gains per +25 % tokens, and how surely that is under a margin.

In: tokens of the LCCP and values of the checkpoints, of one run or of many at once. Out: a Belief (a confidence
distribution) of any linear contrast, and decisions made from it.
Legend: r runs, k checkpoints, w those of a window, p columns of a design, q values of the autocorrelation, s samples
(clusters), j bootstrap draws.

The rule. A window is the last doubling of the LCCP's tokens, or the last two, at least MIN_WINDOW checkpoints. In it
y = b0 + b1 ln N is fitted by generalised least squares under AR(1) noise, whose autocorrelation is not known and hardly
to be learnt from a few checkpoints: it is integrated out, with a flat prior from 0.2 to 0.9. The gain per +25 % tokens
is b1 ln 1.25 for a signal that should rise, and its belief a mixture of Student's t. The fixed samples add to it: their
clusters are drawn anew, the same ones at all checkpoints.
`saturated` is said if one of the two windows gives a gain of at least the margin a chance under
LEVEL / sqrt(checkpoints in the last doubling), the last doubling's own estimate is under the margin too, and the same
held at the checkpoint before: somebody may act on the first time it is said, and the more looks there are within a
doubling, the less each of them may risk. tools/bench_verdict.py shows what this comes to over a whole run.
`improving` is said if the last doubling gives a gain of at most the margin a chance under IMPROVING_LEVEL: each look
stands for itself, as nothing ends with it, and a longer window would remember too much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg, optimize, stats

from megatron_lccp.analysis.statistics.stats import sample_draws

LN_QUARTER = np.log(1.25)
DOUBLINGS = (1, 2)
MIN_WINDOW = 4
FIRST_LOOK = 5
"""Checkpoints (after the start of the LCCP) with which something may be decided, if the next one confirms it."""
LEVEL = 0.02
IMPROVING_LEVEL = 0.05
ALERT_LEVEL = 0.02
ALERT_WINDOW = 10
AUTOCORRELATIONS = np.linspace(0.2, 0.9, 8)


@dataclass(frozen=True)
class Belief:
    """What is believed of a number: a mixture over autocorrelations of Student's t, and over draws of samples."""

    weight_qr: np.ndarray
    centre_qrj: np.ndarray
    scale_qr: np.ndarray
    dof: int

    @property
    def value_r(self) -> np.ndarray:
        return (self.weight_qr * self.centre_qrj.mean(axis=2)).sum(axis=0)

    def above(self, bound: float) -> np.ndarray:
        """Chance of at least `bound`, one per run."""
        return self._mix(stats.t.sf, bound)

    def below(self, bound: float) -> np.ndarray:
        """Chance of at most `bound`, one per run."""
        return self._mix(stats.t.cdf, bound)

    def quantile(self, share: float) -> float:
        """Of the first run: the number that a share of the belief lies under."""
        centre, scale = self.centre_qrj[:, 0], self.scale_qr[:, 0].max()
        reach = scale * abs(stats.t.ppf(min(share, 1 - share) / 2, self.dof)) + np.finfo(float).tiny
        low, high = centre.min() - 2 * reach, centre.max() + 2 * reach
        return float(optimize.brentq(lambda bound: self.below(bound)[0] - share, low, high, xtol=1e-9 * reach))

    def _mix(self, chance, bound: float) -> np.ndarray:
        each_qrj = chance((bound - self.centre_qrj) / self.scale_qr[:, :, None], self.dof)
        return (self.weight_qr * each_qrj.mean(axis=2)).sum(axis=0)


def believe(
    design_wp: np.ndarray,
    contrast_p: np.ndarray,
    value_rw: np.ndarray,
    tokens_w: np.ndarray,
    noise_floor: float = 0.0,
    sample_ws: np.ndarray | None = None,
) -> Belief:
    """The belief of contrast . b, where value = design . b + AR(1) noise.

    The autocorrelation is between checkpoints a median distance in tokens apart. noise_floor: standard deviation that
    the noise has at least (a share of 20 samples knows no smaller steps than 1/20). sample_ws: values of independent
    samples, whose mean is the one run's `value_rw`; they are drawn anew as a whole. One of them says nothing.
    """
    points, columns = design_wp.shape
    dof = points - columns
    assert dof > 0 and (sample_ws is None or len(value_rw) == 1)
    smallest = max(noise_floor, 1e-9 * (1e-9 + np.abs(value_rw).max()))
    draw_js = sample_draws(sample_ws.shape[1]) if sample_ws is not None and sample_ws.shape[1] > 1 else None
    log_weight, centre, scale = [], [], []
    for autocorrelation in AUTOCORRELATIONS:
        lower = linalg.cholesky(correlation_of(tokens_w, autocorrelation), lower=True)
        white_wp = linalg.solve_triangular(lower, design_wp, lower=True)
        white_wr = linalg.solve_triangular(lower, value_rw.T, lower=True)
        inverse_pp = linalg.inv(white_wp.T @ white_wp)
        beta_pr = inverse_pp @ (white_wp.T @ white_wr)
        variance_r = ((white_wr - white_wp @ beta_pr) ** 2).sum(axis=0) / dof
        variance_r = np.maximum(variance_r, smallest**2)
        log_weight.append(
            -np.log(np.diag(lower)).sum() + np.linalg.slogdet(inverse_pp)[1] / 2 - dof / 2 * np.log(variance_r)
        )
        scale.append(np.sqrt(variance_r * (contrast_p @ inverse_pp @ contrast_p)))
        centre_rj = (contrast_p @ beta_pr)[:, None]
        if sample_ws is not None and draw_js is not None:
            white_ws = linalg.solve_triangular(lower, sample_ws, lower=True)
            weight_w = contrast_p @ inverse_pp @ white_wp.T
            centre_rj = centre_rj + draw_js @ _apart(weight_w, white_wp, white_ws)
        centre.append(centre_rj)
    weight_qr = np.exp(np.array(log_weight) - np.max(log_weight, axis=0))
    return Belief(weight_qr / weight_qr.sum(axis=0), np.array(centre), np.array(scale), dof)


def correlation_of(tokens_w: np.ndarray, autocorrelation: float) -> np.ndarray:
    """Correlations [w, w] of AR(1) noise at checkpoints; `autocorrelation` is that over their median distance."""
    return autocorrelation ** (np.abs(tokens_w[:, None] - tokens_w) / np.median(np.diff(tokens_w)))


def _apart(weight_w: np.ndarray, design_wp: np.ndarray, value_ws: np.ndarray) -> np.ndarray:
    """The contrast in each sample, drawn together by as much as the samples' own noise at each checkpoint spreads it:
    the mean over samples has that noise too, as noise of checkpoints, and it must count once."""
    contrast_s = weight_w @ value_ws
    residual_ws = value_ws - design_wp @ linalg.lstsq(design_wp, value_ws)[0]
    residual_ws -= residual_ws.mean(axis=1, keepdims=True)
    points, columns = design_wp.shape
    of_noise = (residual_ws**2).sum() / ((points - columns) * (len(contrast_s) - 1)) * (weight_w @ weight_w)
    spread = contrast_s.var(ddof=1)
    kept = max(0.0, 1 - of_noise / spread) if spread > 0 else 0.0
    return np.sqrt(kept) * contrast_s


def window(tokens_k: np.ndarray, doublings: int = 1) -> slice:
    """The last checkpoints that the gain is taken from; tokens of the LCCP, ascending."""
    first = int(np.searchsorted(tokens_k, tokens_k[-1] / 2**doublings * (1 - 1e-9)))
    return slice(max(0, min(first, len(tokens_k) - MIN_WINDOW)), len(tokens_k))


def gain_belief(
    tokens_k: np.ndarray,
    gain_rk: np.ndarray,
    doublings: int = 1,
    noise_floor: float = 0.0,
    sample_ks: np.ndarray | None = None,
    level_only: bool = False,
) -> Belief:
    """The gain per +25 % tokens at the last of these checkpoints; values that rise are gains.

    level_only: the values themselves are what happened over +25 % tokens, and their mean is wanted.
    """
    part = window(tokens_k, doublings)
    log_w = np.log(tokens_k[part])
    design = [np.ones(len(log_w))] if level_only else [np.ones(len(log_w)), log_w - log_w.mean()]
    contrast = np.array([1.0]) if level_only else np.array([0.0, LN_QUARTER])
    samples = None if sample_ks is None else sample_ks[part]
    return believe(np.stack(design, axis=1), contrast, gain_rk[:, part], tokens_k[part], noise_floor, samples)


def risk(tokens_k: np.ndarray) -> float:
    """The chance of being wrong that a look at the last of these checkpoints may take."""
    part = window(tokens_k)
    return LEVEL / np.sqrt(part.stop - part.start)


@dataclass(frozen=True)
class Interim:
    """What an interim analysis says of each run: gain under the margin (the one before has to confirm it), or over it."""

    under_r: np.ndarray
    over_r: np.ndarray
    belief: Belief
    """Of the window that speaks most clearly of saturation, for the first run."""
    part: slice


def interim(tokens_k: np.ndarray, gain_rk: np.ndarray, margin: float, **settings) -> Interim:
    """An interim analysis of the checkpoints so far, of at least FIRST_LOOK; `settings` as in `gain_belief`."""
    beliefs = [gain_belief(tokens_k, gain_rk, doublings, **settings) for doublings in DOUBLINGS]
    over_rd = np.stack([belief.above(margin) for belief in beliefs], axis=1)
    under_r = (over_rd.min(axis=1) < risk(tokens_k)) & (beliefs[0].value_r < margin)
    over_r = beliefs[0].below(margin) < IMPROVING_LEVEL
    best = int(over_rd[0].argmin()) if under_r[0] else 0
    return Interim(under_r, over_r, beliefs[best], window(tokens_k, DOUBLINGS[best]))


def decide(now: Interim, before: Interim | None) -> tuple[np.ndarray, np.ndarray]:
    """(saturated, improving) of each run, from a look and the one a checkpoint earlier; neither is undecided."""
    return now.under_r & (before is not None and before.under_r), now.over_r


def falls(tokens_k: np.ndarray, gain_rk: np.ndarray, margin: float, noise_floor: float = 0.0) -> np.ndarray:
    """Which checkpoints of which runs [r, k] fell back: under the level of those before by more than the margin, and
    by more than noise explains at ALERT_LEVEL for all checkpoints together.

    The level is that of a line through up to ALERT_WINDOW checkpoints before, held at its end, so that a slower gain is
    no fall. The first that can fall is the one after MIN_WINDOW + 1 checkpoints.
    """
    found_rk = np.zeros(gain_rk.shape, dtype=bool)
    looks = max(1, len(tokens_k) - MIN_WINDOW - 1)
    for k in range(MIN_WINDOW + 1, len(tokens_k)):
        part = slice(max(0, k - ALERT_WINDOW), k + 1)
        log_w = np.log(tokens_k[part])
        log_w[-1] = log_w[-2]
        last_w = np.arange(len(log_w)) == len(log_w) - 1
        design = np.stack([np.ones(len(log_w)), log_w - log_w.mean(), last_w], axis=1)
        change = believe(design, np.array([0.0, 0.0, 1.0]), gain_rk[:, part], tokens_k[part], noise_floor)
        found_rk[:, k] = (change.above(0.0) < ALERT_LEVEL / looks) & (change.value_r < -margin)
    return found_rk
