"""The HTML page around a report: one template, one style sheet, and the small pieces they are filled with.

In: text from the run, and SVG. Out: HTML in which everything that came from data is escaped. The page refers to nothing
outside itself, and says so to the browser (Content-Security-Policy), so that it opens without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

import pandas as pd

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

STYLE = """
:root { --paper: #fff; --card: #f5f7f9; --ink: #1a2028; --muted: #5b6570; --band: #8a95a3; --line: #dde2e7;
  --accent: #1f6aa5; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #12161b; --card: #1b2128; --ink: #e4e8ec;
  --muted: #9aa5b1; --band: #7d8896; --line: #2e3740; --accent: #6cb6f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 var(--font); }
main { max-width: 1060px; margin: 0 auto; padding: 1.5rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
.head { display: flex; flex-wrap: wrap; gap: .2rem 1.8rem; margin: 0; font-size: .92rem; }
.head div { display: flex; gap: .45rem; min-width: 0; }
.head dt { color: var(--muted); }
.head dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: .8rem; margin: 0; }
.facts div { background: var(--card); border-radius: 8px; padding: .75rem .95rem; }
.facts dt { font-size: .88rem; color: var(--muted); }
.facts dd { margin: 0; }
.facts .value { font-size: 1.35rem; font-weight: 600; line-height: 1.35; font-variant-numeric: tabular-nums; }
.facts .note { font-size: .82rem; line-height: 1.4; color: var(--muted); overflow-wrap: anywhere; }
figure { margin: 0 0 2.4rem; break-inside: avoid; }
figure h3, .missing h3 { font-size: 1rem; margin: 0 0 .4rem; }
figcaption, .missing p { font-size: .88rem; color: var(--muted); max-width: 82ch; margin: .3rem 0 0; }
.missing { margin: 0 0 2.4rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: var(--font); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.narrow { display: none; }
@media screen and (max-width: 640px) { .wide { display: none; } .narrow { display: block; }
  main { padding: 1rem .8rem 3rem; } }
details { border: 1px solid var(--line); border-radius: 8px; margin: 0 0 .6rem; }
summary { cursor: pointer; padding: .55rem .9rem; font-weight: 500; }
summary .count { color: var(--muted); font-weight: 400; }
.scroll { overflow-x: auto; padding: 0 .9rem .8rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .8rem .22rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 500; }
.text { text-align: left; }
.wrap { text-align: left; white-space: normal; min-width: 16rem; overflow-wrap: anywhere; }
pre { margin: 0; font-size: .82rem; line-height: 1.4; }
.note { color: var(--muted); font-size: .88rem; max-width: 82ch; }
@media print { body { font-size: 11pt; } main { max-width: none; padding: 0; } h2, h3 { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .facts div { border: 1px solid var(--line); break-inside: avoid; } table { font-size: 7.5pt; } }
"""


@dataclass(frozen=True)
class Column:
    """A column of a table: what it is called, which column of the frame it shows, and how."""

    heading: str
    name: str
    text: Callable[[Any], str] = str
    css: str = ""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document; `parts` are HTML, `title` is text."""
    return PAGE.substitute(title=escape(title), style=STYLE, body="\n".join(parts))


def terms(css: str, entries: Iterable[Sequence[str]]) -> str:
    """A <dl>: each entry is a term and its texts (the first a value, the second a note)."""
    blocks = []
    for term, *texts in entries:
        values = "".join(
            f'<dd class="{kind}">{escape(text)}</dd>' for kind, text in zip(("value", "note"), texts, strict=False)
        )
        blocks.append(f"<div><dt>{escape(term)}</dt>{values}</div>")
    return f'<dl class="{css}">{"".join(blocks)}</dl>'


def figure(key: str, title: str, caption: str, wide_svg: str, narrow_svg: str) -> str:
    """A figure twice, for a wide and for a narrow screen; the style sheet shows one of them."""
    drawings = f'<div class="wide">{wide_svg}</div><div class="narrow">{narrow_svg}</div>'
    return f'<figure id="{key}"><h3>{escape(title)}</h3>{drawings}<figcaption>{escape(caption)}</figcaption></figure>'


def missing(title: str, sentence: str) -> str:
    """What stands where a figure could not be drawn."""
    return f'<div class="missing"><h3>{escape(title)}</h3><p>{escape(sentence)}</p></div>'


def table(
    key: str, title: str, frame: pd.DataFrame, columns: Sequence[Column], note: str = "", open: bool = False
) -> str:
    """A collapsible table of a frame; empty cells for what is missing, nothing at all for an empty frame."""
    if not len(frame):
        return ""
    head = "".join(f'<th class="{column.css}">{escape(column.heading)}</th>' for column in columns)
    values = [[_cell(column, value) for value in frame[column.name]] for column in columns]
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in zip(*values, strict=True))
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    html = f"{note}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return details(key, title, html, f"{len(frame):,} rows" if len(frame) > 1 else "1 row", open)


def details(key: str, title: str, html: str, count: str = "", open: bool = False) -> str:
    """A collapsible block around HTML."""
    summary = f'{escape(title)} <span class="count">{escape(count)}</span>'
    start = f'<details id="{key}"{" open" if open else ""}><summary>{summary}</summary>'
    return f'{start}<div class="scroll">{html}</div></details>'


def _cell(column: Column, value: Any) -> str:
    return f'<td class="{column.css}">{"" if pd.isna(value) else escape(column.text(value))}</td>'
