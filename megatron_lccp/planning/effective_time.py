"""What faults leave of the time: the share of it in which steps are done that count, and the best interval of saves.

In: how often a fault ends the job, and the seconds that each one costs, with where they are from. Out: the share of
each cost in the time, the best interval and what it leaves, in plain values, and as lines for people.

Faults are taken to come independently of one another, at one rate (an exponential distribution), and to end the whole
job, which then goes on from its last save. They come during saves and recoveries, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_lccp.schema import Every
from megatron_lccp.text import time_text

DAY_S = 86400.0
_MOST = 300.0  # exponents: what is above it leaves no time anyway
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
"""`save`: for how long the training waits for one. `behind`: for how long one that is written beside the training does
not count yet; a fault in that time falls back on the one before."""
NAMES = {
    "detection": "detection", "requeue": "requeue", "start": "start", "load": "load", "lost": "half an interval",
    "save": "save", "behind": "save not yet whole",
}  # fmt: skip
ASSUMED = {
    "detection": Term(300.0, "assumed", "SlurmdTimeout's default, for a lost node"),
    "requeue": Term(120.0, "assumed", "a spare node is free"),
    "start": Term(120.0, "assumed", "imports from a shared disk, NCCL, first kernels"),
}
"""What holds for a term of which nothing else is known."""
STORAGE_GBPS, COPY_GBPS = 10.0, 5.0
"""Gigabytes (1e9 bytes) a second, assumed: of the storage for all ranks, of a GPU into host memory that is not
pinned."""
REMEDIES = {
    "detection": "a lower SlurmdTimeout and a watchdog on hangs notice sooner",
    "requeue": "spare nodes in the reservation wait for nothing",
    "start": "an environment on local disks, or in an image, starts sooner",
    "load": "checkpoints of one layout alone, or faster storage, load sooner",
    "lost": "cheaper saves allow more of them: checkpoint.asynchronous, faster storage",
    "save": "checkpoint.asynchronous, or faster storage, makes saves cheaper",
    "behind": "faster storage makes a save whole sooner",
}


def terms_of(
    save_bytes: int, load_bytes: int, copy_bytes: int, storage_gbps: float | None, asynchronous: bool,
    given: Mapping[str, Term],
) -> dict[str, Term]:  # fmt: skip
    """All terms: those `given`, then what sizes say, then what is assumed.

    Bytes are those of a save, of all that a load reads, and of what the worst rank copies to host memory.
    """
    basis: Basis = "assumed" if storage_gbps is None else "planned"
    speed = STORAGE_GBPS if storage_gbps is None else storage_gbps
    at = f"at {speed:g} GB/s of the storage"
    write = Term(save_bytes / speed / 1e9, basis, f"{save_bytes / 1e9:,.4g} GB {at}")
    found = {**ASSUMED, "load": Term(load_bytes / speed / 1e9, basis, f"{load_bytes / 1e9:,.4g} GB {at}")}
    if asynchronous:
        copy = f"{copy_bytes / 1e9:,.4g} GB of a rank to host memory at {COPY_GBPS:g} GB/s"
        found |= {"save": Term(copy_bytes / COPY_GBPS / 1e9, "assumed", copy), "behind": write}
    else:
        found |= {"save": write, "behind": Term(0.0, "planned", "the training waits for saves")}
    return {**found, **given}


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
    failed = math.expm1(min((interval_s + save_s) / between_s, _MOST))  # times that an interval is begun in vain
    lost_s = between_s * failed - (interval_s + save_s)
    recovery_total_s = failed * between_s * math.expm1(min(recovery_s / between_s, _MOST))
    behind_total_s = failed * min(behind_s, interval_s)
    whole_s = interval_s + save_s + lost_s + recovery_total_s + behind_total_s
    found = {
        name: recovery_total_s * (terms[name].seconds / recovery_s if recovery_s else 0.0) / whole_s
        for name in RECOVERY
    }
    found |= {"lost": lost_s / whole_s, "save": save_s / whole_s, "behind": behind_total_s / whole_s}
    return {**found, "effective": interval_s / whole_s}


def effective_time(
    faults_per_day: float, terms: Mapping[str, Term], interval_s: float, step_s: float
) -> dict[str, Any]:
    """Everything about one rate of faults, in plain values. `terms` has all of TERMS.

    `interval_s` is the interval that is configured; the best one is of whole steps of `step_s`. Raises ValueError for a
    rate that cannot be.
    """
    if not (faults_per_day > 0 and math.isfinite(faults_per_day)):
        raise ValueError(f"--faults-per-day: should be above 0, is {faults_per_day}")
    best_s = best_interval_s(terms["save"].seconds, faults_per_day)
    # A save begins when the one before it is whole.
    best_s = max(1, math.ceil(terms["behind"].seconds / step_s), round(best_s / step_s)) * step_s
    at_best = shares(terms, faults_per_day, best_s)
    lost = {name: share for name, share in at_best.items() if name != "effective"}
    return {
        "faults_per_day": faults_per_day,
        "terms": {name: asdict(terms[name]) for name in TERMS},
        "best_interval_s": best_s,
        "shares": at_best,
        "effective": at_best["effective"],
        "largest": max(lost, key=lost.__getitem__),
        "configured_interval_s": interval_s,
        "configured_effective": shares(terms, faults_per_day, interval_s)["effective"],
    }


def of_plan(
    plan: Mapping[str, Any], every: Every, asynchronous: bool, same_layout: bool, faults_per_day: Sequence[float],
    outages: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The effective time of what `lccp plan` says in plain values, at several rates of faults.

    `every` is when the run saves, and whether behind the training's back; `same_layout` if its usual save is of one
    layout alone; `outages` are NAME=SECONDS. A step is that of the stage that takes longest, on the
    first kind of GPU in the plan. Raises ValueError.
    """
    gpu, stages = next((name, of["stages"]) for name, of in plan["gpus"].items())
    stage = max(stages, key=lambda name: stages[name]["gpu_hours"])
    step_s = stages[stage]["step_s"]
    terms = terms_of(*_sizes(plan, same_layout), plan["storage_gbps"], asynchronous, parse_outage(outages))
    steps = every.steps or max(1, round((every.tokens or 0) / plan["stages"][stage]["global_batch_tok"]))
    rates = [effective_time(rate, terms, steps * step_s, step_s) for rate in faults_per_day]
    return {"gpu": gpu, "stage": stage, "step_s": step_s, "configured_steps": steps, "rates": rates}


def _sizes(plan: Mapping[str, Any], same_layout: bool) -> tuple[int, int, int]:
    """Bytes of a save, of all that a load reads, and of the most that a rank brings to host memory."""
    cost = plan["checkpoints"]["same_layout" if same_layout else "any_layout"]
    return cost["bytes"], cost["read_bytes"], cost["host_bytes_at_once"]


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


def as_lines(found: Mapping[str, Any]) -> list[str]:
    """What `of_plan` found, its rates side by side, for people."""
    rates, steps = found["rates"], found["configured_steps"]
    interval = f"{steps:,} steps ({time_text(steps * found['step_s'])})"
    terms = rates[0]["terms"]
    heads = [f"{rate['faults_per_day']:g} a day" for rate in rates]
    where = max(len(_where(term)) for term in terms.values())
    lines = [
        f"Effective time on {found['gpu']} in {found['stage']}: each fault ends the job, which goes on from its last save",
        f"{'share of the time':<20}{'seconds':>9}  {'from':<{where}}" + "".join(f"{head:>12}" for head in heads),
    ]
    for name, text in NAMES.items():
        term = terms.get(name)
        seconds = f"{term['seconds']:>9,.4g}" if term else f"{'':>9}"
        values = "".join(f"{rate['shares'][name]:>12.2%}" for rate in rates)
        lines.append(f"{text:<20}{seconds}  {_where(term) if term else '':<{where}}{values}")
    ways = [
        ("steps that count", [f"{rate['effective']:.2%}" for rate in rates]),
        ("with a save every", [time_text(rate["best_interval_s"]) for rate in rates]),
        ("which are steps", [f"{rate['best_interval_s'] / found['step_s']:,.0f}" for rate in rates]),
        (f"with one every {interval}", [f"{rate['configured_effective']:.2%}" for rate in rates]),
    ]
    lines += [f"{text:<{31 + where}}" + "".join(f"{value:>12}" for value in values) for text, values in ways]
    for head, rate in zip(heads, rates, strict=True):
        name = rate["largest"]
        lines.append(f"At {head} most goes into {NAMES[name]} ({rate['shares'][name]:.2%}): {REMEDIES[name]}.")
    return lines


def _where(term: Mapping[str, Any]) -> str:
    return f"{term['basis']}: {term['source']}"
