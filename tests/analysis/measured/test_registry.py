"""Everything that a run shows is found, in order, and told apart."""

import re
from dataclasses import replace

import pandas as pd
import pytest

from megatron_lccp.analysis.charts import draw, interactive
from megatron_lccp.analysis.charts.chart import RUN_STYLES, Curves, Maps, NothingToDraw
from megatron_lccp.analysis.charts.interactive import payload
from megatron_lccp.analysis.measured import registry
from megatron_lccp.analysis.measured.registry import (
    all_shown,
    figures_of,
    make_charts,
    run_cautions,
    run_highlights,
    run_tables,
)
from megatron_lccp.analysis.measured.shown import Figure, Shown


def test_every_figure_of_the_paper_is_there(charts):
    charts = {key: chart for key, chart in charts.items() if not isinstance(chart, NothingToDraw)}
    captions = " ".join(chart.caption for chart in charts.values())
    assert sorted(set(map(int, re.findall(r"Figure (\d)", captions)))) == list(range(1, 10))
    assert all(isinstance(chart, (Curves, Maps)) for chart in charts.values())
    assert charts.keys() - {figure.key for figure in figures_of([])} == {
        "RetrievalHeads-needle_mass", "UserMonitor-router_entropy"}  # what has no file of its own  # fmt: skip


def test_runs_side_by_side_differ_in_every_panel(loaded):
    """By the style of the line where colours tell measures apart, else by colour and style together."""
    assert len(draw.DASHES) == len(draw.MARKERS) == len(interactive.DASHES) == len(interactive.SYMBOLS) == RUN_STYLES
    names = [f"run {k}" for k in range(2 * RUN_STYLES)]
    runs = [replace(loaded, name=name, rows=loaded.rows.assign(run=name)) for name in names]
    for count, panel in ((len(runs), 0), (RUN_STYLES, 1)):
        ((_, chart),) = make_charts(runs[:count], {"needle-averages"})
        lines = chart.panels[panel].lines
        assert len({(line.color, line.dash) for line in lines}) == len(lines) >= count
        traces = payload(chart)["panels"][panel]["traces"]
        assert len({(trace["line"]["color"], trace["line"]["dash"]) for trace in traces}) == len(traces)


def test_what_monitors_say_of_their_samples_stands_at_the_top(loaded):
    """Once, however often it was recorded, before what the page itself is cautious about."""
    said = [("sample", "NeedleGrid: its text comes twice"), ("no_rows", "x"), ("sample", "CorpusPPL: few.")] * 2
    events = pd.DataFrame([{"time": "", "step": 0, "kind": kind, "text": text} for kind, text in said])
    before = run_cautions(loaded)
    found = run_cautions(replace(loaded, events=events))
    assert found == ["NeedleGrid: its text comes twice.", "CorpusPPL: few.", *before]


def test_a_figure_that_fails_is_left_out_and_said(loaded, monkeypatch):
    """The file of somebody who added one: the rest of the page is written, and one line says what is missing."""

    def fails(*_):
        return {}["column"]

    broken = Shown(
        place=99, figures=(Figure("mine", "Mine", "behavioural", fails),), tables=(fails,), highlights=(fails,)
    )  # fmt: skip
    whole = (figures_of([loaded]), run_highlights(loaded), run_tables(loaded))
    monkeypatch.setattr(registry, "all_shown", lambda found=all_shown(): (*found, broken))
    with pytest.warns(UserWarning, match=r"fails failed: KeyError: 'column' \(test_registry.py:\d+\); it is left out"):
        assert (run_highlights(loaded), run_tables(loaded)) == whole[1:]
    with pytest.warns(UserWarning, match="figure mine failed"):
        made = dict((figure.key, chart) for figure, chart in make_charts([loaded]))
    assert isinstance(made["mine"], NothingToDraw) and "figure mine failed: KeyError" in str(made["mine"])
    assert len(made) == len(whole[0]) + 1
