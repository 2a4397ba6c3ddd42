"""Numbers as people write them.

In: plain numbers. Out: text, the same in figures, tables, pages and on a terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np


def duration_text(seconds: float) -> str:
    """2 h 05 min, 3 min 20 s, 12.5 s; as `number_text` where it is not finite."""
    if not np.isfinite(seconds):
        return number_text(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def token_unit(largest: float) -> tuple[float, str]:
    """The divisor and the letter in which token counts up to `largest` read best: (1e9, "B")."""
    return next(
        ((size, name) for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")) if largest >= size), (1, "")
    )


def tokens_text(tokens: float) -> str:
    """1.5B, 20M, 65.5K, 12: training tokens with three digits."""
    size, unit = token_unit(tokens)
    return f"{tokens / size:.3g}{unit}"


def span_text(low: float, high: float) -> str:
    """12M to 24M; 508K where both ends read the same: from one count of training tokens to another."""
    return " to ".join(dict.fromkeys(map(tokens_text, (low, high))))


def count_text(count: int, noun: str) -> str:
    """1 checkpoint, 2 checkpoints."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def ranges_text(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"; in ascending order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def about_text(count: int) -> str:
    """Two digits, rounded up, of a count that is an estimate: 37, 1,300 for 1,204, 10,000 for 9,913."""
    step = 10 ** max(0, len(str(count)) - 2)
    return f"{-(-count // step) * step:,}"


def time_text(seconds: float) -> str:
    """Three digits, in the largest unit of which it is at least one: 3.66 days, 1.95 min, 26.5 s, 410 ms."""
    units = (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3))
    name, unit_s = next((unit for unit in units if seconds >= unit[1]), units[-1])
    return f"{digits_text(seconds / unit_s)} {name}"


def digits_text(number: float) -> str:
    """Three digits, or as many as stand before the point: 0.41, 26.5, 22,474; <0.01 for less."""
    if 0 < number < 0.01:
        return "<0.01"
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def length_text(length_tok: float) -> str:
    """Tokens of a sequence: 64K for 65536 (K is 1024 there, as everywhere in context lengths), 1000 for 1000."""
    length_tok = int(length_tok)
    return f"{length_tok // 1024}K" if length_tok >= 1024 and length_tok % 1024 == 0 else str(length_tok)


def number_text(value: float) -> str:
    """Three digits in little room, for cells: 1.04, 23.1, 118, 4.1k; – where it is missing."""
    if value is None or not np.isfinite(value):
        return "–" if value is None or np.isnan(value) else "∞"
    power = 0
    while abs(value) >= 999.5 and power < 4:
        value, power = value / 1000, power + 1
    if power:
        return (f"{value:.1f}" if abs(value) < 9.95 else f"{value:.0f}") + "kMBT"[power - 1]
    if abs(value) < 0.005:
        return "0.00"  # not -0.00
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def path_text(text: str) -> str:
    """Letters, digits, dots and dashes: a slash would open another section in W&B."""
    return re.sub(r"[^\w.-]+", "_", str(text)).strip("_")


def hours_text(hours: float) -> str:
    """0.0031, 0.52, 12, 5,300: two digits, none of them a power of ten."""
    if not np.isfinite(hours) or hours <= 0:
        return "0" if hours == 0 else "–"
    digits = max(0, 1 - int(np.floor(np.log10(hours))))
    rounded = round(hours, 1 - int(np.floor(np.log10(hours))))
    return f"{rounded:,.{digits}f}"


def value_text(value: float, unit: str) -> str:
    """A measured number with its unit: 28 %, 0.71 nat, 2 heads; a share is a percentage."""
    if unit == "share":
        return f"{100 * value:.3g} %"
    return f"{value:.4g} {unit}".rstrip()


def amount_text(gain: float, unit: str) -> str:
    """A difference with its sign: +2.1 points for 0.021 of a share, -0.042 nat; two digits."""
    if unit == "share":
        gain, unit = 100 * gain, "points"
    gain += 0.0  # of -0.0 it makes 0.0
    size = abs(gain)
    text = f"{gain:+,.0f}" if size >= 99.5 else f"{gain:+.2g}" if size >= 1e-4 or size == 0 else f"{gain:+.1e}"
    if text[1:] == "1" and unit in ("points", "heads"):
        unit = unit.removesuffix("s")
    return f"{text} {unit}".rstrip()


def ends_text(low: float, high: float, unit: str) -> str:
    """The ends of an interval, in the unit that `amount_text` gives it: +3.1 to +5.3."""
    return " to ".join(amount_text(end, unit).split()[0] for end in (low, high))
