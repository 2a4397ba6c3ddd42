"""The report of one or several runs: one HTML page that opens anywhere, without a network.

In: run directories, or a folder of them. Out: report.html: the verdict, then what the runs show at the paper's three
levels, then training, the numbers and the events. The report reads records and nothing else; training does not know of
it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import pandas as pd

from megatron_lccp.analysis.charts.chart import NothingToDraw
from megatron_lccp.analysis.charts.parts import Runs
from megatron_lccp.analysis.measured.benchmarks import with_scores
from megatron_lccp.analysis.measured.columns import Column, count_cell, details, table
from megatron_lccp.analysis.measured.registry import make_charts, run_cautions, run_highlights, run_tables
from megatron_lccp.analysis.report import findings, models, page
from megatron_lccp.analysis.report.branches import branch_of
from megatron_lccp.analysis.run import Run, load_runs
from megatron_lccp.analysis.verdict.judge import margins_of
from megatron_lccp.files import write_whole
from megatron_lccp.text import span_text, tokens_text

LEVELS = {
    "behavioural": "What the model does: answers that are right or wrong.",
    "probabilistic": "How sure the model is: perplexity, which goes on falling when scores stand still.",
    "mechanistic": "How the model does it: the heads that look back at what is to be copied.",
    "training": "What it cost, and whether it went well.",
}
BRACKETS = (
    "Under a change over checkpoints: what changed on the samples that both measured, of a perplexity the NLL, and in "
    "brackets its 95 % interval, these samples drawn anew."
)
MOST_EVENTS = 200


def write_report(
    run_dirs: str | Path | Sequence[str | Path], out: str | Path | None = None, scores: str | Path | None = None,
    redraw_s: float | None = None, margins: Mapping[str, float] | None = None,
) -> Path:  # fmt: skip
    """Write the report of one or several runs to `out` and return its path.

    Without `out` it goes to report.html in the run directory, of several runs in the folder that holds the first one.
    `scores`: a CSV as in `measured.benchmarks.read_scores`; `redraw_s`: as in `page.page`; `margins`: as in `verdict.margins_of`.
    Raises ValueError in one line if something is not a run directory or has no rows, or if `out` is a file of another
    kind; OSError if `out` cannot be written.
    """
    if out is not None:
        _require_page(Path(out))
    run_dirs = [run_dirs] if isinstance(run_dirs, (str, Path)) else list(run_dirs)
    runs = with_scores(load_runs(run_dirs), scores)
    if out is None:
        first = Path(run_dirs[0])
        out = (first if len(run_dirs) == 1 else Path(os.path.realpath(first)).parent) / "report.html"
    html = report_html(runs, redraw_s, margins)
    write_whole(Path(out), lambda draft: draft.write_text(html, encoding="utf-8"))
    return Path(out)


def _require_page(out: Path) -> None:
    """Raises ValueError for a file that is there and is none of ours: a page takes the place of a page alone."""
    if out.is_file() and out.stat().st_size:
        with out.open("rb") as stream:
            if not stream.read(len(page.OPENS)).decode(errors="replace").lower().startswith(page.OPENS.lower()):
                raise ValueError(f"--out: {out} is no page; name another file, or move it away")


def report_html(runs: Runs, redraw_s: float | None = None, margins: Mapping[str, float] | None = None) -> str:
    """The whole page."""
    name = " · ".join(run.name for run in runs)
    title = name if len(runs) == 1 else f"{len(runs)} runs side by side"
    published, drawn = all(run.is_published for run in runs), list(make_charts(runs))
    if published:
        title = name if len(runs) == 1 else f"{len(runs)} models side by side"
        parts = [f'<h1 id="top">{escape(title)}</h1>', *map(models.head, runs)]
        parts += [models.beside(runs)] if len(runs) > 1 else _highlights(runs)
        found, links = [], [("top", "Model" if len(runs) == 1 else "Models")]
        drawn = list(models.charts_of_one_checkpoint(drawn))
    else:
        parts = [f'<h1 id="top">{escape(title)}</h1>', *(page.terms("head", _header(run, runs)) for run in runs)]
        found = [findings.find(run, own) for run, own in zip(runs, margins_of(runs, margins or {}), strict=True)]
        parts += [findings.verdict_block(each, number, len(runs) > 1) for number, each in enumerate(found)]
        parts += _highlights(runs)
        links = [("top", "Verdict")]
    for level, sentence in LEVELS.items():
        if published and not any(figure.level == level for figure, _ in drawn):
            continue
        links.append((level, level.capitalize()))
        parts += [page.section(level, level.capitalize() + (" level" if level != "training" else ""), sentence)]
        parts += [
            page.figure(chart)
            for figure, chart in drawn
            if figure.level == level and not isinstance(chart, NothingToDraw)
        ]
        parts += _not_measured(
            [str(chart) for figure, chart in drawn if figure.level == level and isinstance(chart, NothingToDraw)]
        )
        parts += findings.level_blocks(level, found)
    links += [("numbers", "Numbers"), ("events", "Events")]
    parts += [page.section("numbers", "Numbers", "What the figures are drawn from.")]
    parts += [html for k, run in enumerate(runs) for html in _of_run(run, runs, run_tables(run, f"{k}-" * (k > 0)))]
    parts += [page.section("events", "Events")]
    parts += [html for k, run in enumerate(runs) for html in _of_run(run, runs, [event_table(run, f"events-{k}")])]
    if any(run.config_text for run in runs):
        links.append(("configuration", "Configuration"))
        parts += [page.section("configuration", "Configuration")]
        for k, run in enumerate(runs):
            summary = f"{run.name}: config.yaml" if len(runs) > 1 else "config.yaml"
            parts.append(details(f"config-{k}", summary, f"<pre>{escape(run.config_text)}</pre>"))
    return page.page(f"{name}: LCCP report", links, parts, redraw_s)


def _highlights(runs: Runs) -> list[str]:
    """What each run comes to, in a few numbers."""
    parts = []
    for run in runs:
        if highlights := run_highlights(run):
            entries = ((each.label, each.value, each.change, each.note) for each in highlights)
            parts += [f"<h2>{escape(run.name)}</h2>"] * (len(runs) > 1) + [page.terms("facts", entries)]
            parts += [f'<p class="note">{BRACKETS}</p>'] * any("[" in each.change for each in highlights)
        parts += [f'<p class="note">{escape(text)}</p>' for text in run_cautions(run)]
    return parts


def _of_run(run: Run, runs: Runs, blocks: Iterable[str]) -> Iterator[str]:
    """Blocks of a run, under its name where there are several."""
    if len(runs) > 1:
        yield f"<h3>{escape(run.name)}</h3>"
    yield from blocks


def _header(run: Run, runs: Runs) -> Iterator[tuple[str, str]]:
    if len(runs) > 1:
        yield "run", run.name
    yield "config", run.config_hash
    last = pd.concat([frame[["step", "tokens"]] for frame in (run.steps, run.rows) if len(frame)]).max()
    yield "steps", f"{int(last['step']):,}"
    yield "tokens", tokens_text(last["tokens"])
    if branched := branch_of(run):
        yield "branch", f"{branched.parent}, from {tokens_text(branched.tokens)} tokens"
    spans = run.spans.itertuples()
    yield "stages", ", ".join(f"{s.stage} ({span_text(s.tokens_from, s.tokens_to)})" for s in spans)


def _not_measured(missing: Sequence[str]) -> list[str]:
    """One line for all figures of a level that no run has rows for, each with what would provide it."""
    return [f'<p class="note missing">Not measured: {escape(", ".join(missing))}.</p>'] if missing else []


def event_table(run: Run, key: str = "events") -> str:
    """What happened, the last MOST_EVENTS of it; a sentence if nothing did."""
    if not len(run.events):
        return '<p class="note">None was recorded: no monitor failed, no step was skipped, the run was not resumed.</p>'
    counts = ", ".join(f"{kind}: {count}" for kind, count in run.events["kind"].value_counts().items())
    last = run.events.tail(MOST_EVENTS)
    note = f"The last {MOST_EVENTS} of {len(run.events):,}." if len(run.events) > MOST_EVENTS else ""
    columns = (
        Column("step", "step", count_cell),
        Column("kind", "kind", css="text"),
        Column("what happened", "text", css="wrap"),
        Column("time", "time", css="text"),
    )
    return table(key, counts, last, columns, note=note, open=len(last) <= 20)
