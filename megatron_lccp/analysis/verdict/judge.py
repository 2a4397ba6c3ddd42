"""What a run's signals say of convergence: saturated, improving, worse or undecided, with the numbers it rests on.

In: Run. Out: one Verdict. It is advice: nothing here stops a job.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from megatron_lccp.analysis.measured.registry import run_signals
from megatron_lccp.analysis.measured.signal import Signal, after_start
from megatron_lccp.analysis.run import Run
from megatron_lccp.analysis.statistics import trend
from megatron_lccp.analysis.statistics.laws import Forecast, forecasts
from megatron_lccp.analysis.statistics.stats import interval
from megatron_lccp.schema import Level
from megatron_lccp.text import about_text, amount_text, count_text, ends_text, tokens_text, value_text

State = Literal["saturated", "improving", "undecided", "worse"]
EXIT_CODES = {"saturated": 0, "improving": 10, "undecided": 11, "deceptive": 12, "worse": 13}
"""Of `lccp verdict`; deceptive: still improving, while the needle score is flat; worse: a signal fell, whatever the
others do."""
Reason = Literal["few checkpoints", "no samples", "few samples", "noise", "near the margin", "not begun"]
"""Why a signal is undecided. few checkpoints: nothing may be said yet. no samples: the noise can be learnt from the
checkpoints alone, and they are few. few samples: most of the interval comes from the samples. noise: most of it comes
from the noise of checkpoints, which more samples would not reduce. near the margin: the gain is so close to the margin
that no sensible measurement tells them apart. not begun: the score has never moved."""
FEW = 8
"""Checkpoints in a window with fewer than which its noise is hardly known without samples."""
PRACTICAL_SAMPLES = 2000
"""More than so many at every checkpoint is no advice to follow."""
HELD = 1.25
"""A signal has settled once it has stayed where it is while the LCCP's tokens grew by this factor."""


@dataclass(frozen=True)
class Fall:
    """What a signal lost since the start of the LCCP, or since its best checkpoint, beyond noise and a margin."""

    signal: str
    level: Level
    unit: str
    since: Literal["start", "best"]
    change: float
    """Turned so that negative is worse, whichever way the signal should go."""
    low: float
    """Interval of the change: under it with a chance of 2.5 % ..."""
    high: float
    """... and over it with the chance that this look may be wrong; under 0."""
    margin: float
    samples: int
    """Independent samples, the same at both ends; 0: noise of checkpoints alone."""
    tokens_from: int
    """Training tokens, all stages, of the start or the best checkpoint ..."""
    tokens_to: int
    """... and of the last."""
    recovering: bool
    """It improves again, and is still under where it was."""
    text: str
    """One sentence."""


@dataclass(frozen=True)
class SignalVerdict:
    """One signal: whether what +25 % tokens (of the LCCP) bring to it is under a margin set beforehand."""

    signal: str
    """Name, as `--margin` takes it: niah_exact, answer_nll, answer_nll[32K-64K], ..."""
    level: Level
    state: State
    """worse: it lost more than a margin and noise since the start of the LCCP or since its best, and does not improve
    again. saturated: the whole interval of the gain is under the margin, or less than the margin is left to gain.
    improving: the whole interval is above the margin. undecided: else."""
    unit: str
    """Unit of margin and gain: nat, share, heads, or a benchmark's own."""
    margin: float
    """Gain per +25 % tokens that is no longer worth them."""
    gain_per_25pct: float | None
    """Estimated gain per +25 % tokens at the end, positive is better; None with too few checkpoints."""
    low: float | None
    """Interval of the gain, over samples and over the noise of checkpoints: under it with a chance of 5 % ..."""
    high: float | None
    """... and over it with trend.risk, which is less: it is corrected for repeated looks."""
    checkpoints: int
    """Checkpoints that the interval rests on: those of the last one or two doublings of the LCCP's tokens."""
    samples: int
    """Independent samples (clusters) that were resampled; 0: none, and the interval has the noise of checkpoints alone
    (rows that are averages already, counts of heads)."""
    tokens_from: int
    """Training tokens, all stages, at the first and at the last of these checkpoints."""
    tokens_to: int
    law: Literal["log", "plateau", "none"]
    """The law that predicts held-out checkpoints better; none: too few to tell."""
    forecasts: tuple[Forecast, ...]
    """Of both laws, the better one first; empty with too few checkpoints."""
    settled_at_tokens: int | None
    """First checkpoint from which on it stayed within a margin and noise of where it ended, +25 % tokens or longer;
    None: not settled."""
    lead_tokens: int | None
    """How many tokens earlier it settled than the slowest signal, which counts as settled no earlier than now if it
    has not settled; None: not settled."""
    why: str
    """The state in one sentence."""
    reason: Reason | None = None
    """Why it is undecided; None: it is not."""
    needs_checkpoints: int | None = None
    """Checkpoints within the last doubling of the LCCP's tokens (in all, for too few checkpoints) with which this gain
    could be told from the margin; None: it is decided, or checkpoints alone do not tell."""
    needs_samples: int | None = None
    """Independent samples at each checkpoint with which it could be; None: it is decided, or samples alone do not."""
    common_noise: float | None = None
    """What moves a checkpoint as a whole, so that no number of samples averages it away: its standard deviation, as
    far as it is known; None: it cannot be told from the noise of samples."""
    top_share: float | None = None
    """The share of the gain since the first checkpoint that the one sample with the largest gain holds; over 1: the
    others together lost; None: there are no samples, or no gain."""
    fall: Fall | None = None
    """What it lost beyond noise; None: nothing."""

    @property
    def forecast_tokens(self) -> float | None:
        return self.forecasts[0].tokens if self.forecasts else None

    @property
    def forecast_low(self) -> float | None:
        return self.forecasts[0].low if self.forecasts else None

    @property
    def forecast_high(self) -> float | None:
        return self.forecasts[0].high if self.forecasts else None


@dataclass(frozen=True)
class Alert:
    """A signal fell back beyond noise: an early warning of instability."""

    signal: str
    tokens: int
    """Training tokens, all stages, at the checkpoint that fell back."""
    text: str
    """One sentence."""
    change: float | None = None
    """From the checkpoint before; None: the value is not finite."""
    low: float | None = None
    """95 % interval of the change, samples drawn anew, the same ones at both; None: there are none to draw."""
    high: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What all signals of a run say together."""

    run: str
    state: State
    """worse: a signal is, whatever the others do. Else as `rest`."""
    sentence: str
    """The verdict in a line or two: how many signals of each level are in which state."""
    deceptive: bool
    """The needle score is flat, while probabilistic or mechanistic signals improve: deceptive saturation."""
    signals: tuple[SignalVerdict, ...]
    alerts: tuple[Alert, ...]
    rest: State = "undecided"
    """Of the judged signals that are not worse. saturated: every one is. improving: at least one is. undecided: else."""
    worse: tuple[Fall, ...] = ()
    """Signals that fell, the not judged ones too, those that recover among them."""

    def to_json(self) -> str:
        """One JSON object; null is what is not known, "never" a forecast that is never reached."""
        return json.dumps(
            _plain({**asdict(self), "exit_code": self.exit_code}), indent=2, ensure_ascii=False, allow_nan=False
        )

    @property
    def exit_code(self) -> int:
        return EXIT_CODES["deceptive" if self.deceptive and self.state != "worse" else self.state]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "never" if value > 0 else None
    return value


def judge(run: Run, margins: Mapping[str, float] | None = None) -> Verdict:
    """Judge every signal of a run, and all of them together.

    margins: gain per +25 % tokens that is no longer worth them, by name of a signal, or of all that share the name
    before the bracket; the rest keep what their metric declares. Raises ValueError for a name or number that makes no sense.
    """
    measured = run_signals(run)
    signals = _judged(measured, margins or {})
    margin_of = _margins(signals, margins or {}, _nameable(measured))
    found = [_judge_signal(signal, run.lccp_from, margin_of[signal.name]) for signal in signals]
    ends = [each.tokens_to if each.settled_at_tokens is None else each.settled_at_tokens for each in found]
    found = [
        each if each.settled_at_tokens is None else replace(each, lead_tokens=max(ends) - each.settled_at_tokens)
        for each in found
    ]
    alerts = [alert for signal in signals for alert in _alerts(signal, run.lccp_from, margin_of[signal.name])]
    others = [signal for signal in measured if signal.name not in margin_of]
    unasked = [_fall(signal, run.lccp_from, signal.default_margin) for signal in others]
    worse = [fall for fall in (*(each.fall for each in found), *unasked) if fall is not None]
    states = [each.state for each in found if each.state != "worse"]
    rest: State = "improving" if "improving" in states else "undecided"
    if states and set(states) == {"saturated"}:
        rest = "saturated"
    state: State = rest if all(fall.recovering for fall in worse) else "worse"
    flat = next((each for each in found if each.signal == "niah_exact" and each.state == "saturated"), None)
    deceptive = flat is not None and any(s.state == "improving" and s.level != "behavioural" for s in found)
    sentence = _sentence(rest, found, flat if deceptive else None)
    alerts.sort(key=lambda alert: alert.tokens)
    return Verdict(run.name, state, sentence, deceptive, tuple(found), tuple(alerts), rest, tuple(worse))


def judged_signals(run: Run, margins: Mapping[str, float]) -> tuple[Signal, ...]:
    """The signals that the verdict asks about: of metrics that are declared as judged, and benchmarks with a margin."""
    return _judged(run_signals(run), margins)


def _judged(signals: Iterable[Signal], margins: Mapping[str, float]) -> tuple[Signal, ...]:
    return tuple(
        signal for signal in signals
        if signal.judged or (signal.benchmark and not margins.keys().isdisjoint((signal.name, _kind(signal.name))))
    )  # fmt: skip


def _nameable(signals: Iterable[Signal]) -> list[str]:
    """Signals that a margin may be given for."""
    return [signal.name for signal in signals if signal.judged or signal.benchmark]


def margins_of(runs: Sequence[Run], margins: Mapping[str, float]) -> list[dict[str, float]]:
    """Of margins for runs that need not measure the same: those of each run. Raises ValueError as `judge` does, for a
    name that no run has."""
    if not margins:
        return [{} for _ in runs]
    nameable = [_nameable(run_signals(run)) for run in runs]
    _margins((), margins, [name for each in nameable for name in each])
    names = [{name for each in own for name in (each, _kind(each))} for own in nameable]
    return [{name: gain for name, gain in margins.items() if name in known} for known in names]


def parse_margins(texts: Sequence[str]) -> dict[str, float]:
    """["answer_nll=0.02"] -> {"answer_nll": 0.02}. Raises ValueError in one line."""
    margins = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            margins[name] = float(number)
        except ValueError:
            raise ValueError(f"--margin {text}: expected SIGNAL=GAIN, such as answer_nll=0.02") from None
    return margins


def _margins(signals: Sequence[Signal], given: Mapping[str, float], nameable: Sequence[str]) -> dict[str, float]:
    names = list(dict.fromkeys(nameable))
    for name, margin in given.items():
        if name not in names and name not in map(_kind, names):
            raise ValueError(f"--margin {name}: no such signal; there are {', '.join(names) or 'none'}")
        if not (math.isfinite(margin) and margin > 0):
            raise ValueError(f"--margin {name}: expected a number over 0, got {margin}")
    return {
        signal.name: given.get(signal.name, given.get(_kind(signal.name), signal.default_margin)) for signal in signals
    }


def _kind(name: str) -> str:
    """What signals share before the bracket."""
    return name.split("[")[0]


@dataclass(frozen=True)
class _Series:
    """A signal on the LCCP's own tokens, turned so that rising is gaining."""

    tokens_k: np.ndarray
    gain_k: np.ndarray
    headroom_k: np.ndarray
    """How far it can still rise."""
    at_floor_k: np.ndarray
    sample_ks: np.ndarray | None
    """Turned too; None: there are too few to say anything."""
    noise_floor: float
    level_only: bool

    @property
    def samples(self) -> trend.Samples | None:
        return None if self.sample_ks is None else trend.samples_of(self.sample_ks[None])


def _series(signal: Signal, lccp_from: int, margin: float) -> _Series:
    value_k, sign = signal.value_k, signal.better
    worst, best = signal.bounds or (-np.inf, np.inf)
    sample_ks = sign * signal.sample_ks if signal.sample_ks is not None and signal.samples > 1 else None
    tokens_k = (signal.tokens_k - lccp_from).astype(float)
    return _Series(
        tokens_k, sign * value_k, np.abs(best - value_k), np.abs(value_k - worst) < margin, sample_ks,
        signal.resolution / math.sqrt(12), signal.turnover,
    )  # fmt: skip


def _judge_signal(signal: Signal, lccp_from: int, margin: float) -> SignalVerdict:
    whole, signal = signal, after_start(signal, lccp_from)
    series, count = _series(signal, lccp_from, margin), len(signal.tokens_k)
    saturated_rk, improving_rk, now = trend.follow(
        series.tokens_k, series.gain_k[None], margin, series.samples, noise_floor=series.noise_floor,
        level_only=series.level_only,
    )  # fmt: skip
    part, gain, low, high, common = slice(0, count), None, None, None, None
    state: State = "undecided"
    open_question = _Open("few checkpoints", trend.FIRST_LOOK, None)
    if now is not None:
        part, belief = now.part, now.belief
        gain = round(float(belief.value_r[0]), 12) + 0.0
        state = "saturated" if saturated_rk[0, -1] else "improving" if improving_rk[0, -1] else "undecided"
        share = max(now.chance_r[0], now.risk) if state == "saturated" else now.risk
        low, high = belief.quantile(trend.IMPROVING_LEVEL), belief.quantile(1 - share)
        high = min(high, float(series.headroom_k[-1]))
        low = min(low, high)
        common = None if belief.common_r is None else float(belief.common_r[0])
        open_question = _what_would_decide(series, now, margin, gain)
    why = _why(signal, state, margin, gain, low, high, open_question)
    settled = None if state == "improving" or signal.turnover else _settled(series, margin, lccp_from)
    last = value_text(signal.value_k[-1], signal.unit) if count else ""
    if count > 1 and (series.headroom_k[-2:] < margin).all():
        state, why = "saturated", f"at {last}, it has less than the margin left to gain"
    elif count and series.at_floor_k[part].all():
        state, why, settled = "undecided", f"at {last}, it has not begun to move", None
        open_question = _Open("not begun", None, None)
    fall = _fall(whole, lccp_from, margin, improving=state == "improving")
    if fall is not None and not fall.recovering:
        state, why, settled = "worse", fall.text, None
    undecided = state == "undecided"
    laws = () if signal.turnover else forecasts(series.tokens_k, series.gain_k, margin, lccp_from, series.sample_ks)
    return SignalVerdict(
        signal=signal.name, level=signal.level, state=state, unit=signal.unit, margin=margin, gain_per_25pct=gain,
        low=low, high=high, checkpoints=part.stop - part.start, samples=signal.samples,
        tokens_from=int(signal.tokens_k[part][0]) if count else 0, tokens_to=int(signal.tokens_k[-1]) if count else 0,
        law=laws[0].law if laws and math.isfinite(laws[0].error) else "none", forecasts=laws,
        settled_at_tokens=settled, lead_tokens=None, why=why, reason=open_question.reason if undecided else None,
        needs_checkpoints=open_question.checkpoints if undecided else None,
        needs_samples=open_question.samples if undecided else None, common_noise=common,
        top_share=_top_share(series, margin), fall=fall,
    )  # fmt: skip


@dataclass(frozen=True)
class _Open:
    """Why a question is open, and what would close it."""

    reason: Reason
    checkpoints: int | None
    samples: int | None


def _what_would_decide(series: _Series, now: trend.Interim, margin: float, gain: float) -> _Open:
    """Of a look that left it undecided. The gain has to be told from the margin over its present distance from it, and
    over half a margin if it is nearer than that."""
    belief, part, level = now.belief, now.part, trend.IMPROVING_LEVEL if gain > margin else now.risk
    apart = max(abs(gain - margin), margin / 2)
    samples, of_samples = None, series.samples
    if of_samples is not None:
        samples = trend.needed_samples(
            series.tokens_k[part], series.gain_k[None, part], of_samples.at(part), apart, level, margin,
            series.noise_floor, series.level_only,
        )  # fmt: skip
    checkpoints = trend.needed_checkpoints(series.tokens_k[part], belief, apart, level, series.level_only)
    if abs(gain - margin) < margin / 4 and trend.reach(belief, level) < margin / 2:
        return _Open("near the margin", None, None)
    if belief.of_samples_r is None:
        return _Open("no samples" if part.stop - part.start < FEW else "noise", checkpoints, None)
    mostly = samples is not None and 2 * belief.of_samples_r[0] >= belief.scale_r[0] ** 2
    return _Open("few samples" if mostly else "noise", checkpoints, samples)


def _why(signal: Signal, state: str, margin: float, gain, low, high, open_question: _Open) -> str:
    count, unit = len(signal.tokens_k), signal.unit
    against = f"the margin of {amount_text(margin, unit).removeprefix('+')}"
    bring = "replace, beyond noise," if signal.turnover else "bring"
    if gain is None:
        return f"{count_text(count, 'checkpoint')} after the start of the LCCP; it takes {trend.FIRST_LOOK} to say more"
    if state == "saturated":
        return f"+25 % tokens {bring} at most {amount_text(high, unit)}, under {against}"
    if state == "improving":
        return f"+25 % tokens {bring} at least {amount_text(low, unit)}, over {against}"
    return (
        f"+25 % tokens {bring} {amount_text(gain, unit)}, anything from {ends_text(low, high, unit)}; {against} is inside"
        f"{_needs_text(open_question)}"
    )


def _needs_text(needs: _Open) -> str:
    ways = []
    if needs.checkpoints is not None:
        ways.append(f"about {needs.checkpoints} checkpoints in a doubling of tokens")
    if needs.samples is not None and needs.samples <= PRACTICAL_SAMPLES:
        ways.append(f"about {about_text(needs.samples)} samples")
    elif needs.samples is not None and not ways:
        ways.append(f"more samples than is practical, about {about_text(needs.samples)}")
    if ways:
        return f" (it would take {', or '.join(ways)})"
    if needs.reason == "near the margin":
        return " (the gain is at the margin)"
    return " (its checkpoints move too much for more of them, or more samples, to decide: take a wider margin)"


def _top_share(series: _Series, margin: float) -> float | None:
    """Of the gain from the first checkpoint to the last two: the part of it that one sample holds."""
    if series.sample_ks is None or len(series.tokens_k) < 3:
        return None
    gain_s = series.sample_ks[-2:].mean(axis=0) - series.sample_ks[0]
    return float(gain_s.max() / gain_s.sum()) if gain_s.mean() > margin else None


def _fall(signal: Signal, lccp_from: int, margin: float, improving: bool = False) -> Fall | None:
    """What a signal lost since the start of the LCCP, or else since its best, measured paired over samples."""
    signal = after_start(signal, lccp_from - 1)
    if signal.turnover or not len(signal.tokens_k):
        return None
    series = _series(signal, lccp_from, margin)
    gain_rk = series.gain_k[None]
    settings: dict[str, Any] = dict(noise_floor=series.noise_floor, samples=series.samples)
    fallen = trend.fell(series.tokens_k, gain_rk, margin, **settings)
    if fallen is None or not (fallen.start_r[0] or fallen.best_r[0]):
        return None
    at = 0 if fallen.start_r[0] else int(fallen.best_at_r[0])
    belief = trend.change_belief(series.tokens_k, gain_rk, at, margin=margin, **settings)
    change, low = float(belief.value_r[0]), belief.quantile(0.025)
    high = belief.quantile(1 - fallen.risk / (1 if fallen.start_r[0] else fallen.candidates))
    since: Literal["start", "best"] = "start" if fallen.start_r[0] else "best"
    what = "the start of the LCCP" if since == "start" else f"its best at {tokens_text(signal.tokens_k[at])} tokens"
    paired = (
        f"{signal.samples} samples, the same at both" if series.sample_ks is not None else "noise of checkpoints alone"
    )
    lost = amount_text(-change, signal.unit).removeprefix("+")
    text = f"{signal.name} is worse than at {what}, by {lost} ({ends_text(-high, -low, signal.unit)}; {paired})"
    return Fall(
        signal=signal.name, level=signal.level, unit=signal.unit, since=since, change=change, low=low, high=high,
        margin=margin, samples=signal.samples, tokens_from=int(signal.tokens_k[at]),
        tokens_to=int(signal.tokens_k[-1]), recovering=improving, text=text,
    )  # fmt: skip


def _settled(series: _Series, margin: float, lccp_from: int) -> int | None:
    """Tokens, all stages, of the first checkpoint from which on it stayed within a margin, and twice the noise, of
    where a line through the last doubling ends; None if it has not held for +25 % tokens."""
    if len(series.tokens_k) < trend.MIN_WINDOW:
        return None
    part = trend.window(series.tokens_k)
    design = np.stack([np.ones(part.stop - part.start), np.log(series.tokens_k[part])], axis=1)
    beta = np.linalg.lstsq(design, series.gain_k[part], rcond=None)[0]
    noise = math.sqrt(np.square(series.gain_k[part] - design @ beta).sum() / (len(design) - 2))
    end = design[-1] @ beta
    outside = np.flatnonzero(np.abs(series.gain_k - end) > margin + 2 * noise)
    first = 0 if not len(outside) else int(outside[-1]) + 1
    if first >= len(series.tokens_k) or series.tokens_k[first] * HELD > series.tokens_k[-1]:
        return None
    return int(series.tokens_k[first]) + lccp_from


def _alerts(signal: Signal, lccp_from: int, margin: float) -> Iterator[Alert]:
    """Where a signal is not finite, or fell back by more than a margin and noise."""
    for tokens, value in zip(signal.tokens_k, signal.value_k, strict=True):
        if not np.isfinite(value):
            yield Alert(signal.name, int(tokens), f"{signal.name} is {value} at {tokens_text(tokens)} tokens")
    signal = after_start(signal, lccp_from)
    if signal.turnover:
        return
    series = _series(signal, lccp_from, margin)
    fall_k = trend.falls(series.tokens_k, series.gain_k[None], margin, series.noise_floor)[0]
    for k in np.flatnonzero(fall_k):
        change = float(signal.value_k[k] - signal.value_k[k - 1])
        low, high, over = None, None, "no samples to draw anew"
        if signal.sample_ks is not None and signal.samples > 1:
            low, high = map(float, interval(signal.sample_ks[k] - signal.sample_ks[k - 1]))
            over = f"{ends_text(low, high, signal.unit)} over {signal.samples} samples"
        text = (
            f"{signal.name} fell back at {tokens_text(signal.tokens_k[k])} tokens, from "
            f"{value_text(signal.value_k[k - 1], signal.unit)} to {value_text(signal.value_k[k], signal.unit)} "
            f"({amount_text(change, signal.unit)}, {over}): by more than its margin of "
            f"{amount_text(margin, signal.unit).removeprefix('+')} and the noise before"
        )
        yield Alert(signal.name, int(signal.tokens_k[k]), text, change, low, high)


def _by_level(found: Sequence[SignalVerdict], state: str) -> Iterator[str]:
    """The signals in a state, level by level: one by its name, several as "3 of 5 probabilistic signals"."""
    for level in get_args(Level):
        of_level = [each for each in found if each.level == level]
        names = [each.signal for each in of_level if each.state == state]
        if len(names) == 1:
            yield names[0]
        elif names:
            share = "all" if len(names) == len(of_level) else f"{len(names)} of"
            yield f"{share} {len(of_level)} {level} signals"


def _sentence(state: str, found: Sequence[SignalVerdict], flat: SignalVerdict | None) -> str:
    if not found:
        return "Undecided: the run has no rows of a signal that could saturate."
    words = {"improving": "Still improving", "saturated": "Saturated", "undecided": "Undecided", "worse": "Worse"}
    counted = {name: ", ".join(_by_level(found, name)) for name in sorted(words, key=lambda name: name != state)}
    sentence = " ".join(f"{words[name]}: {text}." for name, text in counted.items() if text)
    if flat is not None:
        since = f"since {tokens_text(flat.settled_at_tokens)} tokens " if flat.settled_at_tokens is not None else ""
        sentence += f" Deceptive saturation: niah_exact has been flat {since}while others improve."
    return sentence
