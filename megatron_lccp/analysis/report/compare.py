"""Two runs: which is better by which signal, at equal tokens and at equal GPU-hours.

In: two run directories, or what `lccp measure` wrote. Out: a Comparison. Every difference is over the samples that both
measured, paired, with its 95 % interval. The place is the furthest that both have reached. Where a run measured before
and after it, its values are those in between, sample by sample, on a straight line.
Legend: k checkpoints of one run, p places in the joint table, s samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from megatron_lccp.analysis.cost import Unpriced, spent_gpu_hours
from megatron_lccp.analysis.measured.registry import run_signals
from megatron_lccp.analysis.measured.signal import Signal
from megatron_lccp.analysis.report.branches import branches_of
from megatron_lccp.analysis.report.same_samples import Change, as_text, changes_of
from megatron_lccp.analysis.run import Run, load_runs, make_run, run_folders
from megatron_lccp.analysis.statistics.stats import interval
from megatron_lccp.records.store import RunStore, steps_frame
from megatron_lccp.schema import Level
from megatron_lccp.text import amount_text, count_text, ends_text, hours_text, tokens_text, value_text

Better = Literal["A", "B", "neither", "unknown"]


@dataclass(frozen=True)
class Difference:
    """One signal in both runs at one place."""

    signal: str
    level: Level
    unit: str
    a: float
    """Its value in A."""
    b: float
    gain: float
    """By how much B is better than A, in `unit`; below 0 it is worse."""
    low: float | None
    """95 % interval of the gain, samples drawn anew, the same ones in both; None: there are none to draw."""
    high: float | None
    samples: int
    better: Better
    """Of which run the whole interval speaks; neither: 0 is inside; unknown: there is no interval."""


@dataclass(frozen=True)
class Place:
    """The two runs at equal tokens, or at equal GPU-hours."""

    axis: Literal["tokens", "gpu_hours"]
    at: float | None
    """The furthest that both have reached; None: not known."""
    differences: tuple[Difference, ...]
    why_not: str = ""
    """Why there is nothing to compare."""


@dataclass(frozen=True)
class Comparison:
    """Everything that `lccp compare` says."""

    a: str
    """Name of the run."""
    b: str
    shared_tokens: int | None
    """Tokens up to which both are the same training, one being a branch of the other; None: they share nothing."""
    places: tuple[Place, ...]
    changes: tuple[Change, ...]
    """The same samples in perplexities, answers won and lost, heads kept, at the newest step that both measured."""
    step: int | None
    """That step."""

    def to_json(self) -> str:
        """One JSON object; null is what is not known."""
        return json.dumps(_plain(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False)

    def text(self) -> str:
        """For a terminal."""
        parts = [f"A: {self.a}\nB: {self.b}"]
        if self.shared_tokens is not None:
            parts[0] += f"\none training up to {tokens_text(self.shared_tokens)} tokens, where a branch begins"
        parts += [_place_text(place) for place in self.places]
        if self.changes:
            title = (
                f"In other words, at step {self.step:,}, which both measured (no interval corrects for their number):"
            )
            parts.append(f"{title}\n{as_text(list(self.changes), ('A', 'B'))}")
        return "\n\n".join(parts)


def compare(a: str | Path, b: str | Path, ranks: int | None = None) -> Comparison:
    """Compare two runs; `ranks`: those of steps that do not say theirs.

    Raises ValueError in one line if one is no run, or if they measured nothing in common.
    """
    for path in (a, b):
        if len(found := run_folders([path])) > 1:
            raise ValueError(f"{path}: holds {len(found)} runs; give one of them")
    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks: should be at least 1, is {ranks}")
    if len({path.resolve() for path in (*run_folders([a]), *run_folders([b]))}) < 2:
        raise ValueError(f"{a} and {b}: are the same run; give two")
    one, two = load_runs([a, b])
    signals = [{signal.name: signal for signal in run_signals(run) if not signal.turnover} for run in (one, two)]
    common = [name for name in signals[0] if name in signals[1]]
    if not common:
        raise ValueError(f"{a} and {b}: measured no signal in common; measure both with the same monitors")
    tokens = [dict(zip(run.rows["step"], run.rows["tokens"], strict=True)) for run in (one, two)]
    hours = [spent_gpu_hours(run, ranks) for run in (one, two)]
    places = [_place("tokens", (one, two), signals, common, tokens)]
    known = [each for each in hours if not isinstance(each, Unpriced)]
    if len(known) == 2:
        spent = [{0: 0.0} | dict(zip(each["step"], each["gpu_hours"], strict=True)) for each in known]
        places.append(_place("gpu_hours", (one, two), signals, common, spent))
    else:
        both = zip((one, two), hours, strict=True)
        why = "; ".join(f"{run.name}: {each.why}" for run, each in both if isinstance(each, Unpriced))
        places.append(Place("gpu_hours", None, (), why))
    step, changes = _changes([RunStore(*run_folders([path])) for path in (a, b)])
    if not changes and not any(place.differences for place in places):
        raise ValueError(f"{a} and {b}: {places[0].why_not}; measure the same samples of both with the same monitors")
    return Comparison(one.name, two.name, _shared_tokens(one, two), tuple(places), tuple(changes), step)


# --- one place -----------------------------------------------------------------------------------------------------


def _place(axis, runs: Sequence[Run], signals, common: Sequence[str], of_step: Sequence[Mapping[int, float]]) -> Place:
    """The differences of all signals at the furthest that both runs measured them at, on an axis that `of_step` gives."""
    wanted: dict[tuple, list[str]] = {}
    furthest = -math.inf
    for name in common:
        points = [_points(each[name], at) for each, at in zip(signals, of_step, strict=True)]
        if any(not len(each) for each in points):
            continue
        at = min(float(each["at"].max()) for each in points)
        if any(each["at"].min() > at for each in points):
            continue
        furthest = max(furthest, at)
        wanted.setdefault((at, *(_around(each, at) for each in points)), []).append(name)
    found: dict[str, Difference] = {}
    for (at, *arounds), names in wanted.items():
        joint = {signal.name: signal for signal in run_signals(_joint(runs, arounds))}
        for name in names:
            if name in joint and (difference := _difference(joint[name], arounds)):
                found[name] = difference
    if not found:
        why = "no checkpoint of one is as far as the first of the other" if not wanted else "they share no sample"
        return Place(axis, None if not wanted else furthest, (), why)
    return Place(axis, furthest, tuple(found[name] for name in common if name in found))


def _points(signal: Signal, of_step: Mapping[int, float]) -> pd.DataFrame:
    """The checkpoints of a signal on an axis: step, at; of several at one place the last."""
    frame = pd.DataFrame({"step": signal.steps_k, "tokens": signal.tokens_k, "finite": np.isfinite(signal.value_k)})
    frame = frame[frame["finite"] & frame["step"].isin(list(of_step))]
    return frame.assign(at=[float(of_step[step]) for step in frame["step"]]).drop_duplicates("at", keep="last")


def _around(points: pd.DataFrame, at: float) -> tuple[tuple[int, float], ...]:
    """(step, weight) of the checkpoint at this place, or of the two around it."""
    before, after = points[points["at"] <= at].iloc[-1], points[points["at"] >= at].iloc[0]
    if before["step"] == after["step"]:
        return ((int(before["step"]), 1.0),)
    share = (at - before["at"]) / (after["at"] - before["at"])
    return (int(before["step"]), 1.0 - share), (int(after["step"]), share)


def _joint(runs: Sequence[Run], arounds: Sequence[Sequence[tuple[int, float]]]) -> Run:
    """One run whose checkpoints are these of the two, in order, at 2, 3, ... tokens: whatever pairs samples over
    checkpoints pairs them over both runs. At 1 token stands the mean of both: a set of heads that is frozen at the first
    checkpoint is then no more of one run than of the other."""
    steps = [(run, step) for run, around in zip(runs, arounds, strict=True) for step, _ in around]
    both = [(1, run, around[-1][0]) for run, around in zip(runs, arounds, strict=True)]
    parts: dict[str, list[pd.DataFrame]] = {"rows": [], "head_means": []}
    for place, run, step in [*both, *((place, *step) for place, step in enumerate(steps, start=2))]:
        for name, frames in parts.items():
            rows = getattr(run, name)
            own = rows[rows["step"] == step]
            own = own[own["stage"] == own["stage"].iloc[-1]] if len(own) else own
            frames.append(own.assign(run="joint", step=place, tokens=place, stage="lccp", config_hash=""))
    rows, heads = (pd.concat(frames, ignore_index=True) for frames in parts.values())
    heads = heads[[name for name in heads if name != "config_hash"]]
    metrics = {**runs[0].metrics, **runs[1].metrics}
    return make_run(rows, steps_frame([]), threshold=runs[0].threshold, by_head=heads, metrics=metrics)


def _difference(signal: Signal, arounds: Sequence[Sequence[tuple[int, float]]]) -> Difference | None:
    """By how much B is better; None if one of the checkpoints does not have the samples of the others."""
    weight_p = np.array([0.0, *(weight for around in arounds for _, weight in around)])
    place_p = np.arange(len(weight_p))
    if not np.array_equal(signal.tokens_k, 1 + place_p):
        return None
    is_a_p = place_p <= len(arounds[0])
    of_a, of_b = weight_p * is_a_p, weight_p * ~is_a_p
    a, b = float(of_a @ signal.value_k), float(of_b @ signal.value_k)
    low = high = None
    better: Better = "unknown"
    if signal.sample_ks is not None and signal.samples > 1:
        ends = interval(signal.better * ((of_b - of_a) @ signal.sample_ks))
        low, high = float(ends[0]), float(ends[1])
        better = "B" if low > 0 else "A" if high < 0 else "neither"
    gain = signal.better * (b - a)
    return Difference(signal.name, signal.level, signal.unit, a, b, gain, low, high, signal.samples, better)


# --- the rest ------------------------------------------------------------------------------------------------------


def _shared_tokens(one: Run, two: Run) -> int | None:
    """Tokens up to which a branch and its run, or two branches of one run, are the same training."""
    for parent, child in ((one, two), (two, one)):
        if found := [branched for branched in branches_of(child) if branched.parent == parent.name]:
            return found[0].tokens
    both = [{branched.parent: branched.tokens for branched in reversed(branches_of(run))} for run in (one, two)]
    common = [min(both[0][name], both[1][name]) for name in both[0] if name in both[1]]
    return max(common, default=None)


def _changes(stores: Sequence[RunStore]) -> tuple[int | None, list[Change]]:
    """The newest step at the same tokens that both measured, and the changes from one to the other there."""
    steps = {*stores[0].windows()} & {*stores[1].windows()}
    for step in sorted(steps, reverse=True):
        one, two = (store.read_rows(first=step, last=step, health=False) for store in stores)
        if len(one) and len(two) and {*one["tokens"]} == {*two["tokens"]}:
            declared = stores[0].read_metrics() | stores[1].read_metrics()
            return step, changes_of(one, two, declared)
    return None, []


def _place_text(place: Place) -> str:
    name = "tokens" if place.axis == "tokens" else "GPU-hours"
    if place.why_not:
        return f"At equal {name}: not known ({place.why_not})."
    assert place.at is not None
    at = f"{tokens_text(place.at)} tokens" if place.axis == "tokens" else f"{hours_text(place.at)} GPU-hours"
    table = [("signal", "A", "B", "B is better by (95 % interval)", "better")]
    for each in place.differences:
        ends = "(no samples: no interval)"
        if each.low is not None and each.high is not None:
            ends = f"({ends_text(each.low, each.high, each.unit)}), {count_text(each.samples, 'sample')}"
        words = {"neither": "not told apart", "unknown": "-"}
        table.append((
            each.signal, value_text(each.a, each.unit), value_text(each.b, each.unit),
            f"{amount_text(each.gain, each.unit)} {ends}", words.get(each.better, each.better),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table]
    count = {
        which: sum(each.better == which for each in place.differences) for which in ("A", "B", "neither", "unknown")
    }
    said = f"B is better by {count['B']} of {count_text(len(place.differences), 'signal')}, A by {count['A']}"
    said += f", {count['neither']} not told apart" + (
        f", {count['unknown']} without interval" if count["unknown"] else ""
    )
    return "\n".join([f"At equal {name}, {at}: {said}.", *lines])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
