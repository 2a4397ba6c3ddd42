"""The page of published models: where each stands, side by side; nothing of a training, for none is known.

In: runs that `lccp measure --hf` wrote. Out: the blocks that open their page, and the charts that say something of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import yaml

from megatron_lccp.analysis.charts.chart import Chart, Curves, NothingToDraw, Panel
from megatron_lccp.analysis.charts.parts import Runs
from megatron_lccp.analysis.measured.columns import Column, shown_table
from megatron_lccp.analysis.measured.highlight import Highlight
from megatron_lccp.analysis.measured.registry import run_highlights
from megatron_lccp.analysis.measured.shown import Figure
from megatron_lccp.analysis.report import page
from megatron_lccp.analysis.run import Run

SHOWN = {
    "name": "model",
    "architecture": "architecture",
    "parameters": "parameters",
    "precision": "measured in",
    "transformers": "transformers",
}


def head(run: Run) -> str:
    """Which model it is."""
    about = about_model(run)
    entries = [(text, f"{about[name]}") for name, text in SHOWN.items() if about.get(name)]
    if sha := about.get("weights_sha256"):
        entries.append(("weights", str(sha)[:12]))
    return page.terms("head", [*entries, ("config", run.config_hash)])


def about_model(run: Run) -> dict[str, Any]:
    """What the run directory says of the model; nothing where that was not kept."""
    try:
        tree = yaml.safe_load(run.config_text)
    except yaml.YAMLError:
        tree = None
    about = tree.get("model") if isinstance(tree, dict) else None
    return about if isinstance(about, dict) else {}


def beside(runs: Runs) -> str:
    """The highlights of all models in one table, a column for each model."""
    found: dict[str, list[tuple[str, Highlight]]] = {}
    for number, run in enumerate(runs):
        for each in run_highlights(run):
            found.setdefault(each.label, []).append((f"run{number}", each))
    lines = pd.DataFrame([{"what": label, **_line(of_runs)} for label, of_runs in found.items()])
    columns = (
        Column("", "what", css="text"), *(Column(run.name, f"run{number}", css="wrap") for number, run in enumerate(runs)),
        Column("", "note", css="wrap"),
    )  # fmt: skip
    note = (
        "Each model reads the same texts through its own tokenizer: perplexities of tokens compare models of one "
        "tokenizer alone."
    )
    return shown_table("t-models", "Side by side", lines, columns, note)


def _line(of_runs: Sequence[tuple[str, Highlight]]) -> dict[str, str]:
    """The value of each run, and the note: one for all, or each beside its value."""
    notes = {each.note for _, each in of_runs}
    if len(notes) == 1:
        return {name: each.value for name, each in of_runs} | {"note": notes.pop()}
    return {name: f"{each.value} ({each.note})" for name, each in of_runs}


def charts_of_one_checkpoint(drawn: Iterable[tuple[Figure, Chart | NothingToDraw]]) -> Iterator[tuple[Figure, Chart]]:
    """The charts that show more of a single checkpoint than a point."""
    for figure, chart in drawn:
        if isinstance(chart, Curves):
            panels = tuple(panel for panel in chart.panels if _has_a_line(panel))
            chart = replace(chart, panels=panels)
            if not panels:
                continue
        if not isinstance(chart, NothingToDraw):
            yield figure, chart


def _has_a_line(panel: Panel) -> bool:
    return any(line.frame[panel.x].nunique() > 1 for line in panel.lines)
