"""The HTML page around a report: one template, and the small pieces it is filled with.

In: text from the run, and charts. Out: HTML in which everything that came from data is escaped. Style sheet, script and
plotly.js (its cartesian bundle 4.1.1, unchanged, from npm's plotly.js-cartesian-dist-min) are in assets/ and go into
the page whole. The page refers to nothing outside itself, and says so to the browser (Content-Security-Policy): it
opens without a network, and no script runs but these two.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files

from megatron_lccp.analysis.charts.chart import Chart
from megatron_lccp.analysis.charts.interactive import payload

OPENS = "<!DOCTYPE html>"
"""What every page begins with."""
PAGE = """{opens}
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data: blob:; script-src {hashes}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body{redraw}>
<nav aria-label="Sections"><div>{links}</div></nav>
<main>
{body}
</main>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""
PLOT = '<div class="panel"><p class="map-name">{}</p><div class="plot"></div></div>'
SCRIPTS = ("plotly-cartesian.min.js", "report.js")


@cache
def asset(name: str) -> str:
    """A file of assets/."""
    return (files("megatron_lccp.analysis") / "assets" / name).read_text(encoding="utf-8")


def page(title: str, links: Iterable[tuple[str, str]], parts: Iterable[str], redraw_s: float | None = None) -> str:
    """The whole document; `parts` are HTML, `title` is text, `links` are (id, text) of sections.

    `redraw_s`: seconds after which the browser reads the page again, while a run is watched.
    """
    plotly, script = map(asset, SCRIPTS)
    return PAGE.format(
        opens=OPENS, title=escape(title), style=asset("report.css"), body="\n".join(parts), plotly=plotly, script=script,
        links="".join(f'<a href="#{key}">{escape(text)}</a>' for key, text in links),
        hashes=" ".join(f"'sha256-{_sha256(text)}'" for text in (plotly, script)),
        redraw=f' data-redraw="{redraw_s:g}"' if redraw_s else "",
    )  # fmt: skip


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def section(key: str, title: str, note: str = "") -> str:
    """A heading to jump to, and a sentence under it."""
    return f'<h2 id="{key}">{escape(title)}</h2>' + (f'<p class="note">{escape(note)}</p>' if note else "")


def terms(css: str, entries: Iterable[Sequence[str]]) -> str:
    """A <dl>: each entry is a term and its texts (a value, how it changed, a note), of which some may be empty."""
    blocks = []
    for term, *texts in entries:
        kinds = zip(("value", "change", "note"), texts, strict=False)
        values = "".join(f'<dd class="{kind}">{escape(text)}</dd>' for kind, text in kinds if text)
        blocks.append(f"<div><dt>{escape(term)}</dt>{values}</div>")
    return f'<dl class="{css}">{"".join(blocks)}</dl>'


def figure(chart: Chart) -> str:
    """A chart with its caption; the script draws it from the JSON inside."""
    data = payload(chart)
    if data["kind"] == "maps":
        places = len(data["fixed"]) + len(data["stops"][-1]["show"])
        names = [""] * places  # the script names the checkpoint
        head = _slider(chart.title, len(data["stops"])) if len(data["stops"]) > 1 else ""
    else:
        names, head = [panel.pop("title") for panel in data["panels"]], ""
    plots = "".join(PLOT.format(escape(name)) for name in names)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    text = text.replace("<", "\\u003c")  # not only "</": after "<!--<script>" the end of the script would not end it
    return (
        f'<figure class="chart" id="{chart.key}"><h3>{escape(chart.title)}</h3>{head}'
        f'<div class="plots" role="img" aria-label="{escape(chart.title)}">{plots}</div>'
        f"<figcaption>{escape(chart.caption)}</figcaption>"
        f'<script type="application/json">{text}</script></figure>'
    )


def _slider(title: str, stops: int) -> str:
    return (
        f'<div class="slide"><button type="button" class="play">Play</button><input type="range" min="0" '
        f'max="{stops - 1}" value="{stops - 1}" aria-label="Checkpoint of: {escape(title)}">'
        f"<output>{stops} of {stops}</output></div>"
    )
