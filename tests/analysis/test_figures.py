"""Figures say what they show: axes with units, one colour scale, values that are those of the frames."""

import re

import matplotlib
import numpy as np
import pytest

from megatron_lccp.analysis import figures, frames, style
from megatron_lccp.analysis.report import FIGURES
from megatron_lccp.analysis.run import load_run

COLUMNS = (None, 1)


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(run.dir)


def panels(figure):
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("spec", FIGURES, ids=lambda spec: spec.key)
def test_every_axis_is_labelled_and_the_svg_is_small(loaded, spec, columns):
    figure = spec.draw(loaded) if columns is None else spec.draw(loaded, columns=columns)
    for axes in figure.axes:
        shared = (figure.get_supxlabel(), figure.get_supylabel())
        if axes.get_label() == "<colorbar>":
            assert axes.get_xlabel() or axes.get_ylabel()
        else:
            assert axes.get_xlabel() or shared[0]
            assert axes.get_ylabel() or shared[1]
    svg = style.figure_svg(figure, "key", "what it is")
    assert len(svg) < 150_000
    assert 'role="img" aria-label="what it is"' in svg and "var(--ink)" in svg and style.INK not in svg


def test_drawing_leaves_matplotlib_as_it_was(loaded):
    before = dict(matplotlib.rcParams)
    style.figure_svg(figures.corpus_curves(loaded.corpora, loaded.spans), "key", "text")
    assert dict(matplotlib.rcParams) == before


def test_needle_maps_share_one_log_scale_and_write_the_cells(loaded):
    figure = figures.needle_heat_maps(loaded.cells, loaded.lccp_from)
    images = [axes.images[0] for axes in panels(figure)]
    assert len(images) == 8 and len({id(image.norm) for image in images}) == 1
    assert isinstance(images[0].norm, matplotlib.colors.LogNorm)
    last = loaded.cells[loaded.cells["step"] == 300]
    grid = last.pivot(index="depth_cell", columns="length_tok", values="mean_ppl").to_numpy()
    np.testing.assert_array_equal(images[-1].get_array(), grid)
    axes = panels(figure)[-1]
    written = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert written == {at: style.number_text(value) for at, value in np.ndenumerate(grid)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4K", "16K", "32K", "64K"]


def test_head_maps_frame_and_count_the_retrieval_heads(loaded):
    figure = figures.head_heat_maps(loaded.scores, loaded.lccp_from)
    last = loaded.scores[loaded.scores["step"] == 300]
    axes = panels(figure)[-1]
    above = int((last["score"] > 0.1).sum())
    assert axes.get_title().endswith(f": {above} above 0.1")
    assert np.isnan(axes.lines[0].get_xdata()).sum() == above
    np.testing.assert_array_equal(axes.images[0].get_array(), last["score"].to_numpy().reshape(8, 8))


def test_curves_hold_the_numbers_of_the_frames(loaded):
    exact, ppl = panels(figures.needle_curves(loaded.averages, loaded.spans))
    np.testing.assert_array_equal(exact.lines[-1].get_ydata(), loaded.averages["exact_share"])
    drawn = {line.get_label(): line.get_ydata() for line in ppl.lines}
    np.testing.assert_array_equal(drawn["mean_ppl"], loaded.averages["mean_ppl"])
    counts = loaded.heads[loaded.heads["quantity"] == "retrieval_heads"]["value"]
    number, score = panels(figures.head_curves(loaded.heads, loaded.spans))
    assert any(np.array_equal(line.get_ydata(), counts) for line in number.lines)
    labels = [text.get_text() for text in score.get_legend().get_texts()]
    initial = loaded.heads[loaded.heads["quantity"] == "initial_mean_score"]["n"].iloc[0]
    assert labels == [f"the {initial} initial heads", "the top 30 heads"]


def test_skipped_steps_are_marked(loaded):
    loss = panels(figures.training_curves(loaded.steps, loaded.spans))[0]
    (marks,) = [line for line in loss.lines if line.get_label() == "skipped step"]
    assert (np.asarray(marks.get_xdata()) / 4_194_304).tolist() == [150, 151]


def test_a_number_on_an_axis_survives_the_slimming_of_the_svg(loaded):
    svg = style.figure_svg(figures.training_curves(loaded.steps, loaded.spans), "key", "text")
    assert 0.0003 in map(float, re.findall(r">([\d.]+)</text>", svg))


def test_one_checkpoint_one_cell_one_head_can_be_drawn(run):
    first = frames.checkpoints(load_run(run.dir).cells).iloc[-1]
    loaded = load_run(run.dir)
    cells = frames.at_checkpoint(loaded.cells, first).head(1)
    scores = frames.at_checkpoint(loaded.scores, first).head(1)
    assert len(panels(figures.needle_heat_maps(cells))) == len(panels(figures.head_heat_maps(scores))) == 1
    figures.needle_curves(frames.needle_averages(cells), loaded.spans)
    for figure in (figures.needle_heat_maps(cells), figures.head_curves(frames.head_summary(scores), loaded.spans)):
        assert style.figure_svg(figure, "key", "text")


def test_cells_that_are_missing_or_not_finite_do_not_break_the_maps(loaded):
    cells = loaded.cells.copy()
    cells.loc[cells.index[-1], "mean_ppl"] = np.inf
    cells.loc[cells.index[-2], "mean_ppl"] = np.nan
    cells = cells.drop(index=cells.index[-3])
    texts = [text.get_text() for text in panels(figures.needle_heat_maps(cells))[-1].texts]
    assert texts[3::4][-3:] == ["–", "–", "∞"]


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
    assert style.number_text(value) == text


def test_lengths_and_tokens_read_as_people_write_them():
    assert [style.length_text(n) for n in (512, 1000, 1024, 65536)] == ["512", "1000", "1K", "64K"]
    assert [style.tokens_text(n) for n in (0, 12, 65536, 20e6, 1.5e9, 2e11)] == [
        "0",
        "12",
        "65.5K",
        "20M",
        "1.5B",
        "200B",
    ]
