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
from megatron_lccp.analysis.measured.needles import depth_averages, length_bands, needle_averages, needle_cells
from megatron_lccp.records.store import rows_frame
from megatron_lccp.text import number_text
from tests.analysis.loops import groups, keyed, mean, panels


def test_needle_cells(run, rows):
    nll, exact = (
        groups(run.rows, "NeedleGrid", "answer_nll", "length_tok", "depth_cell"),
        groups(run.rows, "NeedleGrid", "exact", "length_tok", "depth_cell"),
    )
    cells = keyed(needle_cells(rows), "length_tok", "depth_cell")
    assert cells.keys() == nll.keys()
    for key, values in nll.items():
        assert cells[key]["mean_ppl"] == pytest.approx(mean([math.exp(value) for value in values]))
        assert cells[key]["exp_mean_nll"] == pytest.approx(math.exp(mean(values)))
        assert cells[key]["exact_share"] == pytest.approx(mean(exact[key]))
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
        assert averages[key]["exact_share"] == pytest.approx(mean([cell["exact_share"] for cell in inside]))
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
    assert needle_cells(only_nll)["exact_share"].isna().all()


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
