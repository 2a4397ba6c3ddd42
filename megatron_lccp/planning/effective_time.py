"""What faults leave of the time: the share of it in which steps are done that count, and the best interval of saves.

In: how often a fault ends the job, and the seconds that each one costs, with where they are from. Out: the share of each
cost in the time, the best interval and what it leaves, in plain values, and as lines for people.

Faults are taken to come independently of one another, at one rate (an exponential distribution), and to end the whole
job, which then goes on from its last save. They come in saves and in the middle of a recovery, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

DAY_S = 86400.0
Basis = Literal["measured", "planned", "assumed"]


@dataclass(frozen=True)
class Term:
    """What a fault, or a save, costs."""

    seconds: float
    basis: Basis
    source: str
    """Where the seconds are from, in a few words."""


RECOVERY = ("detection", "requeue", "start", "load")
"""What follows a fault, in this order."""
TERMS = (*RECOVERY, "save", "behind")
"""`save`: for how long the training waits for one. `behind`: for how long a save that is written beside the training
does not count yet; a fault in that time falls back on the one before."""
WORDS = {
    "detection": "detection", "requeue": "requeue", "start": "start", "load": "load", "lost": "half an interval",
    "save": "save", "behind": "save not yet whole",
}  # fmt: skip
ASSUMED = {
    # Slurm takes a node for lost after SlurmdTimeout, 300 s by default (slurm.conf). A rank that dies is noticed within
    # seconds, by torchrun on its node and by the others' connections.
    "detection": Term(300.0, "assumed", "Slurm's SlurmdTimeout; a rank that dies is noticed in seconds"),
    "requeue": Term(120.0, "assumed", "a free node in the job's place"),
    "start": Term(120.0, "assumed", "imports from a shared disk, NCCL, the first step's kernels"),
}
"""What holds for a term that nothing else is known of."""


def best_interval_s(save_s: float, faults_per_day: float) -> float:
    """Seconds of training between two saves that waste the least, each save taking `save_s`.

    J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
    Systems 22 (2006) 303-312, equation 37; its first term is J. W. Young's, Communications of the ACM 17 (1974) 530.
    """
    between_s = DAY_S / faults_per_day
    if save_s >= 2 * between_s:
        return between_s
    ratio = math.sqrt(save_s / (2 * between_s))
    return math.sqrt(2 * save_s * between_s) * (1 + ratio / 3 + ratio**2 / 9) - save_s


def shares(terms: Mapping[str, Term], faults_per_day: float, interval_s: float) -> dict[str, float]:
    """Share of the time that goes into each term, into `lost` work, and into steps that count (`effective`); they add
    up to 1.

    With m seconds between faults, t seconds of training between saves of s seconds and r seconds of recovery, an
    interval that counts takes m exp(r / m) (exp((t + s) / m) - 1) seconds on average (Daly 2006, equation 20).
    """
    between_s = DAY_S / faults_per_day
    save_s, behind_s = terms["save"].seconds, terms["behind"].seconds
    recovery_s = sum(terms[name].seconds for name in RECOVERY)
    failed = math.expm1((interval_s + save_s) / between_s)  # times that an interval is begun in vain
    lost_s = between_s * failed - (interval_s + save_s)
    recovery_total_s = failed * between_s * math.expm1(recovery_s / between_s)
    behind_total_s = failed * min(behind_s, interval_s)
    whole_s = interval_s + save_s + lost_s + recovery_total_s + behind_total_s
    found = {
        name: recovery_total_s * (terms[name].seconds / recovery_s if recovery_s else 0.0) / whole_s for name in RECOVERY
    }
    found |= {"lost": lost_s / whole_s, "save": save_s / whole_s, "behind": behind_total_s / whole_s}
    return {**found, "effective": interval_s / whole_s}


def effective_time(
    faults_per_day: float, terms: Mapping[str, Term], interval_s: float | None = None, step_s: float | None = None
) -> dict[str, Any]:
    """Everything about one rate of faults, in plain values. `terms` has all of TERMS.

    `interval_s` is the interval that is configured, `step_s` a step: the best interval is then one of whole steps.
    Raises ValueError for a rate or a term that cannot be.
    """
    if not (faults_per_day > 0 and math.isfinite(faults_per_day)):
        raise ValueError(f"--faults-per-day: should be above 0, is {faults_per_day}")
    for name in TERMS:
        if not (terms[name].seconds >= 0 and math.isfinite(terms[name].seconds)):
            raise ValueError(f"--outage: {name}: should be at least 0 seconds, is {terms[name].seconds}")
    best_s = max(best_interval_s(terms["save"].seconds, faults_per_day), 1e-9)
    if step_s:
        best_s = max(1, round(best_s / step_s)) * step_s
    at_best = shares(terms, faults_per_day, best_s)
    lost = {name: share for name, share in at_best.items() if name != "effective"}
    return {
        "faults_per_day": faults_per_day,
        "terms": {name: vars(term).copy() for name, term in terms.items()},
        "best_interval_s": best_s,
        "shares": at_best,
        "effective": at_best["effective"],
        "largest": max(lost, key=lost.__getitem__),
        "configured_interval_s": interval_s,
        "configured_effective": None if interval_s is None else shares(terms, faults_per_day, interval_s)["effective"],
    }


def parse_outage(texts: Sequence[str]) -> dict[str, Term]:
    """`NAME=SECONDS`, as --outage takes it, as terms that were measured. Raises ValueError."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if name not in TERMS or not (seconds >= 0 and math.isfinite(seconds)):
            raise ValueError(f"--outage: {text!r} should be NAME=SECONDS, NAME one of {', '.join(TERMS)}")
        found[name] = Term(seconds, "measured", "--outage")
    return found
