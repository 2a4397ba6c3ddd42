"""Needles against the plainest loop over the same rows, and their figures."""

import dataclasses
import math
from collections import defaultdict
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from megatron_lccp.analysis.charts.interactive import payload
from megatron_lccp.analysis.measured.needles import (
    depth_averages,
    grid_averages,
    length_bands,
    needle_averages,
    needle_cells,
)
from megatron_lccp.analysis.measured.registry import make_charts, run_highlights, run_scalars, run_signals, run_tables
from megatron_lccp.analysis.run import make_run
from megatron_lccp.records.store import rows_frame
from megatron_lccp.schema import Metric
from megatron_lccp.text import number_text
from tests.analysis.loops import groups, keyed, mean, panels


def test_needle_cells(run, rows):
    nll, exact, content_nll, content_exact = (
        groups(run.rows, "NeedleGrid", metric, "length_tok", "depth_cell")
        for metric in ("answer_nll", "exact", "content_nll", "content_exact")
    )
    cells = keyed(needle_cells(rows), "length_tok", "depth_cell")
    assert cells.keys() == nll.keys()
    for key, values in nll.items():
        assert cells[key]["mean_ppl"] == pytest.approx(mean([math.exp(value) for value in values]))
        assert cells[key]["exp_mean_nll"] == pytest.approx(math.exp(mean(values)))
        assert cells[key]["exact_share"] == pytest.approx(mean(exact[key]))
        assert cells[key]["content_ppl"] == pytest.approx(math.exp(mean(content_nll[key])))
        assert cells[key]["content_share"] == pytest.approx(mean(content_exact[key]))
        assert cells[key]["n"] == len(values)


@pytest.mark.parametrize("by", [[], ["length_tok"], ["depth_cell"]])
def test_needle_averages(rows, by):
    cells = needle_cells(rows)
    averages = keyed(needle_averages(cells, by), *by)
    expected = defaultdict(list)
    for cell in cells.to_dict("records"):
        expected[(cell["step"], cell["stage"], *(cell[name] for name in by))].append(cell)
    assert averages.keys() == expected.keys()
    for key, inside in expected.items():
        assert averages[key]["mean_ppl"] == pytest.approx(mean([cell["mean_ppl"] for cell in inside]))
        assert averages[key]["exp_mean_nll"] == pytest.approx(
            math.exp(mean([math.log(cell["exp_mean_nll"]) for cell in inside]))
        )
        for share in ("exact_share", "content_share"):
            assert averages[key][share] == pytest.approx(mean([cell[share] for cell in inside]))
        assert averages[key]["content_ppl"] == pytest.approx(
            math.exp(mean([math.log(cell["content_ppl"]) for cell in inside]))
        )
        assert averages[key]["cells"] == len(inside) and averages[key]["n"] == sum(cell["n"] for cell in inside)


def test_a_number_that_is_not_finite_stays_visible(run):
    some = [row for row in run.rows if row.step == 0 and row.monitor == "NeedleGrid"]
    first = next(index for index, row in enumerate(some) if row.metric == "answer_nll")
    some[first] = dataclasses.replace(some[first], value=math.nan)
    cells = needle_cells(rows_frame(some))
    assert cells["mean_ppl"].isna().sum() == 1
    assert needle_averages(cells)["mean_ppl"].isna().all()
    some[first] = dataclasses.replace(some[first], value=5000.0)
    assert np.isinf(needle_averages(needle_cells(rows_frame(some)))["mean_ppl"]).all()


def test_missing_exact_scores_are_missing_not_zero(run):
    only_nll = rows_frame([row for row in run.rows if row.metric == "answer_nll"])
    missing = ["exact_share", "content_ppl", "content_share"]
    assert needle_cells(only_nll)[missing].isna().all(axis=None)
    assert needle_averages(needle_cells(only_nll))[missing].isna().all(axis=None)


def test_names_and_values_are_shown_where_they_were_measured(loaded, rows):
    """Tables, figure, highlight, scalars and signals; a run of before has none of it."""
    of_content = rows["metric"].isin(["content_nll", "content_exact"])
    kinds = {"content_nll": ("probabilistic", "lower", "nat"), "content_exact": ("behavioural", "higher", "share")}
    declared = {
        ("NeedleGrid", name): Metric(name=name, level=level, better=better, unit=unit, about="", judged=True)
        for name, (level, better, unit) in kinds.items()
    }
    metrics = {**loaded.metrics, **declared}
    new, old = (make_run(part, loaded.steps, metrics=metrics) for part in (rows, rows[~of_content]))
    for each, there in ((new, True), (old, False)):
        assert any("content exact" in html for html in run_tables(each)) == there
        assert any(h.label == "NIAH name and value" for h in run_highlights(each)) == there
        assert ("niah/content_share" in run_scalars(each)) == there
        names = [signal.name for signal in run_signals(each)]
        assert ("content_nll" in names, "content_exact" in names) == (there, there)
        (_, chart) = next(make_charts([each], ["needle-averages"]))
        assert [len(panel.lines) for panel in chart.panels] == ([1, 3, 1] if there else [1, 2])
    shares = loaded.derived(grid_averages)
    assert (shares["content_share"] >= shares["exact_share"]).all() and (
        shares["content_ppl"] < shares["mean_ppl"]
    ).all()


def test_depth_curves_average_the_lengths_of_a_band(loaded):
    curves = depth_averages(loaded.frame(needle_cells))
    assert curves[["band_from_tok", "band_to_tok"]].drop_duplicates().to_numpy().tolist() == [
        [4096, 16384], [32768, 32768], [65536, 65536],
    ]  # fmt: skip
    cells = loaded.frame(needle_cells)
    for line in curves.itertuples():
        inside = cells[(cells["step"] == line.step) & (cells["depth_cell"] == line.depth_cell)]
        inside = inside[inside["length_tok"].between(line.band_from_tok, line.band_to_tok)]
        assert line.mean_ppl == pytest.approx(mean(inside["mean_ppl"].tolist())) and line.cells == len(inside)


def test_length_bands_of_the_paper_and_of_one_length():
    lengths = pd.Series([1024 * k for k in (1, 8, 16, 24, 32, 40, 64)])
    assert length_bands(lengths).tolist() == [(1024, 16384)] * 3 + [(24576, 32768)] * 2 + [(40960, 65536)] * 2
    assert length_bands(pd.Series([512, 512])).tolist() == [(512, 512)] * 2


def test_needle_maps_share_one_log_scale_and_write_the_cells(loaded, drawn):
    images = [axes.images[0] for axes in panels(drawn["needle-cells"])]
    assert len(images) == 8 and len({id(image.norm) for image in images}) == 1
    assert isinstance(images[0].norm, matplotlib.colors.LogNorm)
    last = loaded.frame(needle_cells)[loaded.frame(needle_cells)["step"] == 300]
    grid = last.pivot(index="depth_cell", columns="length_tok", values="mean_ppl").to_numpy()
    np.testing.assert_array_equal(images[-1].get_array(), grid)
    axes = panels(drawn["needle-cells"])[-1]
    written = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert written == {at: number_text(value) for at, value in np.ndenumerate(grid)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4K", "16K", "32K", "64K"]


def test_depths_are_from_the_start_of_the_lccp_to_the_last_checkpoint(charts):
    panel = charts["depth-curves"].panels[0]
    assert [line.frame["step"].iloc[0] for line in panel.lines] == [100, 150, 175, 225, 250, 300]
    assert [line.color for line in panel.lines] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_differences_are_paired_with_the_start_and_marked_beyond_noise(loaded, charts, drawn):
    chart = charts["difference-cells"]
    *_, (point, grid, marked) = chart.grids()
    nll = loaded.rows.query("metric == 'answer_nll' and monitor == 'NeedleGrid'")
    mean = nll.groupby(["step", "depth_cell", "length_tok"])["value"].mean()
    np.testing.assert_allclose(grid, (mean[300] - mean[100]).unstack().to_numpy(), rtol=1e-9)
    assert point["step"] == 300 and marked.all()  # the synthetic model learns all of it
    assert len(panels(drawn["difference-cells"])[-1].lines[0].get_xdata()) == marked.size
    within = chart.frame.assign(high=np.where(chart.frame["depth_cell"] == 0, 0.1, chart.frame["high"]))
    *_, (_, _, marked) = replace(chart, frame=within).grids()
    assert not marked[0].any() and marked[1:].all()
    data = payload(replace(chart, frame=within))
    assert data["fixed"] == [] and data["maps"][-1]["marked"] == np.argwhere(marked).tolist()
