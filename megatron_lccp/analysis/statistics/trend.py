"""How much a series of checkpoints still gains per +25 % tokens, and how surely that is under a margin.

In: tokens of the LCCP and values of the checkpoints, of one run or of many at once, and what their samples say. Out: a
Belief (a confidence distribution) of any linear contrast, and decisions made from it.
Legend: r runs, k checkpoints, w those of a window, p columns of a design, q shapes of the noise, t sizes of it,
s samples (clusters), f directions in which the design leaves the values free.

The belief. A window is the last doubling of the LCCP's tokens, or the last two. In it y = b0 + b1 ln N is fitted by
generalised least squares; the gain per +25 % tokens is b1 ln 1.25 for a signal that should rise. The noise has a shape
(`shapes`: white, AR(1) of any memory, a random walk, a random walk under white noise; by tokens or by number of
checkpoints), which is not known and hardly to be learnt from a few checkpoints: it is integrated out.
Where only means are known, so is the size of the noise, which gives Student's t. Where there are samples, the same ones
at all checkpoints, their own changes teach what the samples contribute, and what is left is common noise, which moves a
checkpoint as a whole. Few checkpoints cannot teach its size, so that has a prior: about COMMON margins, heavy-tailed.

The decision. A run is asked after every checkpoint, and somebody may act on the first time `saturated` is said. So the
risk is spent over all looks (`risk`). With samples most of it belongs to the first, with FIRST_LOOK checkpoints, which is
the only one that runs with few checkpoints have; the rest later, the less the further the run is. Without samples five
checkpoints hardly know their own noise, and more is left for later. `saturated` is said if one of the two windows gives a
gain of at least the margin a chance under the look's risk, and the last doubling alone gives it one under AGREES: two
doublings that are flat together may end in a rise. It stays said as long as that chance is under HOLD.
`improving` is said if the last doubling gives a gain of at most the margin a chance under IMPROVING_LEVEL: each look
stands for itself, as nothing ends with it, and a longer window would remember too much.
tools/bench_verdict.py shows what all this comes to over whole runs.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import linalg, optimize, special, stats

LN_QUARTER = np.log(1.25)
MIN_WINDOW = 4
"""Checkpoints in a window where the means alone are known ..."""
MIN_WINDOW_SAMPLED = 3
"""... and where samples say how much of the noise is theirs."""
FIRST_LOOK = 5
"""Checkpoints (after the start of the LCCP) with which something may be decided."""
LATER_DECAY = 1.5
LOOKS_PER_DOUBLING = 3
"""As many looks within a doubling are worth one another: more of them use nearly the same checkpoints."""
AGREES = 0.1
"""Chance of a gain of the margin by the last doubling alone, under which two doublings may speak of saturation."""
HOLD = 0.1
IMPROVING_LEVEL = 0.05
ALERT_LEVEL = 0.02
ALERT_WINDOW = 10
WHITE = 1.0
AUTOCORRELATIONS = {0.5: 2.0, 0.7: 2.0, 0.9: 3.0, 0.95: 2.0}
WALKS = {0.0: 20.0, 1.0: 4.0, 3.0: 4.0}
"""How likely white noise is beforehand, AR(1) noise by its autocorrelation, and a random walk by the white noise on it,
in steps of the walk. A walk weighs the most: taken for something else, it does the most harm."""
FEW_SAMPLES = 10
"""With so many samples half of what they agree by chance, beyond white noise, is taken off."""
COMMON = 0.25
COMMON_DOF = 2
"""Prior of the size of common noise, in margins: the upper half of Student's t with these degrees of freedom, COMMON
wide. Its median is 0.2 margins, 1 in 5 is over half a margin, 1 in 17 over a margin. Its shapes are equally likely."""
SIZES = 2.0 ** np.arange(-3, 7)
"""Of common noise, in margins, that are tried."""
NEEDED = (6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
"""Numbers of checkpoints in a doubling that are tried in saying how many would decide."""
MOST_SAMPLES = 100_000
RUNS_AT_ONCE = 256
"""That are worked on together, for the sake of memory."""
NEGLIGIBLE = 1e-9
"""Weight under which a shape and size of noise is left out of a chance, for the sake of time."""


@dataclass(frozen=True)
class Spending:
    """How the chance of being wrong is spent over the looks at a run."""

    first: float
    """At the look with FIRST_LOOK checkpoints."""
    later: float
    """Per doubling of the tokens right after it; LATER_DECAY says how that shrinks."""


EARLY = Spending(0.031, 0.006)
"""With samples, and for falls."""
LATE = Spending(0.015, 0.013)
"""Of gains where the means alone are known."""


@dataclass(frozen=True)
class Shapes:
    """Covariances that the noise of a window may have, at size 1."""

    covariance_qww: np.ndarray
    spread_qw: np.ndarray
    """Their eigenvalues ..."""
    axes_qww: np.ndarray
    """... and eigenvectors, in columns."""
    prior_q: np.ndarray
    """How likely each is beforehand."""

    def __len__(self) -> int:
        return len(self.covariance_qww)


@dataclass(frozen=True)
class Samples:
    """What the samples of each run say of the noise of their mean."""

    covariance_rkk: np.ndarray
    """Of the mean over samples, between checkpoints; samples drawn anew, the same ones at all checkpoints."""
    count: int

    def at(self, index) -> Samples:
        """The same of some of the checkpoints."""
        return Samples(self.covariance_rkk[:, index][:, :, index], self.count)


def samples_of(sample_rks: np.ndarray) -> Samples | None:
    """Of values [runs, checkpoints, samples]; None where there are too few samples to say anything."""
    count = sample_rks.shape[2]
    if count < 2:
        return None
    apart_rks = sample_rks - sample_rks.mean(axis=2, keepdims=True)
    return Samples(apart_rks @ apart_rks.transpose(0, 2, 1) / ((count - 1) * count), count)


@dataclass(frozen=True)
class Belief:
    """What is believed of a number: a mixture of Student's t over shapes (and sizes) of the noise."""

    weight_qr: np.ndarray
    centre_qr: np.ndarray
    scale_qr: np.ndarray
    dof_qr: np.ndarray
    common_r: np.ndarray | None = None
    """Standard deviation of the common noise around its mean over the window, in the unit of the values; None: there are
    no samples to tell it from."""
    of_samples_r: np.ndarray | None = None
    """The part of the squared standard error that more samples would reduce; None: there are none."""

    @property
    def value_r(self) -> np.ndarray:
        return (self.weight_qr * self.centre_qr).sum(axis=0)

    @property
    def scale_r(self) -> np.ndarray:
        """Standard error, without the part that degrees of freedom add."""
        return np.sqrt((self.weight_qr * self.scale_qr**2).sum(axis=0))

    def above(self, bound: float) -> np.ndarray:
        """Chance of at least `bound`, one per run."""
        return self._mix((self.centre_qr - bound) / self.scale_qr)

    def below(self, bound: float) -> np.ndarray:
        """Chance of at most `bound`, one per run."""
        return self._mix((bound - self.centre_qr) / self.scale_qr)

    def quantile(self, share: float) -> float:
        """Of the first run: the number that a share of the belief lies under."""
        centre, scale = self.centre_qr[:, 0], self.scale_qr[:, 0].max()
        reach = scale * abs(stats.t.ppf(min(share, 1 - share) / 2, self.dof_qr[:, 0].min())) + np.finfo(float).tiny
        low, high = centre.min() - 2 * reach, centre.max() + 2 * reach
        return float(optimize.brentq(lambda bound: self.below(bound)[0] - share, low, high, xtol=1e-9 * reach))

    def _mix(self, score_qr: np.ndarray) -> np.ndarray:
        chance_qr = np.zeros_like(score_qr)
        special.stdtr(self.dof_qr, score_qr, out=chance_qr, where=self.weight_qr > NEGLIGIBLE)
        return (self.weight_qr * chance_qr).sum(axis=0)


def shapes(tokens_w: np.ndarray, walks: bool = True, number_w: np.ndarray | None = None) -> Shapes:
    """Covariances [q, w, w] that noise of size 1 may have: of AR(1) noise, its standard deviation is 1; of a random walk,
    a step. A step is the median distance of the checkpoints; where they are uneven, from one checkpoint to the next, too.

    walks: random walks, too, which begin anywhere, so that only contrasts without the level make sense. number_w: which
    checkpoint of the run each one is; None: one after the other.
    """
    number_w = np.arange(len(tokens_w)) if number_w is None else number_w - number_w[0]
    return _shapes(tuple(map(float, tokens_w)), tuple(map(float, number_w)), walks)


@lru_cache(maxsize=512)
def _shapes(tokens_w: tuple[float, ...], number_w: tuple[float, ...], walks: bool) -> Shapes:
    clocks = [(np.array(tokens_w) - tokens_w[0]) / np.median(np.diff(tokens_w)), np.array(number_w)]
    if np.allclose(clocks[0], clocks[1], atol=0.05 * len(tokens_w)):
        clocks = clocks[:1]
    of_clocks = [shape_ww for clock_w in clocks for shape_ww in _of_clock(clock_w, walks)]
    prior = [*AUTOCORRELATIONS.values(), *(WALKS.values() if walks else ())] * len(clocks)
    return shapes_of([np.eye(len(tokens_w)), *of_clocks], [WHITE * len(clocks), *prior])


def _of_clock(clock_w: np.ndarray, walks: bool) -> Iterator[np.ndarray]:
    yield from (ar_shape(clock_w, each) for each in AUTOCORRELATIONS)
    if walks:
        walk_ww = 1 + np.minimum(clock_w[:, None], clock_w)
        yield from (walk_ww + white**2 * np.eye(len(clock_w)) for white in WALKS)


def shapes_of(covariances: Iterable[np.ndarray], prior: Sequence[float] | None = None) -> Shapes:
    """Of covariances [w, w], each positive definite; `prior` None: equally likely."""
    covariance_qww = np.array(list(covariances))
    prior_q = np.ones(len(covariance_qww)) if prior is None else np.array(prior)
    spread_qw, axes_qww = np.linalg.eigh(covariance_qww)
    return Shapes(covariance_qww, np.maximum(spread_qw, 1e-12), axes_qww, prior_q / prior_q.sum())


def ar_shape(clock_w: np.ndarray, autocorrelation: float) -> np.ndarray:
    """Correlations [w, w] of AR(1) noise, `autocorrelation` being that over 1 of the clock."""
    return autocorrelation ** np.abs(clock_w[:, None] - clock_w)


def believe(
    design_wp: np.ndarray,
    contrast_p: np.ndarray,
    value_rw: np.ndarray,
    noise: Shapes,
    noise_floor: float = 0.0,
    samples: Samples | None = None,
    margin: float = 1.0,
) -> Belief:
    """The belief of contrast . b, where value = design . b + noise of one of the shapes `noise`, of any size.

    noise_floor: standard deviation that the noise has at least (a share of 20 samples knows no smaller steps than
    1/20). samples: of which `value_rw` is the mean. margin: in which the prior of common noise beside theirs is given.
    """
    beliefs = []
    for first in range(0, len(value_rw), RUNS_AT_ONCE):
        runs = slice(first, first + RUNS_AT_ONCE)
        part_rw = value_rw[runs]
        floor = max(noise_floor, 1e-9 * (1e-9 + np.abs(part_rw).max()))
        if samples is None:
            beliefs.append(_believe_means(design_wp, contrast_p, part_rw, noise, floor))
        else:
            of_runs = Samples(samples.covariance_rkk[runs], samples.count)
            beliefs.append(_believe_samples(design_wp, contrast_p, part_rw, noise, floor, of_runs, margin))
    return beliefs[0] if len(beliefs) == 1 else _joined(beliefs)


def _joined(beliefs: Sequence[Belief]) -> Belief:
    """One belief of all runs."""
    columns: Iterable[Any] = zip(*(vars(belief).values() for belief in beliefs), strict=True)
    joined: list[Any] = [None if parts[0] is None else np.concatenate(parts, axis=-1) for parts in columns]
    return Belief(*joined)


def _believe_means(design_wp, contrast_p, value_rw, noise: Shapes, floor: float) -> Belief:
    """Where the means alone are known: least squares of whitened values, for each shape at once."""
    points, columns = design_wp.shape
    dof = points - columns
    assert dof > 0
    white_qwv = noise.axes_qww.transpose(0, 2, 1) / np.sqrt(noise.spread_qw)[:, :, None]
    white_qwp, white_qwr = white_qwv @ design_wp, white_qwv @ value_rw.T
    inverse_qpp = np.linalg.inv(white_qwp.transpose(0, 2, 1) @ white_qwp)
    moment_qpr = white_qwp.transpose(0, 2, 1) @ white_qwr
    beta_qpr = inverse_qpp @ moment_qpr
    rest_qr = np.square(white_qwr - white_qwp @ beta_qpr).sum(axis=1)
    variance_qr = np.maximum(rest_qr / dof, floor**2)
    log_prior_q = (
        np.log(noise.prior_q) - np.log(noise.spread_qw).sum(axis=1) / 2 + np.linalg.slogdet(inverse_qpp)[1] / 2
    )
    weight_qr = special.softmax(log_prior_q[:, None] - dof / 2 * np.log(variance_qr), axis=0)
    scale_qr = np.sqrt(variance_qr * (contrast_p @ inverse_qpp @ contrast_p)[:, None])
    return Belief(weight_qr, contrast_p @ beta_qpr, scale_qr, np.full_like(weight_qr, dof))


def _believe_samples(
    design_wp, contrast_p, value_rw, noise: Shapes, floor: float, samples: Samples, margin: float
) -> Belief:
    """The same where the samples say what they contribute: noise = size x shape + the noise of their mean.

    Least squares weighs the checkpoints as if the latter were white; how much it is in the contrast, the samples'
    own contrasts say, whatever they have in common between checkpoints and however their trends differ. Of few samples
    these may agree by chance; they count as no less than white noise would give.

    Generalised least squares, and the likelihood of the noise with the design taken out (REML), come from what is free of
    the design, along the directions f in which a shape has no correlations: each shifts the plain least squares by what
    its noise shares with it.
    """
    points, columns = design_wp.shape
    assert points > columns
    free_wf = linalg.qr(design_wp)[0][:, columns:]
    left_rff = free_wf.T @ samples.covariance_rkk @ free_wf
    white_r = np.trace(left_rff, axis1=1, axis2=2) / (points - columns)
    white_r1 = np.maximum(white_r, max(floor, 1e-6 * margin) ** 2)[:, None]
    plain_w = contrast_p @ linalg.pinv(design_wp)
    spread_qf, axes_qff = np.linalg.eigh(free_wf.T @ noise.covariance_qww @ free_wf)
    turned_qwf = free_wf @ axes_qff
    common_qw = noise.covariance_qww @ plain_w
    shared_qf = (common_qw[:, None] @ turned_qwf)[:, 0]
    left_qrf, own_rw = value_rw @ turned_qwf, samples.covariance_rkk @ plain_w
    size_t = SIZES * margin
    prior_t = np.log(SIZES) + stats.t.logpdf(SIZES / COMMON, COMMON_DOF)
    log_weight_qrt = np.tile(prior_t, (len(noise), len(value_rw), 1))
    shift_qrft = np.empty((len(noise), len(value_rw), points - columns, len(size_t)))
    for f in range(points - columns):
        precision_qrt = 1 / (size_t**2 * spread_qf[:, f, None, None] + white_r1)
        log_weight_qrt += (np.log(precision_qrt) - precision_qrt * left_qrf[:, :, f, None] ** 2) / 2
        shift_qrft[:, :, f] = size_t**2 * shared_qf[:, f, None, None] * precision_qrt
    centre_qrt = (value_rw @ plain_w)[:, None] - (left_qrf[:, :, None] @ shift_qrft)[:, :, 0]
    turned_own_qrff = turned_qwf.transpose(0, 2, 1)[:, None] @ samples.covariance_rkk @ turned_qwf[:, None]
    own_qrt = (own_rw @ plain_w)[:, None] - 2 * ((own_rw @ turned_qwf)[:, :, None] @ shift_qrft)[:, :, 0]
    own_qrt += ((turned_own_qrff @ shift_qrft) * shift_qrft).sum(axis=2)
    square_qrft = shift_qrft**2
    least_qrt = white_r1 * (plain_w @ plain_w + square_qrft.sum(axis=2))
    own_qrt += np.maximum(least_qrt - own_qrt, 0) * FEW_SAMPLES / (FEW_SAMPLES + samples.count)
    shared_qrt = (
        2 * (shared_qf[:, None, None] @ shift_qrft)[:, :, 0] - (spread_qf[:, None, None] @ square_qrft)[:, :, 0]
    )
    common_qrt = size_t**2 * ((common_qw @ plain_w)[:, None, None] - shared_qrt)
    # Shapes and sizes are one axis of the mixture.
    log_weight_qr, centre_qr, variance_qr, own_qr = (
        each_qrt.transpose(0, 2, 1).reshape(-1, len(value_rw))
        for each_qrt in (log_weight_qrt, centre_qrt, own_qrt + common_qrt, own_qrt)
    )
    weight_qr = special.softmax(log_weight_qr, axis=0)
    dof_qr = (samples.count - 1) * (variance_qr / own_qr) ** 2
    around_q = (np.trace(noise.covariance_qww, axis1=1, axis2=2) - noise.covariance_qww.sum(axis=(1, 2)) / points) / (
        points - 1
    )
    common_r = np.exp((np.log(around_q)[:, None] / 2 + np.log(size_t)).ravel() @ weight_qr)
    return Belief(weight_qr, centre_qr, np.sqrt(variance_qr), dof_qr, common_r, (weight_qr * own_qr).sum(axis=0))


def window(tokens_k: np.ndarray, doublings: int = 1, least: int = MIN_WINDOW) -> slice:
    """The last checkpoints that the gain is taken from; tokens of the LCCP, ascending."""
    first = int(np.searchsorted(tokens_k, tokens_k[-1] / 2**doublings * (1 - 1e-9)))
    return slice(max(0, min(first, len(tokens_k) - least)), len(tokens_k))


def gain_belief(
    tokens_k: np.ndarray,
    gain_rk: np.ndarray,
    doublings: int = 1,
    noise_floor: float = 0.0,
    samples: Samples | None = None,
    level_only: bool = False,
    margin: float = 1.0,
) -> Belief:
    """The gain per +25 % tokens at the last of these checkpoints; values that rise are gains.

    level_only: the values themselves are what happened over +25 % tokens, and their mean is wanted.
    """
    part = _part(tokens_k, doublings, samples)
    log_w = np.log(tokens_k[part])
    design = [np.ones(len(log_w))] if level_only else [np.ones(len(log_w)), log_w - log_w.mean()]
    contrast = np.array([1.0]) if level_only else np.array([0.0, LN_QUARTER])
    noise, of_samples = shapes(tokens_k[part], walks=not level_only), None if samples is None else samples.at(part)
    return believe(np.stack(design, axis=1), contrast, gain_rk[:, part], noise, noise_floor, of_samples, margin)


def _part(tokens_k: np.ndarray, doublings: int, samples: Samples | None) -> slice:
    return window(tokens_k, doublings, MIN_WINDOW if samples is None else MIN_WINDOW_SAMPLED)


def risk(tokens_k: np.ndarray, spending: Spending) -> float:
    """The chance of being wrong that a look at the last of these checkpoints may take; over all looks at 60 even ones,
    5.1 % (EARLY) and 5.9 % (LATE), of which looks at nearly the same checkpoints share a part."""
    count = len(tokens_k)
    if count <= FIRST_LOOK:
        return spending.first if count == FIRST_LOOK else 0.0
    doublings = np.log2(tokens_k[-1] / tokens_k[FIRST_LOOK - 1])
    since = np.log2(tokens_k[-1] / tokens_k[-2])
    return float(spending.later * max(since, 1 / LOOKS_PER_DOUBLING) / (1 + doublings) ** LATER_DECAY)


@dataclass(frozen=True)
class Interim:
    """What an interim analysis says of each run: the chance that it still gains the margin, and what follows."""

    chance_r: np.ndarray
    """Of a gain of at least the margin, by the window that speaks most clearly of saturation."""
    under_r: np.ndarray
    """That chance is under what this look may risk."""
    over_r: np.ndarray
    """It gains more than the margin."""
    risk: float
    """What this look may risk."""
    belief: Belief
    """Of that window, for the first run."""
    part: slice


def interim(
    tokens_k: np.ndarray, gain_rk: np.ndarray, margin: float, samples: Samples | None = None, **settings
) -> Interim:
    """An interim analysis of the checkpoints so far, of at least FIRST_LOOK; `settings` as in `gain_belief`."""
    last = gain_belief(tokens_k, gain_rk, margin=margin, samples=samples, **settings)
    last_r = last.above(margin)
    chance_r, belief, doublings = last_r.copy(), last, 1
    agrees_r = np.flatnonzero(last_r < AGREES)
    if len(agrees_r):
        of_runs = None if samples is None else Samples(samples.covariance_rkk[agrees_r], samples.count)
        both = gain_belief(tokens_k, gain_rk[agrees_r], 2, margin=margin, samples=of_runs, **settings)
        chance_r[agrees_r] = np.minimum(last_r[agrees_r], both.above(margin))
        if chance_r[0] < last_r[0]:
            belief, doublings = both, 2
    allowed = risk(tokens_k, LATE if samples is None else EARLY)
    part = _part(tokens_k, doublings, samples)
    return Interim(chance_r, chance_r < allowed, last_r > 1 - IMPROVING_LEVEL, allowed, belief, part)


def follow(
    tokens_k: np.ndarray, gain_rk: np.ndarray, margin: float, samples: Samples | None = None, **settings
) -> tuple[np.ndarray, np.ndarray, Interim | None]:
    """(saturated, improving) [r, k] as said after every checkpoint, and the last look; None with too few checkpoints."""
    saturated_rk, improving_rk, now = np.zeros(gain_rk.shape, bool), np.zeros(gain_rk.shape, bool), None
    for count in range(FIRST_LOOK, len(tokens_k) + 1):
        so_far = None if samples is None else samples.at(slice(0, count))
        now = interim(tokens_k[:count], gain_rk[:, :count], margin, samples=so_far, **settings)
        saturated_rk[:, count - 1], improving_rk[:, count - 1] = decide(now, saturated_rk[:, count - 2])
    return saturated_rk, improving_rk, now


def decide(now: Interim, saturated_r: np.ndarray | bool) -> tuple[np.ndarray, np.ndarray]:
    """(saturated, improving) of each run, from a look and whether the one before said saturated; neither: undecided."""
    said_r = now.under_r | (saturated_r & (now.chance_r < HOLD))
    return said_r, now.over_r & ~said_r


def change_belief(
    tokens_k: np.ndarray,
    gain_rk: np.ndarray,
    reference: int,
    noise_floor: float = 0.0,
    samples: Samples | None = None,
    margin: float = 1.0,
) -> Belief:
    """The change from one checkpoint before the last doubling to where a line through the last doubling ends.

    The first of the checkpoints may be the start of the LCCP, at 0 tokens.
    """
    least = MIN_WINDOW if samples is None else MIN_WINDOW_SAMPLED
    index_w = np.array([reference, *range(len(tokens_k))[window(tokens_k, 1, least)]])
    assert reference < index_w[1]
    log_w = np.log(np.maximum(tokens_k[index_w], 1.0) / tokens_k[-1])
    log_w[0] = 0.0
    design = np.stack([np.ones(len(log_w)), log_w, np.arange(len(log_w)) == 0], axis=1)
    noise = shapes(tokens_k[index_w], number_w=index_w)
    of_samples = None if samples is None else samples.at(index_w)
    contrast = np.array([0.0, 0.0, -1.0])
    return believe(design, contrast, gain_rk[:, index_w], noise, noise_floor, of_samples, margin)


@dataclass(frozen=True)
class Fallen:
    """Which runs lost more than a margin and noise, and since when."""

    start_r: np.ndarray
    """Since the start of the LCCP."""
    best_r: np.ndarray
    """Since their best checkpoint before the last doubling."""
    best_at_r: np.ndarray
    """Which checkpoint that is."""
    risk: float
    """What either of the two may risk ..."""
    candidates: int
    """... which the checkpoints that might have been the best share."""


def fell(
    tokens_k: np.ndarray,
    gain_rk: np.ndarray,
    margin: float,
    noise_floor: float = 0.0,
    samples: Samples | None = None,
) -> Fallen | None:
    """Whether the runs fell for good; None with too few checkpoints. tokens_k: 0 is the start of the LCCP, if measured.

    A fall is more than a margin, at the last two checkpoints too, and noise explains it with a chance under half of
    what this look may risk; since the best, under that by the number of checkpoints that might have been the best.
    """
    runs, started = len(gain_rk), int(tokens_k[0] <= 0)
    least = MIN_WINDOW if samples is None else MIN_WINDOW_SAMPLED
    first, allowed = window(tokens_k, 1, least).start, risk(tokens_k[started:], EARLY) / 2
    if allowed == 0 or first < 1:
        return None
    fell_rk = np.zeros((runs, first), dtype=bool)
    best_at_r = gain_rk[:, :first].argmax(axis=1)
    for reference in np.unique([*best_at_r, 0]):
        of_r = np.flatnonzero((best_at_r == reference) | (reference == 0))
        part = None if samples is None else Samples(samples.covariance_rkk[of_r], samples.count)
        change = change_belief(tokens_k, gain_rk[of_r], int(reference), noise_floor, part, margin)
        level = allowed if reference == 0 and started else allowed / first
        lasts_r = (gain_rk[of_r, -2:] < gain_rk[of_r, reference, None] - margin).all(axis=1)
        fell_rk[of_r, reference] = (change.above(0.0) < level) & (change.value_r < -margin) & lasts_r
    start_r = fell_rk[:, 0] if started else np.zeros(runs, dtype=bool)
    return Fallen(start_r, fell_rk[np.arange(runs), best_at_r], best_at_r, allowed, first)


def reach(belief: Belief, level: float) -> float:
    """How far above its estimate the interval of the first run ends, at a level."""
    return belief.quantile(1 - level) - float(belief.value_r[0]) if level > 0 else np.inf


def needed_samples(
    tokens_w: np.ndarray,
    gain_rw: np.ndarray,
    samples: Samples,
    apart: float,
    level: float,
    margin: float = 1.0,
    noise_floor: float = 0.0,
    level_only: bool = False,
) -> int | None:
    """How many samples would bring the end of the first run's interval within `apart` of the estimate; None: no number up
    to MOST_SAMPLES would, for the noise of checkpoints alone is too much.

    The checkpoints of the window are believed anew, as they would be if the noise of the samples shrank and the rest of
    what they are off the line stayed. With it shrinks what nobody can know of few samples and of the noise beside theirs.
    """
    if level <= 0:
        return None
    log_w = np.log(tokens_w)
    design_wp = np.stack([np.ones(len(log_w)), log_w - log_w.mean()][: 2 - level_only], axis=1)
    line_w = design_wp @ (np.linalg.pinv(design_wp) @ gain_rw[0])
    left_w, own_ww = gain_rw[0] - line_w, samples.covariance_rkk[0]
    off = max(left_w @ left_w, np.finfo(float).tiny)
    own = min(off, np.trace(own_ww - design_wp @ np.linalg.pinv(design_wp) @ own_ww))

    def decides(count: int) -> bool:
        share = samples.count / count
        then_w = line_w + left_w * np.sqrt((off - own + own * share) / off)
        then = Samples(own_ww[None] * share, count)
        found = gain_belief(tokens_w, then_w[None], 2, noise_floor * share, then, level_only, margin)
        return reach(found, level) <= apart

    steps = int(np.log(max(1, MOST_SAMPLES / samples.count)) / LN_QUARTER)
    counts = [int(np.ceil(samples.count * 1.25**step)) for step in range(steps + 1)]
    first = bisect.bisect_left(counts, True, key=decides)
    return counts[first] if first < len(counts) else None


def needed_checkpoints(
    tokens_w: np.ndarray, belief: Belief, apart: float, level: float, level_only: bool = False
) -> int | None:
    """How many checkpoints, evenly over a doubling of tokens, would; None: none of NEEDED, as noise with a long memory
    is not averaged away. The noise is taken to be as it is believed to be."""
    if level <= 0:
        return None
    unit, now = np.median(np.diff(tokens_w)), shapes(tokens_w, walks=not level_only).covariance_qww
    now_q = _contrast_variance(now, tokens_w, level_only)
    share = 0.0 if belief.of_samples_r is None else float(belief.of_samples_r[0] / belief.scale_r[0] ** 2)
    variance_q = (belief.weight_qr[:, 0] * belief.scale_qr[:, 0] ** 2).reshape(len(now), -1).sum(axis=1) / now_q
    for count in NEEDED:
        then_w = np.linspace(tokens_w[-1] / 2, tokens_w[-1], count)
        then = [np.eye(count), *_of_clock((then_w - then_w[0]) / unit, not level_only)]
        if len(now) > len(then):  # uneven checkpoints have a second clock
            then += _of_clock(np.arange(count, dtype=float), not level_only)
        then_q = _contrast_variance(np.array(then), then_w, level_only)
        of_samples = share * variance_q @ now_q * then_q[0] / now_q[0]
        error = np.sqrt(of_samples + (1 - share) * variance_q @ then_q)
        if stats.t.ppf(1 - level, count - 2) * error <= apart:
            return count
    return None


def _contrast_variance(covariance_qww: np.ndarray, tokens_w: np.ndarray, level_only: bool) -> np.ndarray:
    """Of the gain per +25 % tokens, or of the level, under noise of these shapes, by generalised least squares [q]."""
    log_w = np.log(tokens_w)
    design = np.ones((len(log_w), 1)) if level_only else np.stack([np.ones(len(log_w)), log_w - log_w.mean()], axis=1)
    contrast = np.array([1.0]) if level_only else np.array([0.0, LN_QUARTER])
    return np.array([
        contrast @ linalg.inv(design.T @ linalg.solve(shape_ww, design, assume_a="pos")) @ contrast
        for shape_ww in covariance_qww
    ])  # fmt: skip


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
        change = believe(design, np.array([0.0, 0.0, 1.0]), gain_rk[:, part], shapes(tokens_k[part]), noise_floor)
        found_rk[:, k] = (change.above(0.0) < ALERT_LEVEL / looks) & (change.value_r < -margin)
    return found_rk
