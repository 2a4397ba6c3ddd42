"""What to do about a verdict: go on, stopping is safe, or it cannot be told yet; and what going on costs and brings.

In: a Run, judged. Out: one Advice, whose sentence opens the verdict and the report. Nothing stops by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from megatron_lccp.analysis.absent import Absent, absent_rows
from megatron_lccp.analysis.ahead import Ahead, ahead_of
from megatron_lccp.analysis.cost import Price, Unpriced, cost_text, measured_price, planned_price
from megatron_lccp.analysis.measured.signal import after_start
from megatron_lccp.analysis.run import Run
from megatron_lccp.analysis.verdict.judge import PRACTICAL_SAMPLES, Fall, SignalVerdict, Verdict, judged_signals
from megatron_lccp.text import about_text, amount_text, count_text, ends_text, span_text, tokens_text

Do = Literal["go on", "stop is safe", "cannot tell"]
QUARTER = 0.25
"""The share of the LCCP's tokens that every gain is given for."""
NAMED = 3
"""Signals that a sentence names before it counts the rest."""


@dataclass(frozen=True)
class Advice:
    """What to do, and what it costs."""

    do: Do
    sentence: str
    """One or a few sentences that a reader can act on."""
    quarter_tokens: int
    """+25 % tokens: a quarter of those of the LCCP so far."""
    price: Price | Unpriced
    """What tokens cost from here."""
    absent: tuple[Absent, ...]
    """What monitors could not give."""
    ahead: Ahead | None
    """What the configuration still plans; None: it was not kept."""
    now_tokens: int
    """Training tokens, all stages, at the last checkpoint."""
    alone: bool
    """One measurement is all there is: it has figures, and no changes."""
    checkpoints: Mapping[str, int]
    """Signal -> checkpoints after the start of the LCCP; its interval rests on the last of these."""

    @property
    def quarter_gpu_hours(self) -> float | None:
        """GPU-hours of +25 % tokens; None: not known, and `price` says why."""
        return self.price.gpu_hours(self.quarter_tokens) if isinstance(self.price, Price) else None

    def gpu_hours_to(self, tokens: float) -> float | None:
        """GPU-hours from here to a number of training tokens; None: not known, or it is never reached."""
        if not isinstance(self.price, Price) or not math.isfinite(tokens) or tokens <= self.now_tokens:
            return None
        return self.price.gpu_hours(tokens - self.now_tokens)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "do": self.do, "sentence": self.sentence, "quarter_tokens": self.quarter_tokens,
            "quarter_gpu_hours": self.quarter_gpu_hours,
            "gpu_hours_from": self.price.how if isinstance(self.price, Price) else None,
            "why_no_gpu_hours": self.price.why if isinstance(self.price, Unpriced) else None,
            "still_to_come": None if self.ahead is None else asdict(self.ahead),
            "absent": [asdict(each) for each in self.absent],
        }  # fmt: skip


def advise(run: Run, verdict: Verdict, plan: str | Path | None = None, ranks: int | None = None) -> Advice:
    """The advice on a run. `plan`: what `lccp plan --json` printed, for the costs; else they are as measured, on `ranks`
    where steps do not say theirs. Raises ValueError in one line for a plan that cannot be read."""
    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks: should be at least 1, is {ranks}")
    spans = run.spans["stage"]
    price: Price | Unpriced
    price = (
        measured_price(run, ranks) if plan is None else planned_price(plan, str(spans.iloc[-1]) if len(spans) else "")
    )
    frames = [run.rows, run.steps] if len(run.rows) else [run.scores]
    now = int(max((frame["tokens"].max() for frame in frames if frame is not None and len(frame)), default=0))
    quarter = round(QUARTER * max(0, now - run.lccp_from))
    ahead = ahead_of(run)
    points = [frame["tokens"] for frame in (run.rows, run.scores) if frame is not None and len(frame)]
    alone = bool(points) and pd.concat(points).nunique() == 1
    do, sentence = _sentence(verdict, quarter, price, ahead)
    if alone and verdict.signals:
        do, sentence = "cannot tell", _alone_text(verdict, now)
    named = {each.signal: each.margin for each in verdict.signals}
    counts = {each.name: len(after_start(each, run.lccp_from).tokens_k) for each in judged_signals(run, named)}
    return Advice(do, sentence, quarter, price, tuple(absent_rows(run)), ahead, now, alone, counts)


def _sentence(verdict: Verdict, quarter: int, price: Price | Unpriced, ahead: Ahead | None) -> tuple[Do, str]:
    """What to do, and the words for it. What got worse stands behind it: whether that is a reason to stop, or the price
    of a longer context, is for the reader to weigh."""
    do, text = _about_the_rest(verdict, quarter, price, ahead)
    return do, " ".join([text, *_worse_text(verdict.worse)])


def _about_the_rest(verdict: Verdict, quarter: int, price: Price | Unpriced, ahead: Ahead | None) -> tuple[Do, str]:
    """The advice by the signals that are not worse."""
    found = [each for each in verdict.signals if each.state != "worse"]
    improving = [each for each in found if each.state == "improving"]
    if not verdict.signals:
        return "cannot tell", (
            "Cannot tell: nothing was measured that could saturate. Name monitors with judged metrics, or give benchmark "
            "scores with --scores and --margin."
        )
    if not found:
        return "cannot tell", "Look first: nothing that was measured still gains."
    if improving:
        improving.sort(key=lambda each: -(each.low or 0) / each.margin)
        costs = f", {cost_text(price.gpu_hours(quarter))}" if isinstance(price, Price) else ""
        text = (
            f"Go on: +25 % tokens ({tokens_text(quarter)}{costs}) still bring more than a margin to "
            f"{_named(improving, gains=True)}."
        )
        if verdict.deceptive:
            text += " The needle score stands still meanwhile: that is no convergence (deceptive saturation)."
        return "go on", text
    flat = [each for each in found if each.state == "saturated"]
    if len(flat) == len(found):
        span = span_text(min(each.tokens_from for each in found), max(each.tokens_to for each in found))
        which, verb = ("the only signal", "is") if len(found) == 1 else (f"all {len(found)} signals", "are")
        which += " that did not fall" * (len(found) < len(verdict.signals))
        text = f"Safe to stop: {which} {verb} flat over these tokens ({span}). What begins later is not seen."
        return "stop is safe", text + _decay_text(ahead)
    return "cannot tell", f"Cannot tell yet: {_counted(len(found), len(flat))}. {_measure_this(found)}"


def _alone_text(verdict: Verdict, now: int) -> str:
    needs = [each.needs_checkpoints for each in verdict.signals if each.needs_checkpoints]
    count = f"{max(needs)} of them" if needs else "more of them"
    return (
        f"One measurement, at {tokens_text(now)} tokens: it says where the model stands. A change takes two checkpoints, a "
        f"verdict {count} after the start of the LCCP."
    )


def _named(signals: Sequence[SignalVerdict], gains: bool = False) -> str:
    """answer_nll (+0.042 nat, 0.031 to 0.053), niah_exact and 2 other signals."""
    names = []
    for number, each in enumerate(signals[:NAMED]):
        gain = f" ({gain_text(each)})" if gains and number == 0 else ""
        names.append(f"{each.signal}{gain}")
    if more := len(signals) - len(names):
        names.append(count_text(more, "other signal"))
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def gain_text(signal: SignalVerdict) -> str:
    """+4.2 points, 3.1 to 5.3: the gain of +25 % tokens, and its interval; a dash with too few checkpoints."""
    if signal.gain_per_25pct is None or signal.low is None or signal.high is None:
        return "-"
    return f"{amount_text(signal.gain_per_25pct, signal.unit)}, {ends_text(signal.low, signal.high, signal.unit)}"


def _counted(count: int, flat: int) -> str:
    if not flat:
        return "the only signal is undecided" if count == 1 else f"all {count} signals are undecided"
    return f"of {count} signals {flat} {'is' if flat == 1 else 'are'} flat, {count - flat} undecided"


def _measure_this(found: Sequence[SignalVerdict]) -> str:
    """What would decide the signals that are open: checkpoints, samples, or nothing that can be measured."""
    undecided = [each for each in found if each.state == "undecided"]
    parts = []
    early = [each for each in undecided if each.reason == "few checkpoints" or each.gain_per_25pct is None]
    if early:
        need = max(each.needs_checkpoints or 0 for each in early) or "more"
        parts.append(f"{need} checkpoints after the start of the LCCP, for {_named(early)}")
    later = [each for each in undecided if each not in early]
    by_samples = [each for each in later if each.needs_samples and each.needs_samples <= PRACTICAL_SAMPLES]
    by_checkpoints = [each for each in later if each.needs_checkpoints and each not in by_samples]
    if by_samples:
        need = max(each.needs_samples or 0 for each in by_samples)
        parts.append(f"{about_text(need)} samples at each checkpoint, for {_named(by_samples)}")
    if by_checkpoints:
        need = max(each.needs_checkpoints or 0 for each in by_checkpoints)
        parts.append(f"{need:,} checkpoints within the last doubling of the tokens, for {_named(by_checkpoints)}")
    text = f"Measure this: {'; '.join(parts)}." if parts else ""
    asleep = [each for each in later if each.reason == "not begun"]
    rest = [each for each in later if each not in (*by_samples, *by_checkpoints, *asleep)]
    many = [each for each in rest if each.needs_samples]
    loud = [each for each in rest if each.reason in ("noise", "no samples") and each not in many]
    near = [each for each in rest if each not in (*many, *loud)]
    if asleep:
        text += f" Not begun to move: {_named(asleep)}."
    if many:
        need = max(each.needs_samples or 0 for each in many)
        text += f" Deciding {_named(many)} takes more samples than is practical (about {about_text(need)}): widen the margin."
    if loud:
        text += f" No number of checkpoints decides {_named(loud)}: they move too much; widen the margin."
    if near:
        text += f" No sensible number decides {_named(near)}: the gain is too near the margin; set another margin."
    return text.strip()


def _worse_text(falls: Sequence[Fall]) -> list[str]:
    """A sentence on what fell, the judged and the not judged."""
    if not falls:
        return []
    parts = []
    for fall in falls[:NAMED]:
        since = (
            "the start of the LCCP" if fall.since == "start" else f"its best at {tokens_text(fall.tokens_from)} tokens"
        )
        low, high = (amount_text(-end, fall.unit).lstrip("+").split()[0] for end in (fall.high, fall.low))
        lost = amount_text(-fall.change, fall.unit).lstrip("+")
        parts.append(f"{fall.signal} by {lost} ({low} to {high}) since {since}" + ", recovering" * fall.recovering)
    more = f" and {count_text(len(falls) - NAMED, 'other signal')}" if len(falls) > NAMED else ""
    return [f"Weigh what got worse beyond noise: {'; '.join(parts)}{more}."]


def _decay_text(ahead: Ahead | None) -> str:
    if ahead is None:
        return ""
    if ahead.decay:
        return (
            f" A decay of the learning rate is still to come ({ahead.decay}) and will move them: judge again after it."
        )
    if ahead.stages:
        return f" Stages are still to come ({', '.join(ahead.stages)}) and may move them: judge again in them."
    return ""
