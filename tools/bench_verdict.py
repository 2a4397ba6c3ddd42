"""How often `lccp verdict` says `saturated` of synthetic runs that are not, and how often it finds those that are.

In: nothing. Out: a table per law and noise, and exit code 1 if a cell is over the bound.

    python tools/bench_verdict.py [--runs 1000] [--checkpoints 6 10 20 40 60] [--bound 0.05]

A run is asked after every checkpoint from the fifth on, as a scheduler would, and acts on the first `saturated`.
That is false if at that moment the law still gains at least the margin per +25 % tokens (-dy/dlnN ln 1.25, without
noise). `false` is the share of runs with a false one; `found`, of the runs that are under the margin at their end, the
share called saturated there; `moving`, of those that are not, the share called improving there; `fall`, of all runs,
the share with an alert that something fell back, which nothing here does. - : there are no such runs.

Laws, in units of the margin; tokens are evenly spaced, up to 200 B, and noise is that of checkpoints:
  log, at the margin   y = -A ln N that gains exactly the margin, for ever: the hardest case, and never saturated
  log, twice           gains twice the margin
  broken, slows        a broken power law, gaining 1.5 to 6 margins before the break and 1 to 1.5 after: a false plateau
  broken, any          before and after 0.2 to 4 margins, drawn apart, so that many runs gather pace
  plateau              passes the margin between 10 % and 90 % of the run; half bend sharply, half relax exponentially
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from scipy import signal

from megatron_lccp.analysis.statistics import trend

TOKENS = 200e9


def log_law(rng: np.random.Generator, runs: int, gain: float):
    slope = gain / trend.LN_QUARTER
    return lambda n: -slope * np.log(n) * np.ones((runs, 1))


def broken_power_law(rng: np.random.Generator, runs: int, before: tuple[float, float], after: tuple[float, float]):
    """Caballero et al., 2023: two power laws and a soft break; gains per +25 % tokens at the break in margins."""
    at, softness = rng.uniform(0.1, 0.9, (runs, 1)) * TOKENS, rng.uniform(0.05, 0.3, (runs, 1))
    first, second = rng.uniform(*before, (runs, 1)), rng.uniform(*after, (runs, 1))
    power = rng.uniform(0.02, 0.1, (runs, 1))
    size, more = first / (power * trend.LN_QUARTER), power * (second / first - 1)
    return lambda n: size * (n / at) ** -power * (1 + (n / at) ** (1 / softness)) ** (-more * softness)


def plateau(rng: np.random.Generator, runs: int):
    """Half a bend on the log axis, half an exponential; both pass the margin at `at`."""
    at, sharp = rng.uniform(0.1, 0.9, (runs, 1)) * TOKENS, rng.random((runs, 1)) < 0.5
    slope = rng.uniform(1.5, 6, (runs, 1)) / trend.LN_QUARTER
    pace = rng.uniform(0.075, 0.3, (runs, 1)) * TOKENS
    size = pace / (at * trend.LN_QUARTER)
    return lambda n: np.where(sharp, -slope * np.log(np.minimum(n, at)), size * np.exp((at - n) / pace))


LAWS = {
    "log, at the margin": lambda rng, runs: log_law(rng, runs, 1.0),
    "log, twice": lambda rng, runs: log_law(rng, runs, 2.0),
    "broken, slows": lambda rng, runs: broken_power_law(rng, runs, (1.5, 6), (1, 1.5)),
    "broken, any": lambda rng, runs: broken_power_law(rng, runs, (0.2, 4), (0.2, 4)),
    "plateau": plateau,
}


def noise(rng: np.random.Generator, runs: int, checkpoints: int, autocorrelation: float) -> np.ndarray:
    """AR(1) noise of unit variance [runs, checkpoints]."""
    white = rng.standard_normal((runs, checkpoints + 100))
    gain = np.sqrt(1 - autocorrelation**2)
    return signal.lfilter([gain], [1, -autocorrelation], white, axis=1)[:, 100:]


def looks(tokens_k: np.ndarray, value_rk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(saturated, improving) [runs, checkpoints] after every checkpoint, margin 1, falling values being gains."""
    saturated, improving = np.zeros(value_rk.shape, bool), np.zeros(value_rk.shape, bool)
    before = None
    for count in range(trend.FIRST_LOOK, len(tokens_k) + 1):
        now = trend.interim(tokens_k[:count], -value_rk[:, :count], 1.0)
        saturated[:, count - 1], improving[:, count - 1] = trend.decide(now, before)
        before = now
    return saturated, improving


def cell(law: str, checkpoints: int, autocorrelation: float, sigma: float, runs: int, seed: int):
    """(false `saturated`, found, called improving, alerts) of one cell, as shares; None where nothing is due."""
    rng = np.random.default_rng([seed, checkpoints, round(10 * autocorrelation), round(10 * sigma)])
    curve, tokens_k = LAWS[law](rng, runs), TOKENS * np.arange(1, checkpoints + 1) / checkpoints
    step = 1e-5
    gain_rk = (curve(tokens_k * (1 - step)) - curve(tokens_k * (1 + step))) / (2 * step) * trend.LN_QUARTER
    still_rk = gain_rk >= 1 - 1e-4
    value_rk = curve(tokens_k) + sigma * noise(rng, runs, checkpoints, autocorrelation)
    saturated, improving = looks(tokens_k, value_rk)
    first_r = saturated.argmax(axis=1)
    false = saturated.any(axis=1) & still_rk[np.arange(runs), first_r]
    over_r, under_r = still_rk[:, -1], ~still_rk[:, -1]
    found = saturated[under_r, -1].mean() if under_r.any() else None
    moving = improving[over_r, -1].mean() if over_r.any() else None
    return false.mean(), found, moving, trend.falls(tokens_k, -value_rk, 1.0).any(axis=1).mean()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="synthetic runs a cell")
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[6, 10, 20, 40, 60])
    parser.add_argument("--sigma", type=float, nargs="+", default=[0.5, 2.0], help="noise of a checkpoint, in margins")
    parser.add_argument("--bound", type=float, default=0.05, help="share of false `saturated` that a cell may have")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started, worst = time.monotonic(), 0.0
    print(f"{given.runs} runs a cell; false/found/moving/fall in %, by number of checkpoints")
    print(f"{'law':20} {'noise':9} {'sigma':>5}  " + "".join(f"{n:>20}" for n in given.checkpoints))
    for law in LAWS:
        for autocorrelation in (0.0, 0.5):
            for sigma in given.sigma:
                cells = [cell(law, n, autocorrelation, sigma, given.runs, given.seed) for n in given.checkpoints]
                worst = max(worst, *(false for false, *_ in cells))
                texts = ["/".join("-" if s is None else f"{100 * s:.1f}" for s in each) for each in cells]
                name = "AR(1) 0.5" if autocorrelation else "white"
                print(f"{law:20} {name:9} {sigma:5.1f}  " + "".join(f"{t:>20}" for t in texts), flush=True)
    print(
        f"most false in a cell: {100 * worst:.1f} % (bound {100 * given.bound:g} %); {time.monotonic() - started:.0f} s"
    )
    return int(worst > given.bound)


if __name__ == "__main__":
    sys.exit(main())
