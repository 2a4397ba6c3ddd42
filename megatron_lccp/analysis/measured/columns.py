"""Tables of the page: columns, and a frame as HTML.

In: frames. Out: HTML in which everything that came from data is escaped; a frame without lines gives no table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from megatron_lccp.text import length_text, number_text, tokens_text


def number_cell(value: float) -> str:
    return f"{value:.4g}"


def share_cell(value: float) -> str:
    return f"{100 * value:.1f} %"


def count_cell(value: float) -> str:
    return f"{int(value):,}" if np.isfinite(value) else number_text(value)


@dataclass(frozen=True)
class Column:
    """A column of a table: what it is called, which column of the frame it shows, and how."""

    heading: str
    name: str
    text: Callable[[Any], str] = str
    css: str = ""
    optional: bool = False
    """Whether it is left out where it has no value at all."""


def _cell(column: Column, value: Any) -> str:
    text = "" if value is None or value is pd.NA or value != value else column.text(value)
    css = f"tone {text}" if column.css == "tone" else column.css
    html = escape(text)
    if "name" in column.css.split():  # a long name of a signal may break here
        html = re.sub(r"(?<=[_.])|(?=\[)|(?<=[a-z])(?=[A-Z])", "<wbr>", html)
    return f'<td class="{escape(css)}">{html}</td>'


def _table(frame: pd.DataFrame, columns: Sequence[Column], note: str = "") -> str:
    columns = [c for c in columns if c.name in frame and not (c.optional and frame[c.name].isna().all())]
    head = "".join(
        f'<th class="{column.css.replace("tone", "text")}" scope="col">{escape(column.heading)}</th>'
        for column in columns
    )
    values = [[_cell(column, value) for value in frame[column.name]] for column in columns]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in zip(*values, strict=True))
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def table(
    key: str, title: str, frame: pd.DataFrame, columns: Sequence[Column], note: str = "", open: bool = False
) -> str:
    """A collapsible table of a frame; empty cells for what is missing, nothing at all for an empty frame."""
    if not len(frame):
        return ""
    html = _table(frame, columns, note)
    return details(key, title, html, f"{len(frame):,} rows" if len(frame) > 1 else "1 row", open)


def shown_table(key: str, title: str, frame: pd.DataFrame, columns: Sequence[Column], note: str) -> str:
    """A table that stands in the open, with a caption; nothing at all for an empty frame."""
    if not len(frame):
        return ""
    html = f'<div class="scroll">{_table(frame, columns)}</div><p class="note">{escape(note)}</p>'
    return f'<div class="open" id="{key}"><h3>{escape(title)}</h3>{html}</div>'


def details(key: str, title: str, html: str, count: str = "", open: bool = False) -> str:
    """A collapsible block around HTML."""
    summary = f'{escape(title)} <span class="count">{escape(count)}</span>'
    start = f'<details id="{key}"{" open" if open else ""}><summary>{summary}</summary>'
    return f'{start}<div class="scroll">{html}</div></details>'


def whole_column(heading: str, name: str) -> Column:
    return Column(heading, name, lambda value: f"{int(value):,}")


def three_digits(value: float) -> str:
    return f"{value:.3f}"


def with_interval(frame: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """`interval` as text, from the columns low and high."""
    if not len(frame):
        return frame
    pairs = zip(frame["low"], frame["high"], strict=True)
    known = [(low, high) if pd.notna(low) and pd.notna(high) else None for low, high in pairs]
    return frame.assign(interval=["–" if k is None else f"[{k[0]:.{digits}g}, {k[1]:.{digits}g}]" for k in known])


STAGE, MONITOR = Column("stage", "stage", css="text"), Column("monitor", "monitor", css="text")
WHERE = (Column("tokens", "tokens", tokens_text), Column("step", "step", count_cell), STAGE)
LENGTH, DEPTH = Column("length", "length_tok", length_text), Column("depth", "depth_cell", share_cell)
VALUES = (
    Column("mean_ppl", "mean_ppl", number_cell),
    Column("exp_mean_nll", "exp_mean_nll", number_cell),
    Column("exact", "exact_share", share_cell),
    Column("content PPL", "content_ppl", number_cell, optional=True),
    Column("content exact", "content_share", share_cell, optional=True),
)
AT = (Column("tokens", "tokens", tokens_text), whole_column("step", "step"))
INTERVAL = Column("95 % interval", "interval")
