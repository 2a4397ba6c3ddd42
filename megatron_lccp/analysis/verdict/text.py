"""A verdict as lines for a terminal, and as JSON: what to do first, then what it rests on.

In: Verdict, Advice. Out: text.
"""

from __future__ import annotations

import json
import math

from megatron_lccp.analysis.cost import Unpriced, cost_text
from megatron_lccp.analysis.statistics.laws import Forecast
from megatron_lccp.analysis.verdict.advice import Advice, gain_text
from megatron_lccp.analysis.verdict.judge import SignalVerdict, Verdict
from megatron_lccp.text import amount_text, count_text, hours_text, span_text, tokens_text

HEAD = ("signal", "state", "+25 % tokens bring", "margin", "GPU-hours", "gain falls under the margin")
FAR = 10
"""Times the tokens of the run: later than that, a forecast is given as no number."""


def verdict_json(verdict: Verdict, advice: Advice) -> str:
    """One JSON object: the verdict's, with `advice`; null is what is not known."""
    return json.dumps({**json.loads(verdict.to_json()), "advice": advice.as_dict()}, indent=2, ensure_ascii=False)


def verdict_text(verdict: Verdict, advice: Advice) -> str:
    """What to do, the verdict, a line per signal, what each rests on, and what to know besides."""
    table = [HEAD, *(_line(signal, advice) for signal in verdict.signals)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEAD))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table]
    reasons = [f"{signal.signal}: {_rests_on(signal, advice)}." for signal in verdict.signals]
    besides = [f"ALERT {alert.text}." for alert in verdict.alerts]
    besides += [f"WORSE {fall.text.rstrip('.')}." for fall in verdict.worse]
    besides += [f"NOT MEASURED {each.text}." for each in advice.absent]
    parts = [[f"{verdict.run}: {advice.sentence}"], [] if advice.alone else [verdict.sentence]]
    if verdict.signals and not advice.alone:
        told = any(signal.gain_per_25pct is not None for signal in verdict.signals)
        parts += [lines, [reading_text(advice)] if told else [], reasons]
    return "\n\n".join("\n".join(part) for part in [*parts, besides] if part)


def reading_text(advice: Advice) -> str:
    """How the table is read: which tokens, which interval, which GPU-hours."""
    hours = "GPU-hours are not known" + (f": {advice.price.why}" if isinstance(advice.price, Unpriced) else "")
    if not isinstance(advice.price, Unpriced):
        hours = f"GPU-hours are {advice.price.how}"
    return (
        f"+25 % tokens are {tokens_text(advice.quarter_tokens)}, a quarter of the LCCP so far. In brackets is the interval "
        "of their gain, over samples and checkpoints: it is under the first number with a chance of 5 %, and over the "
        "second with the chance that this look may be wrong, for the verdict looks again after every checkpoint (all looks "
        "together about 5 %; up to 10 % where it stays saturated). The checkpoints are those of the last "
        f"doubling of the LCCP's tokens, or of the last two: what was before says little of the end. {hours}."
    )


def forecast_text(forecast: Forecast, now: int, advice: Advice | None = None) -> str:
    """When a law brings the gain under the margin: "at 2.3B (now to never), plateau law, 310 GPU-hours from here"."""
    when, low, high = (when_text(tokens, now) for tokens in (forecast.tokens, forecast.low, forecast.high))
    if (low, high) == ("now", "never"):
        return "cannot be told from these checkpoints"
    ends = f" ({low} to {high})" if (low, high) != (when, when) else ""
    hours = None if advice is None or forecast.tokens > FAR * now else advice.gpu_hours_to(forecast.tokens)
    costs = f", {cost_text(hours)} from here" if hours is not None else ""
    words = {"now": "already", "never": "never"}
    return f"{words.get(when, f'at {when}' if when[0].isdigit() else when)}{ends}, {forecast.law} law{costs}"


def when_text(tokens: float, now: int) -> str:
    """Training tokens of a forecast made at `now`: 2.3B, now, never, or only that they are too far off to be told."""
    if not math.isfinite(tokens):
        return "never"
    if tokens > FAR * now:
        return f"beyond {FAR}x the run"
    return "now" if tokens <= now else tokens_text(tokens)


def interval_text(signal: SignalVerdict) -> str:
    """+4.2 points (+3.1 to +5.3); a dash with too few checkpoints."""
    gain, _, ends = gain_text(signal).partition(", ")
    return f"{gain} ({ends})" if ends else gain


def margin_text(signal: SignalVerdict) -> str:
    """0.5 points."""
    return amount_text(signal.margin, signal.unit).lstrip("+")


def _line(signal: SignalVerdict, advice: Advice) -> tuple[str, ...]:
    hours = advice.quarter_gpu_hours
    forecast = forecast_text(signal.forecasts[0], signal.tokens_to, advice) if signal.forecasts else "-"
    return (
        signal.signal, signal.state, interval_text(signal), margin_text(signal),
        "-" if hours is None else hours_text(hours), forecast,
    )  # fmt: skip


def _rests_on(signal: SignalVerdict, advice: Advice) -> str:
    """The state in words, the checkpoints and samples behind it, since when it stands still."""
    measured = advice.checkpoints.get(signal.signal, signal.checkpoints)
    count = count_text(signal.checkpoints, "checkpoint")
    if measured > signal.checkpoints:
        count = f"the last {signal.checkpoints} of {measured} checkpoints"
    samples = count_text(signal.samples, "sample") if signal.samples else "noise of checkpoints alone"
    parts = [signal.why, f"{count}, {span_text(signal.tokens_from, signal.tokens_to)} tokens, {samples}"]
    if signal.settled_at_tokens is not None:
        lead = f", {tokens_text(signal.lead_tokens)} earlier than the slowest" if signal.lead_tokens else ""
        parts.append(f"it has stood still since {tokens_text(signal.settled_at_tokens)}{lead}")
    if signal.top_share is not None and signal.top_share > 0.5 and signal.samples > 2:
        held = f"{100 * signal.top_share:.0f} % of the gain"
        if signal.top_share > 1:
            held = "the whole gain, and the others together lost"
        parts.append(f"the largest of {signal.samples} samples holds {held}")
    return "; ".join(parts)
