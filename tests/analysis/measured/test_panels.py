"""What a stranger's monitor measured, shown by what it declares: figures, tables, facts, scalars and signals."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from megatron_lccp.analysis.charts.chart import Curves, Maps
from megatron_lccp.analysis.charts.draw import draw
from megatron_lccp.analysis.charts.interactive import HUGE, payload
from megatron_lccp.analysis.charts.style import figure_png
from megatron_lccp.analysis.measured.panels import numbers
from megatron_lccp.analysis.measured.registry import (
    make_charts,
    run_highlights,
    run_scalars,
    run_signals,
    run_tables,
    unclaimed,
)
from megatron_lccp.analysis.report.findings import find
from megatron_lccp.analysis.run import load_run
from megatron_lccp.analysis.verdict.judge import judge
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import Metric
from tests.analysis import planted
from tests.analysis.loops import panels
from tests.analysis.stranger import CHECKPOINTS, LAGS, STEP_TOK, TEMPERATURES, Stranger, make_stranger


@pytest.fixture(scope="module")
def strange(stranger):
    """The run as a report sees it."""
    return load_run(stranger.dir)


@pytest.fixture(scope="module")
def truth(stranger) -> pd.DataFrame:
    """Its rows, a line each."""
    return stranger.truth


@pytest.fixture(scope="module")
def found(strange) -> dict[str, Curves | Maps]:
    """Its figures by key, those of its own metrics alone."""
    charts = {figure.key: chart for figure, chart in make_charts([strange])}
    return {key: chart for key, chart in charts.items() if key.startswith("Stranger-")}


def of_metric(truth: pd.DataFrame, metric: str, *by: str) -> pd.Series:
    """Means by step and coordinates, as pandas has them; a value that is not a number makes the mean none."""
    return truth[truth["metric"] == metric].groupby(["step", *by])["value"].agg(lambda v: np.mean(v.to_numpy()))


def test_everything_that_it_measured_has_a_figure_and_the_benchmark_is_in_figure_1(strange, found):
    assert set(found) == {
        "Stranger-recall", "Stranger-by_task", "Stranger-calm", "Stranger-spread", "Stranger-perplexed",
        "Stranger-fragile", "Stranger-tilt-en", "Stranger-tilt-zh", "Stranger-pull-en", "Stranger-pull-zh",
    }  # fmt: skip
    ((_, chart),) = make_charts([strange], {"probe-benchmarks"})
    assert [line.label for line in chart.panels[0].lines] == ["grade"]


def test_no_axis_is_a_curve_over_training_tokens(truth, found):
    (panel,) = found["Stranger-calm"].panels
    (line,) = panel.lines
    assert (panel.x, panel.y_label, line.label) == ("tokens", "calm (nat)", "")
    assert line.frame["value"].tolist() == pytest.approx(of_metric(truth, "calm").tolist())
    assert line.frame["tokens"].tolist() == [step * STEP_TOK for step in range(CHECKPOINTS)]
    assert set(line.frame["rows"]) == {4} and "mean of 4 rows; 13 checkpoints" in found["Stranger-calm"].caption


def test_one_axis_is_a_curve_a_checkpoint_over_it(truth, found):
    (panel,) = found["Stranger-recall"].panels
    assert (panel.x, panel.x_label, panel.x_scale, panel.y_scale) == ("lag_tok", "lag (tokens)", "length", "share")
    assert panel.log_x and len(panel.lines) == 6
    expected = of_metric(truth, "recall", "lag_tok")
    for line in panel.lines:
        step = line.frame["step"].iloc[0]
        assert line.frame["lag_tok"].tolist() == list(LAGS)
        assert line.frame["value"].tolist() == pytest.approx(expected[step].tolist())
    assert [line.frame["step"].iloc[0] for line in panel.lines][:: len(panel.lines) - 1] == [0, CHECKPOINTS - 1]


@pytest.mark.parametrize("key, language", [("spread", None), ("tilt", "en"), ("tilt", "zh")])
def test_two_axes_are_a_map_of_every_checkpoint_and_of_every_series(truth, found, key, language):
    chart = found["-".join(filter(None, ("Stranger", key, language)))]
    expected = truth[truth["metric"] == key]
    expected = expected if language is None else expected[expected["language"] == language]
    grids = list(chart.grids())
    assert [point["step"] for point, *_ in grids] == list(range(CHECKPOINTS))
    for point, grid, _ in grids:
        at = expected[expected["step"] == point["step"]]
        np.testing.assert_allclose(grid, at.pivot(index="lag_tok", columns="temperature", values="value"))
    assert (chart.axis("temperature"), chart.axis("lag_tok")) == (list(TEMPERATURES), list(LAGS))
    assert (chart.x_label, chart.y_label, chart.title) == (
        "temperature", "lag (tokens)", f"Stranger: {key}" + (f" ({language})" if language else ""),
    )  # fmt: skip
    assert payload(chart)["y"] == ["64", "1K", "16K"] and payload(chart)["x"] == ["0.5", "1"]


def test_values_from_minus_1_to_1_have_colours_to_both_sides_of_0(found):
    chart, (low, high) = found["Stranger-tilt-en"], found["Stranger-tilt-en"].range()
    assert chart.diverging and low == -high and not any(marked.any() for *_, marked in chart.grids())
    assert not found["Stranger-spread"].diverging


def test_heads_are_maps_with_the_number_of_their_samples(truth, found):
    for language in ("en", "zh"):
        chart = found[f"Stranger-pull-{language}"]
        assert "mean of 4 rows" in chart.caption and set(chart.frame["rows"]) == {4}
        of_language = truth[(truth["metric"] == "pull") & (truth["language"] == language)]
        for point, grid, _ in chart.grids():
            at = of_language[of_language["step"] == point["step"]].groupby(["layer", "head"])["value"].mean().unstack()
            np.testing.assert_allclose(grid, at)


def test_an_axis_of_names_is_a_line_each(truth, found):
    (panel,) = found["Stranger-by_task"].panels
    expected = of_metric(truth, "by_task", "task")
    assert (panel.x, panel.y_scale) == ("tokens", "share") and len(panel.lines) == 2
    for line in panel.lines:
        assert line.frame["value"].tolist() == pytest.approx(expected.xs(line.label, level="task").tolist())


def test_series_are_lines_and_three_decades_are_on_a_log_axis(truth, found):
    (panel,) = found["Stranger-perplexed"].panels
    assert panel.log_y and panel.y_label == "perplexed (ppl)"
    expected = of_metric(truth, "perplexed", "corpus", "language")
    assert [line.label for line in panel.lines] == ["books, en", "books, zh", "code, en"]
    for line in panel.lines:
        corpus, language = line.label.split(", ")
        assert line.frame["value"].tolist() == pytest.approx(expected[:, corpus, language].tolist())


def test_what_is_not_finite_is_seen_and_breaks_nothing(found):
    (trace,) = payload(found["Stranger-fragile"])["panels"][0]["traces"]
    assert (trace["y"][5], trace["y"][8]) == (None, HUGE) and len([y for y in trace["y"] if y and y < HUGE]) == 11


@pytest.mark.parametrize("bounds, logged", [((0.0, None), True), ((None, None), False)])
def test_only_what_cannot_fall_under_a_bound_is_on_a_log_axis(tmp_path: Path, bounds, logged: bool):
    store = RunStore(tmp_path)
    planted.declare(store, "Mine", Metric(name="m", unit="nat", about="", bounds=bounds))
    for step, value in enumerate((1.0, 50.0, 1000.0)):
        store.write_window([planted.row("Mine", "m", value, "nat", tokens=step)], step)
    ((_, chart),) = make_charts([load_run(tmp_path)], {"Mine-m"})
    assert chart.panels[0].log_y is logged


@pytest.mark.parametrize("value, ends", [(0.0, (0, 1)), (1.0, (0, 1)), (7.0, (6, 8))])
def test_a_map_of_one_value_has_a_scale_of_some_width(tmp_path: Path, value: float, ends):
    store = RunStore(tmp_path)
    planted.declare(store, "Mine", Metric(name="end_nll", unit="share", about="", axes=("gap_tok", "heat")))
    own = [dict(gap_tok=gap, heat=heat) for gap in (1, 2) for heat in (0.5, 1.0)]
    store.write_window([planted.row("Mine", "end_nll", value, "share", tokens=0, own=each) for each in own], 0)
    ((_, chart),) = make_charts([load_run(tmp_path)], {"Mine-end_nll"})
    assert chart.range() == ends and chart.title == "Mine: end NLL" and chart.x_label == "gap (tokens)"


def test_every_figure_can_be_drawn_with_labelled_axes(found):
    for key, chart in found.items():
        figure = draw(chart)
        for axes in panels(figure):
            assert axes.get_xlabel() or figure.get_supxlabel(), key
            assert axes.get_ylabel() or figure.get_supylabel(), key
        assert figure_png(figure, 30)[:4] == b"\x89PNG"


def test_captions_say_what_it_is_and_which_way_is_better(strange, found):
    for metric in {measure.metric.name: measure.metric for measure in unclaimed(strange)}.values():
        for key, chart in found.items():
            if key.split("-")[1] == metric.name:
                assert chart.caption.startswith(metric.about)
                assert ("is better" in chart.caption) == (metric.better is not None)
    assert "From -1 to 1." in found["Stranger-tilt-en"].caption and "0 or more." in found["Stranger-calm"].caption


def test_tables_hold_the_means(strange, truth):
    tables = {re.search('id="([^"]+)"', html)[1]: html for html in run_tables(strange)}
    cells = {key: re.findall("<td[^>]*>(.*?)</td>", html) for key, html in tables.items()}
    calm = of_metric(truth, "calm")
    assert cells["t-Stranger-calm"][3::5] == [f"{value:.4g}" for value in calm]
    spread = truth[truth["metric"] == "spread"].set_index(["step", "temperature", "lag_tok"])["value"]
    last = cells["t-Stranger-spread"][-7:]
    assert last[1:6] == ["12", "lccp", "1", "16K", f"{spread[12, 1.0, 16384]:.4g}"]
    assert "sort &lt;fast&gt;" in cells["t-Stranger-by_task"]
    assert {key for key in tables if key.startswith("t-Stranger")} == {
        f"t-Stranger-{measure.metric.name}" for measure in unclaimed(strange)
    }


def test_scalars_are_the_means_of_the_last_checkpoint(strange, truth):
    last = truth[truth["step"] == CHECKPOINTS - 1]
    expected = {f"Stranger/{name}": of_metric(last, name).mean() for name in ("calm", "recall", "spread", "fragile")}
    expected |= {"Stranger/grade": of_metric(last, "grade").iloc[0]}
    for name, by in (("tilt", "language"), ("pull", "language"), ("by_task", "task")):
        for value, mean in last[last["metric"] == name].groupby(by)["value"].mean().items():
            expected[f"Stranger/{name}_{str(value).replace(' <', '_').replace('>', '')}"] = mean
    for (corpus, language), value in of_metric(last, "perplexed", "corpus", "language").droplevel(0).items():
        expected[f"Stranger/perplexed_{corpus}_{language}"] = value
    assert run_scalars(strange) == pytest.approx(expected)


def test_signals_are_what_has_a_better_way_and_the_verdict_asks_of_the_judged(strange, truth):
    signals = {signal.name: signal for signal in run_signals(strange)}
    assert set(signals) == {
        "Stranger.grade", "Stranger.recall", "Stranger.by_task[copy]", "Stranger.by_task[sort <fast>]",
        "Stranger.calm", "Stranger.perplexed[books, en]", "Stranger.perplexed[books, zh]",
        "Stranger.perplexed[code, en]", "Stranger.fragile", "Stranger.pull[en]", "Stranger.pull[zh]",
    }  # fmt: skip
    assert signals["Stranger.recall"].value_k == pytest.approx(of_metric(truth, "recall").to_numpy())
    of_sample = truth[truth["metric"] == "recall"].groupby(["step", "sample"])["value"].mean().unstack()
    np.testing.assert_allclose(signals["Stranger.recall"].sample_ks, of_sample)
    pull = truth[(truth["metric"] == "pull") & (truth["language"] == "zh")].groupby("step")["value"].mean()
    assert signals["Stranger.pull[zh]"].value_k == pytest.approx(pull.to_numpy())
    verdict = judge(strange)
    assert {s.signal: (s.level, s.margin, s.samples) for s in verdict.signals} == {
        "Stranger.recall": ("behavioural", 0.5, 4), "Stranger.calm": ("probabilistic", 0.25, 4),
        "Stranger.fragile": ("probabilistic", 0.01, 0),
    }  # fmt: skip
    states = {signal.signal: signal.state for signal in verdict.signals}
    assert (states["Stranger.fragile"], states["Stranger.calm"]) == ("improving", "saturated")  # 0.02 and 0.11 nat
    strict = {s.signal: s.state for s in judge(strange, {"Stranger.calm": 0.05}).signals}
    assert strict["Stranger.calm"] == "improving"
    assert [alert.text for alert in verdict.alerts] == [
        "Stranger.fragile is nan at 5M tokens", "Stranger.fragile is inf at 8M tokens",
    ]  # fmt: skip


def test_correlations_are_of_every_signal_with_its_benchmark(strange, truth):
    found = find(strange).tables["correlations"].set_index("signal")
    assert set(found["benchmark"]) == {"grade"}
    assert set(found.index) == {signal.name for signal in run_signals(strange)} - {"Stranger.grade"}
    grade = of_metric(truth, "grade")
    for name, values in (
        ("Stranger.calm", of_metric(truth, "calm")), ("Stranger.recall", of_metric(truth, "recall")),
        ("Stranger.by_task[copy]", of_metric(truth, "by_task", "task").xs("copy", level="task")),
    ):  # fmt: skip
        assert found.loc[name, "r"] == pytest.approx(np.corrcoef(values, grade)[0, 1]) and found.loc[name, "n"] == 13


def test_facts_are_of_the_judged_with_their_interval(strange, truth):
    facts = {fact.label: fact for fact in run_highlights(strange)}
    assert set(facts) == {"Stranger: calm", "Stranger: recall", "Stranger: fragile"}
    ends = of_metric(truth, "calm").iloc[[0, -1]]
    assert facts["Stranger: calm"].value == " → ".join(f"{value:.2f}" for value in ends)
    assert facts["Stranger: calm"].change.startswith(f"{ends.iloc[1] - ends.iloc[0]:+.3g} nat [")
    share = of_metric(truth, "recall").iloc[-1]
    assert facts["Stranger: recall"].value.endswith(f"→ {100 * share:.1f} %")
    assert facts["Stranger: recall"].change.endswith(" 4 samples")


def test_of_two_runs_of_which_one_measured_it_one_is_shown(stranger, run, truth):
    runs = [load_run(stranger.dir), load_run(run.dir)]
    charts = {figure.key: chart for figure, chart in make_charts(runs)}
    assert set(charts["Stranger-calm"].frame["run"]) == {"strange"}
    assert [line.label for line in charts["Stranger-calm"].panels[0].lines] == ["strange"]
    assert [panel.title for panel in charts["Stranger-recall"].panels] == ["strange"]
    assert {point["run"] for point, *_ in charts["Stranger-spread"].grids()} == {"strange"}
    for measure in unclaimed(runs[0]):
        assert not len(numbers(runs[1], measure))


def test_two_runs_that_declare_it_in_other_words_share_one_figure(stranger, tmp_path: Path):
    make_stranger(tmp_path, name="later", steps=range(3))
    text = (tmp_path / "metrics.json").read_text().replace("No axis, and samples.", "Said anew.")
    (tmp_path / "metrics.json").write_text(text)
    keys = [figure.key for figure, _ in make_charts([load_run(stranger.dir), load_run(tmp_path)])]
    assert len(keys) == len(set(keys)) and "Stranger-calm" in keys


def test_what_no_monitor_declares_is_a_curve_by_corpus_and_no_signal(tmp_path: Path):
    """A run of version 0.1, which kept no metrics.json, with a monitor of others."""
    store = RunStore(tmp_path)
    for step in range(4):
        rows = [planted.row("Mine", "entropy", 2 - step / 10 + place, "nat", tokens=step, corpus=corpus)
                for place, corpus in enumerate(("en", "zh"))]  # fmt: skip
        store.write_window(rows + [planted.row("Mine", "plain", math.nan, "count", tokens=step)], step)
    run = load_run(tmp_path)
    charts = {figure.key: (figure.level, chart) for figure, chart in make_charts([run])}
    level, chart = charts["Mine-entropy"]
    lines = {line.label: line.frame["value"].tolist() for line in chart.panels[0].lines}
    assert level == "training" and lines["en"] == pytest.approx([2, 1.9, 1.8, 1.7]) and lines["zh"][0] == 3
    assert "does not say what it is" in chart.caption and charts["Mine-plain"][1].frame["value"].isna().all()
    assert run_signals(run) == () and run_scalars(run) == pytest.approx(
        {"Mine/entropy_en": 1.7, "Mine/entropy_zh": 2.7}
    )
    assert draw(charts["Mine-plain"][1]) and payload(charts["Mine-plain"][1])


def test_a_run_of_0_1_that_goes_on_with_other_monitors_keeps_its_figures(tmp_path: Path):
    """Its metrics.json knows the monitors of now alone, and the rows of before are there too."""
    store = RunStore(tmp_path)
    for step in range(4):
        rows = [planted.row("CorpusPPL", "nll", 3 - step / 10, "nat", tokens=step, corpus="en", length_tok=64)]
        store.write_window(rows + planted.needle_rows([1.0, 2.0], tokens=step, length_tok=64, depth_cell=0.5), step)
    planted.declare(store, "Mine", Metric(name="entropy", unit="nat", about=""))
    names = [signal.name for signal in run_signals(load_run(tmp_path))]
    assert names == ["answer_nll", "corpus_nll[en]"]


def test_coordinates_that_some_rows_lack_are_left_out_of_the_figure(tmp_path: Path):
    """An axis that half of the rows do not have, and a series of numbers."""
    store = RunStore(tmp_path)
    metric = Metric(name="m", unit="count", about="", axes=("order",), series=("draw",))
    planted.declare(store, "Mine", metric)
    for step in range(2):
        rows = [planted.row("Mine", "m", 10 * order + draw, "count", tokens=step, own=dict(order=order, draw=draw))
                for order in (3, 1, 2) for draw in (1, 2)]  # fmt: skip
        store.write_window([*rows, planted.row("Mine", "m", 99.0, "count", tokens=step)], step)
    ((_, chart),) = make_charts([load_run(tmp_path)], {"Mine-m"})
    assert [panel.title for panel in chart.panels] == ["draw 1", "draw 2"] and 99.0 not in chart.frame["value"].tolist()
    assert chart.panels[1].lines[0].frame[["order", "value"]].to_numpy().tolist() == [[1, 12], [2, 22], [3, 32]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(axes=("a", "b", "c")), "more than two"), (dict(level="behavioral"), "none of behavioural, probabilistic"),
     (dict(better="up"), "none of higher, lower"), (dict(judged=True), "needs `better` and `level`"),
     (dict(axes=("stage",)), "would hide a column"), (dict(series=("value",)), "would hide a column")],
)  # fmt: skip
def test_a_declaration_that_makes_no_sense_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        Metric(name="m", unit="nat", about="", **fields)
    assert str(error.value).startswith("m") and "\n" not in str(error.value)


def test_all_fields_of_a_metric_come_back_from_the_run_directory(stranger):
    read = RunStore(stranger.dir).read_metrics()
    for metric in Stranger.metrics:
        assert dataclasses.asdict(read["Stranger", metric.name]) == dataclasses.asdict(metric)
