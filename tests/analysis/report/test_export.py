"""What is exported can be read again by others, and is what the report shows."""

import json
import math
import shutil
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from megatron_lccp.analysis.measured.benchmarks import with_scores
from megatron_lccp.analysis.measured.registry import figures_of, make_charts
from megatron_lccp.analysis.report.export import export
from megatron_lccp.analysis.report.report import write_report
from megatron_lccp.analysis.run import load_runs
from megatron_lccp.cli import main
from megatron_lccp.records.store import RunStore
from tests.synthetic_run import STEP_TOK, make_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small run with benchmark scores: the run, the folder of the files, their paths, the run as loaded."""
    tmp_path = tmp_path_factory.mktemp("exported")
    sizes = dict(lengths=(1024, 4096), depths=(0.0, 0.5, 1.0), samples=2, layers=2, heads=3, skip=(7,))
    rows = make_run(tmp_path / "run", steps=20, lccp_from=10, every=5, **sizes)
    small_run = SimpleNamespace(dir=tmp_path / "run", rows=rows)
    scores = tmp_path / "scores.csv"
    lines = [f"{step * STEP_TOK},ruler,{score}" for step, score in ((0, 3), (5, 4), (10, 4), (15, 6), (20, 9))]
    scores.write_text("\n".join(["tokens,benchmark,score", *lines]))
    out = tmp_path / "out"
    return small_run, out, list(export([small_run.dir], out, scores)), with_scores(load_runs([small_run.dir]), scores)


def test_every_figure_is_a_png_an_svg_and_the_csv_of_its_frame(exported):
    _, out, paths, runs = exported
    assert {path for path in out.rglob("*") if path.is_file()} == {*paths, out / "export.json"}
    for figure, chart in make_charts(runs):
        assert (out / f"figures/{figure.key}.png").read_bytes()[:4] == b"\x89PNG"
        assert "</svg>" in (out / f"figures/{figure.key}.svg").read_text()
        csv = pd.read_csv(out / f"figures/{figure.key}.csv")
        assert list(csv.columns) == list(chart.frame.columns) and len(csv) == len(chart.frame)
        for name in csv.select_dtypes("number"):
            np.testing.assert_allclose(csv[name], chart.frame[name].astype(float), rtol=1e-12, err_msg=name)
    assert len(list(out.glob("figures/*"))) == 3 * len(figures_of(runs))


def test_tables_of_the_paper_are_csv(exported):
    tables = {path.stem: pd.read_csv(path) for path in exported[1].glob("tables/*.csv")}
    assert tables.keys() >= {"verdict", "correlations", "overlaps", "trajectories", "effective_length"}
    assert (tables["correlations"]["floor"].dropna().between(0, 1)).all() and tables["correlations"]["floor"].any()
    assert set(tables["correlations"]["benchmark"]) == {"ruler"} and len(tables["overlaps"]) == 4
    assert {"r", "p", "low", "high", "n", "floor"} <= set(tables["correlations"].columns)
    assert all(set(table["run"]) == {"synthetic <run>"} for table in tables.values())


def test_rows_and_measures_are_for_pandas(exported):
    small_run, out, *_ = exported
    rows = pd.read_parquet(out / "rows.parquet")
    expected = RunStore(small_run.dir).read_rows(health=False)
    assert rows["value"].tolist() == expected["value"].tolist() and list(rows.columns) == [*expected.columns, "own"]
    measures = pd.read_csv(out / "measures.csv")
    cells = measures[
        measures["monitor"].isin(["NeedleGrid", "InterferenceGrid"]) & (measures["metric"] == "answer_nll")
    ]
    assert len(cells) == 5 * (2 * 3 + 3 * 3) and set(cells["rows"]) == {2}  # samples of other lengths in one cell
    groups = defaultdict(list)
    for row in small_run.rows:
        if row.metric == "retrieval_score":
            groups[row.step, row.layer, row.head].append(row.value)
    found = measures[measures["metric"] == "retrieval_score"]
    assert {(m.step, m.layer, m.head): (pytest.approx(m.mean), m.rows) for m in found.itertuples(name="M")} == {
        key: (np.mean(values), len(values)) for key, values in groups.items()
    }


def test_a_number_that_is_none_is_exported_as_one(small_run, tmp_path):
    """Of a run that diverged: NaN is no missing value."""
    store = RunStore(small_run.dir)
    rows = [replace(row, value=np.nan) if row.metric == "answer_nll" else row for row in small_run.rows]
    store.write_window([row for row in rows if row.step == 20], 20)
    list(export([small_run.dir], tmp_path, only=("rows",)))
    found = pd.read_parquet(tmp_path / "rows.parquet")
    assert len(found) == len(rows) and found[found["value"].isna()]["step"].unique().tolist() == [20]
    measures = pd.read_csv(tmp_path / "measures.csv").query("metric == 'answer_nll'")
    assert measures["mean"].isna().tolist() == (measures["step"] == 20).tolist()


def test_heads_are_in_the_public_format(exported):
    """{"layer-head": [score of each sample]}, one list of the same length for every head."""
    small_run, out, *_ = exported
    files = sorted((out / "heads" / "synthetic_run").glob("*.json"))
    assert [path.name for path in files] == [f"step-{step:08d}.json" for step in (0, 5, 10, 15, 20)]
    scores = json.loads(files[-1].read_text())
    expected = defaultdict(list)
    for row in small_run.rows:
        if row.step == 20 and row.metric == "retrieval_score":
            expected[f"{row.layer}-{row.head}"].append(row.value)
    assert scores == expected and len(scores) == 6


def test_runs_of_one_name_in_folders_of_one_name_are_kept_apart(exported, tmp_path):
    """Two clusters, the same configuration: no file of one run is written over by the other's."""
    small_run, *_ = exported
    runs = [shutil.copytree(small_run.dir, tmp_path / place / "run") for place in ("a", "b")]
    names = [f"synthetic <run> ({place}/run)" for place in ("a", "b")]
    assert [run.name for run in load_runs(runs)] == names
    paths = list(export(runs, tmp_path / "out", only=("rows", "heads")))
    assert len(set(paths)) == len(paths) == 2 + 2 * 5
    assert set(pd.read_parquet(tmp_path / "out/rows.parquet")["run"]) == set(names)


def test_another_kind_is_refused_before_anything_is_written(exported, tmp_path):
    with pytest.raises(ValueError, match="'figure' is not among figures, tables, rows, heads"):
        list(export([exported[0].dir], tmp_path / "out", only=("rows", "figure")))
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_export_wrote_and_this_one_does_not_is_gone(small_run, tmp_path):
    """Scores were given, and the run was another; files of others stay, and so does a kind that is not written."""
    out, scores = tmp_path / "out", tmp_path / "scores.csv"
    scores.write_text("tokens,benchmark,score\n" + "".join(f"{s * STEP_TOK},ruler,{s}\n" for s in (0, 5, 10, 15, 20)))
    first = set(export([small_run.dir], out, scores))
    own = [out / "figures/architecture.png", out / "tables/mine.csv", out / "heads/synthetic_run/notes.json"]
    for path in own:
        path.write_text("mine")
    RunStore(small_run.dir).windows()[10].unlink()
    second = set(export([small_run.dir], out, only=("figures", "tables")))
    gone = {out / f"figures/probe-benchmarks.{kind}" for kind in ("png", "svg", "csv")}
    gone |= {out / "tables/correlations.csv"}
    assert first - {path for path in first if path.exists()} == gone and not gone & second
    heads = set(export([small_run.dir], out, only=("heads",)))
    assert {path for path in out.rglob("step-*.json")} == heads and len(heads) == 4
    assert (out / "rows.parquet").exists() and all(path.read_text() == "mine" for path in own)


def test_a_score_that_is_not_a_number_is_null(small_run, tmp_path):
    """JSON knows no NaN; and heads that are not numbers throughout can be drawn."""
    for step in (0, 5, 10, 15, 20):
        rows = [replace(row, value=math.nan) if row.metric == "retrieval_score" else row
                for row in small_run.rows if row.step == step]  # fmt: skip
        RunStore(small_run.dir).write_window(rows, step)
    paths = list(export([small_run.dir], tmp_path / "out", only=("figures", "heads")))
    (scores,) = (json.loads(path.read_text(), parse_constant=pytest.fail) for path in paths if "00000020" in path.name)
    assert scores == {f"{layer}-{head}": [None, None] for layer in range(2) for head in range(3)}
    assert tmp_path / "out/figures/head-curves.png" in paths
    write_report(small_run.dir)


def test_the_command_writes_a_part_and_says_where(small_run, capsys):
    assert main(["export", str(small_run.dir), "--only", "heads"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(str(small_run.dir / "export" / "heads") in line for line in lines)
    assert main(["export", str(small_run.dir / "rows")]) == 2
    assert "not a run directory" in capsys.readouterr().err


@pytest.fixture(scope="module")
def of_stranger(stranger, tmp_path_factory):
    """The folder of an export of a run with a monitor of others."""
    out = tmp_path_factory.mktemp("strange")
    list(export([stranger.dir], out))
    return out


def test_a_monitor_of_others_is_exported_with_its_own_coordinates(stranger, of_stranger):
    rows = pd.read_parquet(of_stranger / "rows.parquet")
    own = pd.DataFrame([json.loads(text) if text else {} for text in rows["own"]])
    assert own["temperature"].dropna().unique().tolist() == [0.5, 1.0] and len(rows) == len(stranger.truth)
    for name in ("lag_tok", "temperature", "language", "task"):
        assert own[name].fillna(-1).tolist() == stranger.truth[name].fillna(-1).tolist(), name
    measures = pd.read_csv(of_stranger / "measures.csv")
    for metric, by in (("recall", ["lag_tok"]), ("tilt", ["temperature", "lag_tok", "language"])):
        expected = stranger.truth.query("metric == @metric").groupby(["step", *by])["value"].agg(["mean", "size"])
        found = measures.query("metric == @metric").set_index(["step", *by]).sort_index()
        assert found["mean"].tolist() == pytest.approx(expected["mean"].tolist())
        assert found["rows"].tolist() == expected["size"].tolist()


def test_figures_of_a_monitor_of_others_are_files_with_the_means(stranger, of_stranger):
    keys = {path.stem for path in of_stranger.glob("figures/*.csv")}
    assert {"Stranger-calm", "Stranger-recall", "Stranger-spread", "Stranger-tilt-en", "probe-benchmarks"} <= keys
    for key in keys:
        assert (of_stranger / f"figures/{key}.png").read_bytes()[:4] == b"\x89PNG"
        assert "</svg>" in (of_stranger / f"figures/{key}.svg").read_text()
    csv = pd.read_csv(of_stranger / "figures/Stranger-recall.csv").set_index(["step", "lag_tok"])["value"]
    expected = stranger.truth.query("metric == 'recall'").groupby(["step", "lag_tok"])["value"].mean()
    pd.testing.assert_series_equal(csv, expected, check_index_type=False)
    verdict = pd.read_csv(of_stranger / "tables/verdict.csv")
    assert verdict["signal"].tolist() == ["Stranger.recall", "Stranger.calm", "Stranger.fragile"]
    assert "Stranger.by_task[copy]" in pd.read_csv(of_stranger / "tables/correlations.csv")["signal"].tolist()


def test_an_index_that_leads_out_of_the_folder_removes_nothing_there(small_run, tmp_path):
    """It may have been edited, or come from elsewhere."""
    out, mine = tmp_path / "out", tmp_path / "mine.json"
    mine.write_text("mine")
    out.mkdir()
    for text in (json.dumps({"heads": ["../mine.json", str(mine), 3]}), "{", "[]", '{"heads": 3}'):
        (out / "export.json").write_text(text)
        paths = list(export([small_run.dir], out, only=("heads",)))
        assert mine.read_text() == "mine" and all(path.exists() for path in paths) and len(paths) == 5
        index = json.loads((out / "export.json").read_text())
        assert index == {"heads": [path.relative_to(out).as_posix() for path in paths]}
