"""A verdict as lines for a terminal.

In: Verdict. Out: text. The same in numbers is Verdict.to_json.
"""

from __future__ import annotations

import math

from megatron_lccp.analysis.statistics.laws import Forecast
from megatron_lccp.analysis.text import count_text, span_text, tokens_text
from megatron_lccp.analysis.verdict.judge import SignalVerdict, Verdict

HEAD = ("signal", "state", "gain per +25 % tokens", "margin", "settled at", "under the margin from")
FAR = 10
"""Times the tokens of the run: later than that, a forecast is given as no number."""


def verdict_text(verdict: Verdict) -> str:
    """The sentence, a line per signal, what each rests on, and the alerts."""
    table = [HEAD, *(_line(signal) for signal in verdict.signals)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEAD))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table]
    reasons = [f"{signal.signal}: {signal.why}; {_rests_on(signal)}." for signal in verdict.signals]
    alerts = [f"ALERT {alert.text}." for alert in verdict.alerts]
    parts = [[f"{verdict.run}: {verdict.sentence}"], lines if verdict.signals else [], reasons, alerts]
    return "\n\n".join("\n".join(part) for part in parts if part)


def forecast_text(forecast: Forecast, tokens_to: int) -> str:
    """When a law brings the gain under the margin: "2.3B (now to never), plateau law"."""
    when, low, high = (when_text(tokens, tokens_to) for tokens in (forecast.tokens, forecast.low, forecast.high))
    ends = f" ({low} to {high})" if (low, high) != (when, when) else ""
    return f"{when}{ends}, {forecast.law} law"


def when_text(tokens: float, now: int) -> str:
    """Training tokens of a forecast made at `now`: 2.3B, now, never, or only that they are too far off to be told."""
    if not math.isfinite(tokens):
        return "never"
    if tokens > FAR * now:
        return f"beyond {FAR}x the run"
    return "now" if tokens <= now else tokens_text(tokens)


def _line(signal: SignalVerdict) -> tuple[str, ...]:
    gain = "-"
    if signal.gain_per_25pct is not None:
        gain = f"{signal.gain_per_25pct:.3g} ({signal.low:.3g} to {signal.high:.3g}) {signal.unit}"
    settled = "-" if signal.settled_at_tokens is None else tokens_text(signal.settled_at_tokens)
    settled += f" ({tokens_text(signal.lead_tokens)} before the slowest)" if signal.lead_tokens else ""
    forecast = forecast_text(signal.forecasts[0], signal.tokens_to) if signal.forecasts else "-"
    return signal.signal, signal.state, gain, f"{signal.margin:g}", settled, forecast


def _rests_on(signal: SignalVerdict) -> str:
    samples = count_text(signal.samples, "sample") if signal.samples else "noise of checkpoints alone"
    ends = f"{span_text(signal.tokens_from, signal.tokens_to)} tokens"
    return f"{count_text(signal.checkpoints, 'checkpoint')}, {ends}, {samples}"
