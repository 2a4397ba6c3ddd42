"""Figures as matplotlib draws them: labelled axes, lines and cells that are those of the frames."""

import re

import matplotlib
import numpy as np
import pytest

from megatron_lccp.analysis.charts import draw, style
from megatron_lccp.analysis.charts.chart import Curves, NothingToDraw
from megatron_lccp.analysis.charts.interactive import HUGE, payload
from megatron_lccp.analysis.measured.needles import needle_cells
from megatron_lccp.analysis.measured.registry import figures_of, make_charts
from megatron_lccp.analysis.run import load_run, load_runs
from tests.analysis.loops import panels
from tests.synthetic_run import make_run


@pytest.mark.parametrize("key", [figure.key for figure in figures_of([])])
def test_every_axis_is_labelled_and_a_caption_says_how_much_is_behind_it(charts, drawn, key):
    figure = drawn[key]
    for axes in figure.axes:
        assert axes.get_xlabel() or axes.get_ylabel() or figure.get_supxlabel()
        if axes.get_label() != "<colorbar>":
            assert axes.get_xlabel() or figure.get_supxlabel()
            assert axes.get_ylabel() or figure.get_supylabel()
    assert len(charts[key].caption) > 100 and (
        re.search(r"\d", charts[key].caption) or key in ("training-curves", "health")
    )


def test_lines_are_parts_of_the_frame_that_goes_into_the_csv(charts):
    for chart in charts.values():
        if isinstance(chart, Curves):
            for line in (line for panel in chart.panels for line in panel.lines):
                assert len(line.frame) and len(line.frame.merge(chart.frame)) >= len(line.frame)


def test_matplotlib_draws_the_numbers_of_the_lines(charts, drawn):
    for key, chart in charts.items():
        if isinstance(chart, Curves):
            for axes, panel in zip(panels(drawn[key]), chart.panels, strict=True):
                shown = [tuple(line.get_ydata()) for line in axes.lines]
                for line in panel.lines:
                    assert tuple(line.frame[line.y]) in shown, (key, line.label)


def test_drawing_leaves_matplotlib_as_it_was(charts):
    before = dict(matplotlib.rcParams)
    svg = style.figure_svg(draw.draw(charts["corpus"]))
    assert dict(matplotlib.rcParams) == before
    assert svg == style.figure_svg(draw.draw(charts["corpus"])) and "<svg" in svg  # the same to the byte


def test_one_checkpoint_one_cell_one_head_can_be_drawn(tmp_path):
    make_run(tmp_path, steps=0, lccp_from=0, lengths=(1024,), depths=(0.5,), samples=1, layers=1, heads=1, skip=())
    charts = {figure.key: chart for figure, chart in make_charts(load_runs([tmp_path]))}
    missing = {key for key, chart in charts.items() if isinstance(chart, NothingToDraw)}
    assert missing == {"probe-benchmarks", "training-curves", "health", "difference-cells"}
    for key in charts.keys() - missing:
        assert style.figure_png(draw.draw(charts[key]), 20) and payload(charts[key])
    assert len(payload(charts["needle-cells"])["stops"]) == 1 and payload(charts["needle-cells"])["fixed"] == []


def test_cells_that_are_missing_or_not_finite_do_not_break_the_maps(run):
    loaded = load_run(run.dir)
    cells = loaded.frame(needle_cells)
    cells.loc[cells.index[-1], "mean_ppl"] = np.inf
    cells.loc[cells.index[-2], "mean_ppl"] = np.nan
    cells.drop(index=cells.index[-3], inplace=True)
    chart = next(chart for figure, chart in make_charts([loaded]) if figure.key == "needle-cells")
    texts = [text.get_text() for text in panels(draw.draw(chart))[-1].texts]
    assert texts[3::4][-3:] == ["–", "–", "∞"]
    data = payload(chart)
    assert [row[-1] for row in data["maps"][-1]["values"]][-3:] == [None, None, HUGE]
    assert 0 < data["range"][0] < data["range"][1] < 1e6
