"""Benchmark scores from rows and from a CSV, and what they are correlated with."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from megatron_lccp.analysis.measured.benchmarks import benchmark_scores, read_scores, with_scores
from megatron_lccp.analysis.measured.registry import make_charts, unclaimed
from megatron_lccp.analysis.report.findings import find
from megatron_lccp.analysis.run import load_run, load_runs
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import Metric
from tests.analysis import planted
from tests.synthetic_run import STEP_TOK, make_run


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
    benchmark = dict(about="A task.", level="behavioural", better="higher", benchmark=True)
    planted.declare(store, "SFTProbe", Metric(name="pass_at_1", unit="share", series=("corpus",), **benchmark))
    planted.declare(store, "Benchmarks", Metric(name="f1", unit="points", **benchmark))
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
    assert scores["f1"].tolist() == [40, 41, 42, 43] and len(scores.columns) == 2
    assert {measure.monitor for measure in run.measures if measure not in unclaimed(run)} == {
        "SFTProbe", "Benchmarks", "CorpusPPL"}  # fmt: skip
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
