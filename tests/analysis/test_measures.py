"""The frames of what is measured besides needle grid and heads, against the plainest loop over the same rows."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest
from megatron_lccp.analysis.measured.others import other_numbers
from scipy import stats

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.measured.benchmarks import benchmark_scores, read_scores, with_scores
from megatron_lccp.analysis.measured.corpora import corpus_ppl, log_law
from megatron_lccp.analysis.measured.heads import head_scores
from megatron_lccp.analysis.measured.interference import interference_cells
from megatron_lccp.analysis.measured.needles import depth_averages, length_bands, needle_cells
from megatron_lccp.analysis.measured.registry import make_charts
from megatron_lccp.analysis.measured.training import HEALTH_BINS, health, thinned_health
from megatron_lccp.analysis.report.findings import find
from megatron_lccp.analysis.run import load_run, load_runs
from megatron_lccp.records.store import RunStore
from tests.analysis import planted
from tests.synthetic_run import STEP_TOK, make_run


@pytest.fixture(scope="module")
def loaded(run):
    return load_run(run.dir)


def mean(values):
    return sum(values) / len(values)


def test_interference_cells(run, loaded):
    nll, exact = defaultdict(list), defaultdict(list)
    for row in run.rows:
        if row.monitor == "InterferenceGrid" and row.metric in ("answer_nll", "exact"):
            (nll if row.metric == "answer_nll" else exact)[row.step, row.before_tok, row.after_tok].append(row.value)
    found = {(c.step, c.before_tok, c.after_tok): c for c in loaded.interference.itertuples()}
    assert found.keys() == nll.keys() and len(found) == 13 * 9
    for key, values in nll.items():
        assert found[key].mean_ppl == pytest.approx(mean([math.exp(value) for value in values]))
        assert found[key].exact_share == pytest.approx(mean(exact[key])) and found[key].n == len(values)


def test_depth_curves_average_the_lengths_of_a_band(loaded):
    curves = depth_averages(loaded.cells)
    assert curves[["band_from_tok", "band_to_tok"]].drop_duplicates().to_numpy().tolist() == [
        [4096, 16384], [32768, 32768], [65536, 65536],
    ]  # fmt: skip
    cells = loaded.cells
    for line in curves.itertuples():
        inside = cells[(cells["step"] == line.step) & (cells["depth_cell"] == line.depth_cell)]
        inside = inside[inside["length_tok"].between(line.band_from_tok, line.band_to_tok)]
        assert line.mean_ppl == pytest.approx(mean(inside["mean_ppl"].tolist())) and line.cells == len(inside)


def test_length_bands_of_the_paper_and_of_one_length():
    lengths = pd.Series([1024 * k for k in (1, 8, 16, 24, 32, 40, 64)])
    assert length_bands(lengths).tolist() == [(1024, 16384)] * 3 + [(24576, 32768)] * 2 + [(40960, 65536)] * 2
    assert length_bands(pd.Series([512, 512])).tolist() == [(512, 512)] * 2


def test_positions_and_ablations(run, loaded):
    expected = [row for row in run.rows if row.metric == "position_nll"]
    assert loaded.positions["ppl"].tolist() == pytest.approx([math.exp(row.value) for row in expected])
    assert loaded.positions["to_tok"].tolist() == [row.to_tok for row in expected]
    change = defaultdict(list)
    for row in run.rows:
        if row.metric == "nll_change":
            change[row.step, row.ablated].append(row.value)
    found = {(a.step, a.ablated): a for a in loaded.ablations.itertuples()}
    assert {key for key in found if key[1] != "none"} == change.keys()
    for key, values in change.items():
        assert found[key].nll_change == pytest.approx(mean(values)) and (found[key].heads, found[key].n) == (2, 3)
        theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert found[key].high - found[key].low == pytest.approx(theirs.high - theirs.low, rel=0.15)
        assert found[key].low < found[key].nll_change < found[key].high
    assert math.isnan(found[300, "none"].nll_change) and found[300, "none"].heads == 0


def test_health_is_thinned_and_keeps_its_extremes(run, loaded):
    rows = RunStore(run.dir).read_rows(where=pc.field("monitor") == "health")
    assert loaded.health.groupby("metric").size().eq(HEALTH_BINS).all()
    entropy, found = rows[rows["metric"] == "router_entropy"], loaded.health.query("metric == 'router_entropy'")
    assert found["low"].min() == entropy["value"].min() and found["high"].max() == entropy["value"].max()
    assert found["value"].mean() == pytest.approx(entropy["value"].mean()) and found["n"].sum() == len(entropy)
    load = rows[rows["metric"] == "expert_load"].groupby("step")["value"].agg(["max", "mean"])
    worst = loaded.health.query("metric == 'expert_load_max'").set_index("step")["value"]
    assert worst.to_dict() == pytest.approx((load["max"] / load["mean"]).to_dict())


def test_long_health_is_binned_over_steps():
    steps = np.arange(1, 1001)
    rows = pd.DataFrame({"run": "r", "step": steps, "tokens": steps, "stage": "s", "metric": "router_entropy",
                         "value": steps * 1.0, "low": steps - 0.5, "high": steps + 0.5, "n": 2})  # fmt: skip
    found = health(rows)
    assert len(found) == HEALTH_BINS and found["n"].sum() == 2000
    assert (found["low"].min(), found["high"].max(), found["step"].iloc[-1]) == (0.5, 1000.5, 1000)


def test_the_law_of_the_corpora_is_found_again():
    tokens = np.array([0, 100, 1000, 10_000, 100_000]) + 7
    frame = pd.DataFrame({"run": "r", "step": tokens, "tokens": tokens, "stage": "s", "label": "en", "n": 9})
    with np.errstate(divide="ignore"):
        frame["ppl"] = np.where(tokens > 7, 20 - 0.7 * np.log(tokens - 7.0), 99.0)
    (law,) = log_law(frame, {"r": 7}).itertuples()
    assert (law.a, law.b, law.r2, law.n) == pytest.approx((-0.7, 20.0, 1.0, 4))
    assert log_law(frame.head(3), {"r": 7}).empty  # two points always lie on a line


def test_scores_from_a_csv_belong_to_the_checkpoint_at_their_tokens(run, tmp_path):
    path = tmp_path / "scores.csv"
    at = 200 * STEP_TOK
    path.write_text(f"benchmark,tokens,score\nruler,{at},71.5\nruler,{at * 1.005},72\nmrcr,123456,0.5\n")
    (loaded,) = with_scores(load_runs([run.dir]), path)
    lines = loaded.derived(benchmark_scores)[["benchmark", "step", "tokens", "score"]].to_numpy().tolist()
    assert lines == [["mrcr", -1, 123456, 0.5], ["ruler", 200, at, 71.5], ["ruler", 200, at, 72.0]]


def test_a_score_belongs_to_the_nearest_of_dense_checkpoints(tmp_path):
    """Of 200 checkpoints, several are within 1 % of the tokens of a late one; of two stages at one step, the later."""
    tokens = np.arange(1, 201) * 1000
    points = pd.DataFrame({"run": "7", "step": tokens // 1000, "tokens": tokens, "stage": "lccp"})
    points = pd.concat([points, points.tail(1).assign(stage="next")], ignore_index=True)
    path = tmp_path / "scores.csv"
    path.write_text("run,tokens,benchmark,score\n" + "".join(f"7,{at},ruler,1\n" for at in (150_000, 150_400, 200_000)))
    found = read_scores(path, points)
    assert found[["run", "step", "stage"]].values.tolist() == [
        ["7", 150, "lccp"], ["7", 150, "lccp"], ["7", 200, "next"],
    ]  # fmt: skip


def test_rows_of_probes_are_benchmarks_and_no_signals_of_their_own(tmp_path):
    """Figure 1 and the correlations take them as they take a CSV."""
    store = RunStore(tmp_path)
    for number, (one, two) in enumerate(((0.1, 0.3), (0.2, 0.4), (0.2, 0.6), (0.4, 0.8))):
        at = dict(tokens=1000 * number)
        rows = [planted.row("SFTProbe", "pass_at_1", value, "share", corpus="mrcr", sample=s, **at)
                for s, value in enumerate((one, two))]  # fmt: skip
        rows += [
            planted.row("Benchmarks", "f1", 40.0 + number, "points", **at),
            planted.row("SFTProbe", "window_time", 9.0, "s", **at),
        ]
        rows.append(planted.row("CorpusPPL", "nll", 3.0 - 0.1 * number**2, "nat", corpus="en", length_tok=64, **at))
        store.write_window(rows, 1000 * number)
    run = load_run(tmp_path)
    scores = run.derived(benchmark_scores).pivot(index="tokens", columns="benchmark", values="score")
    assert scores["pass_at_1 (mrcr)"].tolist() == pytest.approx([0.2, 0.3, 0.4, 0.6])
    assert scores["f1"].tolist() == [40, 41, 42, 43] and len(scores.columns) == 2 and run.derived(other_numbers).empty
    ((_, chart),) = make_charts([run], {"probe-benchmarks"})
    assert {line.label for line in chart.panels[0].lines} == {"pass_at_1 (mrcr)", "f1"}
    found = find(run).tables["correlations"].set_index("benchmark")
    assert set(found["signal"]) == {"corpus_nll[en]"} and found["n"].tolist() == [4, 4]
    assert found.loc["f1", "r"] == pytest.approx(np.corrcoef([0, -1, -4, -9], range(4))[0, 1])


def test_a_checkpoint_counts_once_in_a_correlation(tmp_path):
    """Where two stages meet at one step and where a benchmark was run twice."""
    sizes = dict(
        steps=40, lccp_from=20, every=10, lengths=(1024,), depths=(0.5,), samples=2, layers=1, heads=2, skip=()
    )
    written = make_run(tmp_path / "run", monitors=("CorpusPPL",), **sizes)
    at = [row for row in written if row.step == 20]
    RunStore(tmp_path / "run").write_window([replace(row, stage="pretrain", value=9.0) for row in at] + at, 20)
    path = tmp_path / "scores.csv"
    lines = [
        f"{step * STEP_TOK},ruler,{score}" for step, score in ((0, 1), (10, 4), (20, 2), (20, 6), (30, 5), (40, 9))
    ]
    path.write_text("\n".join(["tokens,benchmark,score", *lines]))
    (run,) = with_scores(load_runs([tmp_path / "run"]), path)
    found = find(run).tables["correlations"].set_index("signal").loc["corpus_nll[en]"]
    nll = [row.value for row in written if row.metric == "nll" and row.corpus == "en"]
    assert found["n"] == 5 and found["r"] == pytest.approx(np.corrcoef(nll, [1, 4, 4, 5, 9])[0, 1])


@pytest.mark.parametrize(
    ("text", "problem"),
    [("tokens,score\n1,2\n", "no column benchmark"),
     ("tokens,benchmark,score\n1,a,x\n", ":2: score should be a number"),
     ("tokens,benchmark,score\ninf,a,2\n", ":2: tokens should be a number"),
     ("tokens,benchmark,score,run\n1,a,2,other\n", "run 'other' is not among the runs"),
     ("tokens,benchmark,score,run\n1,a,2,other\n1,a,2,\n", "run 'other' is not among the runs"),
     ("", "not a CSV file")],
)  # fmt: skip
def test_a_wrong_csv_is_refused_in_one_line(run, tmp_path, text, problem):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem) as error:
        with_scores(load_runs([run.dir]), path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_scores_need_a_file_and_of_several_runs_the_run_of_each(tmp_path):
    sizes = dict(steps=4, lccp_from=2, every=2, lengths=(1024,), depths=(0.5,), samples=1, layers=1, heads=2, skip=())
    folders, path = [tmp_path / "one", tmp_path / "two"], tmp_path / "scores.csv"
    for folder in folders:
        make_run(folder, name=folder.name, **sizes)
    with pytest.raises(ValueError, match=rf"^{path}: cannot be read: No such file or directory$"):
        with_scores(load_runs(folders), path)
    path.write_text("tokens,benchmark,score\n1,a,2\n")
    with pytest.raises(ValueError, match=rf"^{path}: no column run, .* of 2 runs a score belongs: one, two$"):
        with_scores(load_runs(folders), path)
    assert len(with_scores(load_runs(folders[:1]), path)[0].derived(benchmark_scores)) == 1
    path.write_text("tokens,benchmark,score,run\n1,a,2,two\n")
    assert [len(run.derived(benchmark_scores)) for run in with_scores(load_runs(folders), path)] == [0, 1]


def test_runs_of_one_name_are_told_apart_and_a_folder_means_all_in_it(tmp_path):
    sizes = dict(steps=4, lccp_from=2, every=2, lengths=(1024,), depths=(0.5,), samples=1, layers=1, heads=2, skip=())
    for place, name in (("a", "same"), ("b", "same"), ("c", "third")):
        make_run(tmp_path / place, name=name, **sizes)
    runs = load_runs([tmp_path, tmp_path / "a"])
    assert [run.name for run in runs] == ["same (a)", "same (b)", "third"]
    for run in runs:
        for frame in (
            run.frame(needle_cells),
            run.frame(head_scores),
            run.frame(corpus_ppl),
            run.derived(thinned_health),
            run.frame(interference_cells),
            run.rows,
        ):
            assert set(frame["run"]) == {run.name}
    assert frames.checkpoints(runs[0].frame(needle_cells))["step"].tolist() == [0, 2, 4]
