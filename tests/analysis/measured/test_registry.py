"""Everything that a run shows is found, in order, and told apart."""

import re
from dataclasses import replace

from megatron_lccp.analysis.charts import draw, interactive
from megatron_lccp.analysis.charts.chart import RUN_STYLES, Curves, Maps
from megatron_lccp.analysis.charts.interactive import payload
from megatron_lccp.analysis.measured.registry import figures_of, make_charts


def test_every_figure_of_the_paper_is_there(charts):
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
