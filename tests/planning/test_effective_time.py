"""What faults leave of the time: against a simulation of faults, and against the best interval that a search finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from megatron_lccp.planning.effective_time import (
    DAY_S,
    RECOVERY,
    TERMS,
    Term,
    best_interval_s,
    effective_time,
    parse_outage,
    shares,
    terms_of,
)
from tests.distributed.ranks import lccp


def terms(**seconds: float) -> dict[str, Term]:
    return {name: Term(seconds.get(name, 0.0), "measured", "here") for name in TERMS}


def simulated(terms: dict[str, Term], faults_per_day: float, interval_s: float, days: int = 3000) -> float:
    """Share of the time in steps that count, of a job that meets drawn faults, one after the other."""
    rng = np.random.default_rng(0)
    recovery_s, save_s = sum(terms[name].seconds for name in RECOVERY), terms["save"].seconds
    counted = clock = 0.0
    recovering = False
    while clock < days * DAY_S:
        fault_s = rng.exponential(DAY_S / faults_per_day)  # of a process without a memory: from now on
        if recovering:
            clock += min(fault_s, recovery_s)
            recovering = fault_s < recovery_s
            if recovering:
                continue
            fault_s -= recovery_s
        whole = int(fault_s // (interval_s + save_s))
        counted += whole * interval_s
        clock += fault_s
        recovering = True
    return counted / clock


@pytest.mark.parametrize("faults_per_day", [1.0, 24.0])
@pytest.mark.parametrize("interval_s", [300.0, 3000.0])
def test_a_simulation_loses_as_much(faults_per_day: float, interval_s: float) -> None:
    costs = terms(detection=300, requeue=120, start=120, load=60, save=20)
    found = shares(costs, faults_per_day, interval_s)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["effective"] == pytest.approx(simulated(costs, faults_per_day, interval_s), abs=0.005)


@pytest.mark.parametrize("faults_per_day", [0.1, 1.0, 24.0])
@pytest.mark.parametrize("save_s", [1.0, 30.0, 600.0])
def test_no_other_interval_is_better(faults_per_day: float, save_s: float) -> None:
    costs = terms(start=300, save=save_s)
    best = minimize_scalar(
        lambda log_s: -shares(costs, faults_per_day, float(np.exp(log_s)))["effective"],
        bounds=(0, 14),
        method="bounded",
    )
    ours = shares(costs, faults_per_day, best_interval_s(save_s, faults_per_day))["effective"]
    assert -best.fun - 5e-4 < ours <= -best.fun + 1e-9


def test_a_save_beside_the_training_loses_what_is_not_yet_whole() -> None:
    at_once, beside = (
        terms_of(int(1.12e12), int(2.24e12), int(4.4e9), 10.0, asynchronous, {}) for asynchronous in (False, True)
    )
    assert at_once["save"].seconds == beside["behind"].seconds == pytest.approx(112)
    assert {term.basis for term in beside.values()} == {"assumed", "planned"}
    one, other = (effective_time(1.0, costs, 3600.0, 26.5) for costs in (at_once, beside))
    assert one["effective"] < 0.95 and other["effective"] > 0.98  # the 80B layout's sizes; docs/cluster.md has them
    assert other["best_interval_s"] % 26.5 == pytest.approx(0, abs=1e-6) and other["best_interval_s"] >= 112
    hourly = effective_time(24.0, beside, 3600.0, 26.5)
    assert hourly["largest"] == "detection" and hourly["shares"]["detection"] > hourly["shares"]["behind"] > 0


@pytest.mark.parametrize("text", ["start", "start=", "start=-1", "start=nan", "coffee=5", "=5"])
def test_an_outage_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="--outage: .* should be NAME=SECONDS"):
        parse_outage([text])


def test_the_plan_says_it_at_several_rates() -> None:
    more = ("plan", "examples/hunyuan_a13b_64k.yaml", "--ranks=256", "--faults-per-day=1", "--faults-per-day=24")
    found = lccp(*more, "--outage=start=95")
    assert "measured: --outage" in found.stdout and "1 a day" in found.stdout, found.stderr
    assert "At 24 a day most goes into " in found.stdout
    saves = ("--checkpoint.asynchronous=true", "--checkpoint.any_layout_every=10", "--storage-gbps=10")
    found = lccp(*more, *saves, "--json")  # as in docs/cluster.md
    rates = json.loads(found.stdout)["effective_time"]["rates"]
    assert [rate["faults_per_day"] for rate in rates] == [1, 24] and rates[0]["effective"] > 0.98
    assert rates[1]["largest"] == "detection"
    for wrong in ("--faults-per-day=0", "--outage=coffee=5"):
        found = lccp(*more, wrong)
        assert found.returncode == 2 and found.stderr.count("\n") == 1 and wrong.split("=")[0] in found.stderr
