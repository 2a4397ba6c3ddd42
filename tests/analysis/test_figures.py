"""Figures say what they show: axes with units, one colour scale, lines and cells that are those of the frames."""

import re
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.charts import draw, interactive, style
from megatron_lccp.analysis.charts.chart import RUN_STYLES, Curves, Maps, NothingToDraw
from megatron_lccp.analysis.charts.interactive import HUGE, log_ticks, numbers, payload
from megatron_lccp.analysis.measured.benchmarks import with_scores
from megatron_lccp.analysis.measured.registry import figures_of, make_charts
from megatron_lccp.analysis.run import load_runs
from megatron_lccp.analysis.run import make_run as run_of
from megatron_lccp.analysis.text import length_text, number_text, tokens_text
from megatron_lccp.records.store import rows_frame, steps_frame
from tests.synthetic_run import make_run


@pytest.fixture(scope="module")
def loaded(run, scores_csv):
    return with_scores(load_runs([run.dir]), scores_csv)


@pytest.fixture(scope="module")
def charts(loaded):
    return {figure.key: chart for figure, chart in make_charts(loaded)}


@pytest.fixture(scope="module")
def drawn(charts):
    return {key: draw.draw(chart) for key, chart in charts.items()}


def panels(figure):
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_every_figure_of_the_paper_is_there(charts):
    captions = " ".join(chart.caption for chart in charts.values())
    assert sorted(set(map(int, re.findall(r"Figure (\d)", captions)))) == list(range(1, 10))
    assert all(isinstance(chart, (Curves, Maps)) for chart in charts.values()) and len(charts) == len(figures_of([]))


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


def test_runs_side_by_side_differ_in_every_panel(loaded):
    """By the style of the line where colours tell measures apart, else by colour and style together."""
    assert len(draw.DASHES) == len(draw.MARKERS) == len(interactive.DASHES) == len(interactive.SYMBOLS) == RUN_STYLES
    names = [f"run {k}" for k in range(2 * RUN_STYLES)]
    averages = loaded[0].averages
    runs = [replace(loaded[0], name=name, averages=averages.assign(run=name)) for name in names]
    for count, panel in ((len(runs), 0), (RUN_STYLES, 1)):
        ((_, chart),) = make_charts(runs[:count], {"needle-averages"})
        lines = chart.panels[panel].lines
        assert len({(line.color, line.dash) for line in lines}) == len(lines) >= count
        traces = payload(chart)["panels"][panel]["traces"]
        assert len({(trace["line"]["color"], trace["line"]["dash"]) for trace in traces}) == len(traces)


def test_ablated_heads_are_named_in_words(loaded, charts):
    (panel,) = charts["ablation"].panels
    assert [line.label for line in panel.lines] == ["2 random heads", "2 best retrieval heads"]
    frame = loaded[0].ablations
    sets = ("top1", "random1.0", "random2.0", "random2.1", "named")
    run = replace(loaded[0], ablations=pd.concat([frame.assign(ablated=name, nll_change=1.0) for name in sets]))
    ((_, chart),) = make_charts([run], {"ablation"})
    assert [line.label for line in chart.panels[0].lines] == [
        "1 best retrieval head", "1 random head", "2 random heads (draw 0)", "2 random heads (draw 1)", "named heads",
    ]  # fmt: skip


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


def test_needle_maps_share_one_log_scale_and_write_the_cells(loaded, drawn):
    images = [axes.images[0] for axes in panels(drawn["needle-cells"])]
    assert len(images) == 8 and len({id(image.norm) for image in images}) == 1
    assert isinstance(images[0].norm, matplotlib.colors.LogNorm)
    last = loaded[0].cells[loaded[0].cells["step"] == 300]
    grid = last.pivot(index="depth_cell", columns="length_tok", values="mean_ppl").to_numpy()
    np.testing.assert_array_equal(images[-1].get_array(), grid)
    axes = panels(drawn["needle-cells"])[-1]
    written = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert written == {at: number_text(value) for at, value in np.ndenumerate(grid)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4K", "16K", "32K", "64K"]


def test_head_maps_mark_and_count_the_retrieval_heads(loaded, drawn):
    last = loaded[0].scores[loaded[0].scores["step"] == 300]
    axes = panels(drawn["head-cells"])[-1]
    above = last[last["score"] > 0.1]
    assert axes.get_title().endswith(f": {len(above)} above 0.1")
    dots = set(zip(axes.lines[0].get_ydata(), axes.lines[0].get_xdata(), strict=True))
    assert dots == set(zip(above["layer"], above["head"], strict=True))
    np.testing.assert_array_equal(axes.images[0].get_array(), last["score"].to_numpy().reshape(8, 8))


def test_captions_give_the_law_and_the_distance_that_they_show(charts):
    law = re.findall(r"(\w+): PPL = (-[\d.]+) ln N", charts["corpus"].caption)
    assert [name for name, _ in law] == ["en", "zh", "code"]
    fitted = charts["corpus"].frame.query("label == 'zh'")
    seen = np.log((fitted["tokens"] - 100 * 4_194_304)[fitted["tokens"] > 100 * 4_194_304].astype(float))
    slope, _ = np.polyfit(seen, fitted["ppl"].tail(len(seen)), 1)
    assert float(law[1][1]) == pytest.approx(slope, rel=5e-3)
    assert "always 16K tokens behind" in charts["interference-curves"].caption
    assert set(charts["interference-curves"].frame["after_tok"]) == {16384}


def test_skipped_steps_are_left_out_of_the_curves_and_counted(charts):
    frame = charts["training-curves"].frame
    assert (frame.query("quantity == 'skipped'")["tokens"] / 4_194_304).tolist() == [150, 151]
    assert "2 steps were skipped" in charts["training-curves"].caption
    assert 150 * 4_194_304 not in frame.query("quantity == 'loss'")["tokens"].tolist()


def test_one_checkpoint_one_cell_one_head_can_be_drawn(tmp_path):
    make_run(tmp_path, steps=0, lccp_from=0, lengths=(1024,), depths=(0.5,), samples=1, layers=1, heads=1, skip=())
    charts = {figure.key: chart for figure, chart in make_charts(load_runs([tmp_path]))}
    missing = {key for key, chart in charts.items() if isinstance(chart, NothingToDraw)}
    assert missing == {"probe-benchmarks", "training-curves", "health", "difference-cells"}
    for key in charts.keys() - missing:
        assert style.figure_png(draw.draw(charts[key]), 20) and payload(charts[key])
    assert len(payload(charts["needle-cells"])["stops"]) == 1 and payload(charts["needle-cells"])["fixed"] == []


def test_cells_that_are_missing_or_not_finite_do_not_break_the_maps(run, scores_csv):
    (loaded,) = with_scores(load_runs([run.dir]), scores_csv)
    loaded.cells.loc[loaded.cells.index[-1], "mean_ppl"] = np.inf
    loaded.cells.loc[loaded.cells.index[-2], "mean_ppl"] = np.nan
    loaded.cells.drop(index=loaded.cells.index[-3], inplace=True)
    chart = next(chart for figure, chart in make_charts([loaded]) if figure.key == "needle-cells")
    texts = [text.get_text() for text in panels(draw.draw(chart))[-1].texts]
    assert texts[3::4][-3:] == ["–", "–", "∞"]
    data = payload(chart)
    assert [row[-1] for row in data["maps"][-1]["values"]][-3:] == [None, None, HUGE]
    assert 0 < data["range"][0] < data["range"][1] < 1e6


def test_depths_are_from_the_start_of_the_lccp_to_the_last_checkpoint(charts):
    panel = charts["depth-curves"].panels[0]
    assert [line.frame["step"].iloc[0] for line in panel.lines] == [100, 150, 175, 225, 250, 300]
    assert [line.color for line in panel.lines] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


def test_a_step_with_two_stages_gives_two_maps(run):
    at = [row for row in run.rows if row.step == 100]
    rows = rows_frame([replace(row, stage="pretrain") for row in at] + at)
    chart = next(c for f, c in make_charts([run_of(rows, steps_frame([]))]) if f.key == "head-cells")
    assert [point["stage"] for point, *_ in chart.grids()] == ["pretrain", "lccp"]


def test_numbers_for_the_page_keep_six_digits_and_what_is_not_a_number():
    assert numbers([1.23456789, 2.0, np.nan, np.inf, -np.inf, 1e-12, 123456789]) == [
        1.23457, 2, None, HUGE, -HUGE, 1e-12, 123457000,
    ]  # fmt: skip


@pytest.mark.parametrize(("low", "high"), [(1.02, 1.4), (1, 5000), (0.3, 7), (1e-5, 1e5), (5e5, 3e6), (2.0, 2.1)])
def test_ticks_of_a_log_scale_are_round_few_and_inside(low, high):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12 and all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:.2g}") == tick for tick in ticks) and ticks == sorted(set(ticks))


def test_long_curves_are_thinned_but_keep_their_extremes():
    rng = np.random.default_rng(0)
    y = rng.normal(size=100_003)
    y[7777] = 50.0
    x_thin, y_thin, low, high = style.thin(np.arange(len(y)), y, bins=300)
    assert len(x_thin) == len(y_thin) == 300 and high.max() == 50.0 and low.min() == y.min()
    assert np.average(y_thin) == pytest.approx(y.mean(), abs=1e-2)
    assert style.thin(np.arange(5.0), np.array([1, np.nan, 3, 4, 5.0]))[2] is None


@pytest.mark.parametrize(
    "value, text",
    [(1.0414, "1.04"), (9.996, "10.0"), (23.06, "23.1"), (118.4, "118"), (999.7, "1.0k"), (4096, "4.1k"),
     (99_960, "100k"), (2.5e6, "2.5M"), (0.001, "0.00"), (np.nan, "–"), (np.inf, "∞")],
)  # fmt: skip
def test_numbers_in_cells_are_short(value, text):
    assert number_text(value) == text


def test_lengths_and_tokens_read_as_people_write_them():
    assert [length_text(n) for n in (512, 1000, 1024, 65536)] == ["512", "1000", "1K", "64K"]
    assert [tokens_text(n) for n in (0, 12, 65536, 20e6, 1.5e9, 2e11)] == [
        "0",
        "12",
        "65.5K",
        "20M",
        "1.5B",
        "200B",
    ]


def test_the_start_of_the_lccp_stays_beside_the_slider(charts):
    data = payload(charts["needle-cells"])
    points = frames.checkpoints(charts["needle-cells"].frame)
    assert points["step"].iloc[data["fixed"][0]] == 100 and [stop["show"] for stop in data["stops"]] == [
        [k] for k in range(13)
    ]


def test_differences_are_paired_with_the_start_and_marked_beyond_noise(loaded, charts, drawn):
    chart = charts["difference-cells"]
    *_, (point, grid, marked) = chart.grids()
    nll = loaded[0].rows.query("metric == 'answer_nll' and monitor == 'NeedleGrid'")
    mean = nll.groupby(["step", "depth_cell", "length_tok"])["value"].mean()
    np.testing.assert_allclose(grid, (mean[300] - mean[100]).unstack().to_numpy(), rtol=1e-9)
    assert point["step"] == 300 and marked.all()  # the synthetic model learns all of it
    assert len(panels(drawn["difference-cells"])[-1].lines[0].get_xdata()) == marked.size
    within = chart.frame.assign(high=np.where(chart.frame["depth_cell"] == 0, 0.1, chart.frame["high"]))
    *_, (_, _, marked) = replace(chart, frame=within).grids()
    assert not marked[0].any() and marked[1:].all()
    data = payload(replace(chart, frame=within))
    assert data["fixed"] == [] and data["maps"][-1]["marked"] == np.argwhere(marked).tolist()


@pytest.mark.parametrize("paper", ["#ffffff", "#13171c"])  # --paper of report.css, light and dark
def test_lines_stand_out_from_the_page(paper: str) -> None:
    """By at least 3:1, which WCAG 2.2 (1.4.11) asks of graphics."""

    def luminance(color: str) -> float:
        rgb = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for color in (*style.SERIES, *(style.line_color(place) for place in np.linspace(0, 1, 7))):
        dark, light = sorted([luminance(color), luminance(paper)])
        assert (light + 0.05) / (dark + 0.05) >= 3, color
