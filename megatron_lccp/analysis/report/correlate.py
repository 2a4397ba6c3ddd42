"""Correlations by hand: r and n as a paper prints them, or the columns of a CSV.

In: numbers, or a file. Out: lines with r, n, p, the 95 % interval of r, and, where tokens are known, its noise floor
(statistics/correlations.py). p is two-sided, Student's t with n - 2 degrees of freedom; the interval is Fisher's z.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from megatron_lccp.analysis.statistics.correlations import noise_floor
from megatron_lccp.analysis.statistics.stats import Correlation, pearson, pearson_of

TOKENS = "tokens"
"""Column of a CSV that says at which training tokens a line was measured."""


def of_numbers(given_r: Sequence[float], n: int) -> list[dict[str, Any]]:
    """A line for each r over n pairs. Raises ValueError for numbers that no correlation has."""
    if n < 3:
        raise ValueError(f"--n: should be at least 3 pairs, is {n}")
    if wrong := [r for r in given_r if not -1 <= r <= 1]:
        raise ValueError(f"--r: should be from -1 to 1, is {wrong[0]:g}")
    return [_line(pearson_of(r, n), math.nan) for r in given_r]


def of_file(path: str | Path, x: Sequence[str] = (), y: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A line for each pair of columns of a CSV: those of `x` with those of `y`, each with every other by default.

    A pair without one of its numbers is left out. Raises ValueError in one line with file and column.
    """
    table = _read(path)
    names = [name for name in table if name != TOKENS]
    for option, wanted in (("--x", x), ("--y", y)):
        if strange := [name for name in wanted if name not in names]:
            raise ValueError(f"{option}: {path} has no column {strange[0]!r}; there are {', '.join(names) or 'none'}")
    left, right = x or names, y or names
    pairs = [(a, b) for a, b in itertools.product(left, right) if a != b]
    pairs = list({frozenset(pair): pair for pair in reversed(pairs)}.values())[::-1]
    if not pairs:
        raise ValueError(f"{path}: needs two columns of numbers besides {TOKENS}, has {', '.join(names) or 'none'}")
    used = list(dict.fromkeys(name for pair in pairs for name in pair))
    numbers = {name: _numbers(path, table, name) for name in used}
    tokens_k = _numbers(path, table, TOKENS) if TOKENS in table else None
    found = []
    for a, b in pairs:
        floor = math.nan
        if tokens_k is not None:
            order_k = np.argsort(tokens_k, kind="stable")
            if np.isnan(tokens_k).any() or (np.diff(tokens_k[order_k]) <= 0).any():
                raise ValueError(f"{path}: {TOKENS}: should be a number of its own in every line; leave the column out")
            floor = noise_floor(tokens_k[order_k], numbers[a][order_k], numbers[b][order_k])
        found.append({"x": a, "y": b, **_line(pearson(numbers[a], numbers[b]), floor)})
    return found


def _read(path: str | Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, skipinitialspace=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file ({str(error).splitlines()[0]})") from error


def _numbers(path: str | Path, table: pd.DataFrame, name: str) -> np.ndarray:
    number_k = pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=float)
    wrong_k = np.flatnonzero(np.isnan(number_k) & table[name].notna().to_numpy())
    if len(wrong_k):
        line = int(wrong_k[0])
        raise ValueError(
            f"{path}:{line + 2}: {name} is no number but {table[name].iloc[line]!r}; choose columns by --x and --y"
        )
    return number_k


def _line(found: Correlation, floor: float) -> dict[str, Any]:
    return {"r": found.r, "n": found.n, "p": found.p, "low": found.low, "high": found.high, "floor": floor}


def as_text(lines: Sequence[dict[str, Any]]) -> str:
    """A table for a terminal."""
    named, floors = "x" in lines[0], any(not math.isnan(line["floor"]) for line in lines)
    table = [(*(("x", "y") if named else ()), "r", "n", "p", "95 % interval", *(("noise floor",) if floors else ()))]
    for line in lines:
        known = not math.isnan(line["low"])
        ends = f"{line['low']:+.4f} to {line['high']:+.4f}" if known else "takes more than 3 pairs"
        table.append((
            *((line["x"], line["y"]) if named else ()), _number(line["r"], "+.4f"), str(line["n"]),
            "<0.0001" if line["p"] < 5e-5 else _number(line["p"], ".4f"), ends if not math.isnan(line["r"]) else "-",
            *((_number(line["floor"], ".4f"),) if floors else ()),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def as_json(lines: Sequence[dict[str, Any]]) -> str:
    """A list of objects; null is what is not defined."""
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in line.items()} for line in lines]
    return json.dumps(plain, indent=1, ensure_ascii=False)


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
