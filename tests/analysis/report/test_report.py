"""The page holds every figure and the numbers of the frames, needs nothing from outside, and says what is missing."""

import html
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from megatron_lccp.analysis.charts.chart import NothingToDraw
from megatron_lccp.analysis.measured.benchmarks import benchmark_scores
from megatron_lccp.analysis.measured.corpora import corpus_ppl
from megatron_lccp.analysis.measured.heads import head_scores
from megatron_lccp.analysis.measured.needles import grid_averages, needle_cells
from megatron_lccp.analysis.measured.registry import figures_of, make_charts, run_highlights, run_tables
from megatron_lccp.analysis.measured.training import window_times
from megatron_lccp.analysis.report import page
from megatron_lccp.analysis.report.page import SCRIPTS, asset
from megatron_lccp.analysis.report.report import LEVELS, write_report
from megatron_lccp.analysis.run import load_run
from megatron_lccp.analysis.statistics.correlations import noise_floor
from megatron_lccp.analysis.verdict.judge import judge
from megatron_lccp.analysis.verdict.text import interval_text
from megatron_lccp.cli import main
from megatron_lccp.records.store import RunStore, row_schema
from megatron_lccp.text import length_text, number_text
from tests.synthetic_run import make_run

VOID = {"meta", "link", "br", "wbr", "input"}
SMALL = dict(lengths=(1024,), depths=(0.5,), samples=2, layers=2, heads=3, skip=())


class Page(HTMLParser):
    """Checks that tags nest, and collects tables, attributes, text and the data of figures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.attributes, self.figures, self.text = [], {}, [], {}, []
        self.headings, self._table, self._figure = [], None, None
        self.feed(text)
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.attributes += [(tag, name, value) for name, value in attributes.items()]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "details" or attributes.get("class") == "open":
            self._table = self.tables.setdefault(attributes["id"], [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
        elif tag == "figure":
            self._figure = attributes["id"]
        elif tag == "section" or (tag == "h2" and "id" in attributes):
            self.headings.append(attributes.get("id") or attributes["class"])

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            if "figure" in self.open:
                self.figures[self._figure] = json.loads(data)
            return
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self._table[-1][-1] += data


@pytest.fixture(scope="module")
def report(page):
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(report):
    return Page(report)


def test_every_figure_is_there(loaded, parsed):
    assert list(parsed.figures) == [figure.key for figure in figures_of([loaded])]
    assert "Not measured" not in "".join(parsed.text)


def test_the_verdict_comes_first_and_then_the_levels(run, scores_csv, parsed):
    verdict = judge(load_run(run.dir))
    assert parsed.headings[0].startswith("verdict ") and parsed.headings[1:5] == list(LEVELS)
    assert verdict.sentence in "".join(parsed.text)
    lines = {line[0]: line for line in parsed.tables["t-verdict-0"][1:]}
    for signal in verdict.signals:
        assert lines[signal.signal][1:3] == [signal.state, interval_text(signal)]
    assert len(lines) == len(verdict.signals)  # scores of a --scores file are shown and correlated, not judged


def test_correlations_overlaps_and_contexts_stand_at_their_level(parsed):
    for key, header in {
        "t-correlations-0": "ruler", "t-head-correlations-0": "mrcr", "t-overlap-0": "overlap",
        "t-trajectories-0": "what became of it", "t-middle-0": "index (nat)", "t-effective-0": "length",
    }.items():  # fmt: skip
        assert header in parsed.tables[key][0] and len(parsed.tables[key]) > 2, key


def test_a_correlation_is_that_of_scipy_with_its_interval(loaded, parsed):
    averages = loaded.derived(grid_averages)
    ppl = averages.assign(nll=np.log(averages["exp_mean_nll"])).set_index("tokens")["nll"]
    ruler = loaded.derived(benchmark_scores).query("benchmark == 'ruler'").set_index("tokens")["score"]
    both = pd.concat([ppl, ruler], axis=1, join="inner")
    found = stats.pearsonr(both["nll"], both["score"])
    low, high = found.confidence_interval(0.95)
    header, *lines = parsed.tables["t-correlations-0"]
    (line,) = [line for line in lines if line[0] == "answer_nll"]
    assert header == ["signal", "ruler", "mrcr", "checkpoints"] and line[3] == "5"
    tokens, values = both.index.to_numpy(float), both.to_numpy(float).T
    text = f"{found.statistic:+.3f} [{low:+.2f}, {high:+.2f}], p = {found.pvalue:.4f}"
    assert line[1] == f"{text}, floor {noise_floor(tokens, *values):.3f}"


def test_nothing_comes_from_outside(report, parsed):
    stripped = report
    for script in SCRIPTS:
        assert report.count(asset(script)) == 1
        stripped = stripped.replace(asset(script), "")
    assert "://" not in stripped and "@import" not in report
    for tag, name, value in parsed.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith(("#", "data:")), (tag, value)
    assert "url(" not in stripped


def test_every_reference_inside_the_page_has_one_target(parsed):
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for _, name, value in parsed.attributes if name == "href" and value.startswith("#")}
    assert wanted and wanted <= set(ids)


def test_text_from_the_run_is_escaped(report):
    assert "synthetic &lt;run&gt;" in report and "<run>" not in report and "<inf>" not in report


@pytest.mark.parametrize("evil", ["</script><b>", "<!--<script>"])
def test_text_of_the_run_cannot_end_a_script(small_run, evil):
    """Nor keep it from ending: after the second, a browser takes `</script>` for the end of an inner one."""
    rows = [replace(row, stage=evil, run=evil) for row in small_run.rows if row.step == 20]
    RunStore(small_run.dir).write_window(rows, 20)
    text = write_report(small_run.dir).read_text(encoding="utf-8")
    assert evil not in text and list(Page(text).figures)


def test_tables_hold_the_numbers_of_the_frames(run, parsed):
    loaded = load_run(run.dir)
    cells, scores = loaded.frame(needle_cells), loaded.derived(head_scores)
    head, *body = parsed.tables["t-needle"]
    assert head[3:] == ["mean_ppl", "exp_mean_nll", "exact", "content PPL", "content exact", "cells", "samples"]
    assert [line[3:8] for line in body] == [
        [
            f"{a.mean_ppl:.4g}",
            f"{a.exp_mean_nll:.4g}",
            f"{100 * a.exact_share:.1f} %",
            f"{a.content_ppl:.4g}",
            f"{100 * a.content_share:.1f} %",
        ]
        for a in loaded.derived(grid_averages).itertuples()
    ]
    assert [line[-4:] for line in parsed.tables["t-corpus"][1:]] == [
        ["1K", f"{c.ppl:.4g}", f"{c.nll:.4g}", f"{c.n:,}"] for c in loaded.frame(corpus_ppl).itertuples()
    ]
    last = scores[scores["step"] == 300].nlargest(30, "score")
    assert [line[:3] for line in parsed.tables["t-top"][1:]] == [
        [str(h.layer), str(h.head), f"{h.score:.4g}"] for h in last.itertuples()
    ]
    shown = cells[cells["step"] == 300]
    assert [line[3:6] for line in parsed.tables["t-cells"][1:] if line[1] == "300"] == [
        [length_text(c.length_tok), f"{100 * c.depth_cell:.1f} %", f"{c.mean_ppl:.4g}"] for c in shown.itertuples()
    ]
    assert [line[:2] for line in parsed.tables["t-stages"][1:]] == [["pretrain", "0"], ["lccp", "419M"]]
    number = [line[-2:] for line in parsed.tables["t-UserMonitor-router_entropy"][1:]]
    assert number == [[f"{2 - step / 300:.4g}", "1"] for step in range(0, 301, 25)]


def test_events_and_configuration_are_there(parsed):
    kinds = [line[1] for line in parsed.tables["events-0"][1:]]
    assert kinds == ["skipped_step", "skipped_step", "monitor_error", "resume"]
    assert "NeedleGrid: out of memory at length 131072" in "".join(parsed.text)
    assert "name: synthetic <run>" in "".join(parsed.text)


def test_facts_are_computed_from_the_rows(run, parsed):
    loaded = load_run(run.dir)
    cells, scores = loaded.frame(needle_cells), loaded.derived(head_scores)
    facts = {fact.label: fact for fact in run_highlights(loaded)}
    ends = []
    for step in (100, 300):
        values = cells[(cells["step"] == step) & (cells["length_tok"] == 65536)]["mean_ppl"]
        ends.append(sum(values) / len(values))
    longest = facts["Answer PPL at 64K tokens"]
    assert longest.value == f"{number_text(ends[0])} → {number_text(ends[1])}"
    assert f"{ends[0] / ends[1]:.3g}× lower" in longest.note and "6 depths" in longest.note
    last = scores[scores["step"] == 300]
    best = last.loc[last["score"].idxmax()]
    heads = facts["Retrieval heads"]
    assert heads.value.endswith(f"→ {(last['score'] > 0.1).sum()}")
    assert f"layer {best['layer']} head {best['head']} with {best['score']:.2f}" in heads.note
    assert heads.change.endswith(" samples") and facts["NIAH exact"].change.startswith("+")
    samples = loaded.rows.query("metric == 'answer_nll' and monitor == 'NeedleGrid' and length_tok == 65536")
    nll = samples.groupby(["step", "sample"])["value"].mean().unstack()
    change = nll.loc[300] - nll.loc[100]
    low, high = stats.bootstrap((change.to_numpy(),), np.mean, method="percentile", rng=0).confidence_interval
    number, ends = re.fullmatch(r"(\S+) nat \[(.*)\], 3 samples", longest.change).groups()
    ends = [float(end) for end in ends.split(", ")]
    assert float(number) == pytest.approx(change.mean(), rel=5e-3)
    assert ends[0] < low < high < ends[1]  # of three samples, a plain bootstrap is too narrow
    t_low, t_high = stats.ttest_1samp(change, 0).confidence_interval(0.95)
    assert ends[1] - ends[0] == pytest.approx(t_high - t_low, rel=0.15)
    assert "no interval" in facts["Corpus PPL, en"].change  # no rows of single sequences here
    measuring, training = loaded.frame(window_times)["time_s"].sum(), loaded.steps["time_s"].sum()
    assert facts["Time spent measuring"].value == f"{100 * measuring / (measuring + training):.1f} %"
    assert facts["Skipped steps"].value == "2"
    text = "".join(parsed.text)
    assert all(fact.value in text and fact.note in text and fact.change in text for fact in facts.values())
    assert all(fact.change for fact in facts.values() if "→" in fact.value)


def test_a_change_without_the_same_samples_says_so(run):
    """Another sample set, and averages without samples: no interval, and no silence."""
    loaded = load_run(run.dir)
    rows = loaded.rows
    rows.loc[(rows["step"] == 100) & (rows["metric"] == "answer_nll"), "sample_set"] = "other"
    averages = rows[rows["metric"] == "exact"].assign(sample=pd.NA, family=pd.NA)
    rows = pd.concat([rows[rows["metric"] != "exact"], averages], ignore_index=True)
    facts = {fact.label: fact.change for fact in run_highlights(replace(loaded, rows=rows))}
    assert facts["Answer PPL at 64K tokens"] == "no interval: not the same samples at both, or averages alone"
    assert facts["NIAH exact"] == "no interval: one sample, or averages alone"


def test_a_run_that_was_moved_gives_the_same_report(small_run, tmp_path):
    """Nothing in the directory knows where it is."""
    before = write_report(small_run.dir).read_bytes()
    moved = shutil.move(small_run.dir, tmp_path / "another" / "place")
    assert write_report(moved).read_bytes() == before


def test_runs_are_compared_on_one_page(tmp_path, capsys):
    for place in "ab":
        make_run(tmp_path / place, steps=20, lccp_from=10, every=10, name=f"run {place}", **SMALL)
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    path = tmp_path / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    parsed = Page(path.read_text(encoding="utf-8"))
    assert [heading.split()[0] for heading in parsed.headings[:3]] == ["verdict", "verdict", "behavioural"]
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {"t-needle", "1-t-needle", "events-1"} <= set(ids)
    names = [trace["name"] for trace in parsed.figures["head-curves"]["panels"][0]["traces"]]
    assert names == ["run a", "run b"]
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "folder.html")]) == 0  # all runs in a folder
    assert list(Page((tmp_path / "folder.html").read_text(encoding="utf-8")).figures) == list(parsed.figures)


def test_a_margin_need_not_be_of_every_run_and_one_of_none_is_refused(tmp_path, capsys):
    folders = [tmp_path / "corpora", tmp_path / "heads"]
    for folder, monitor in zip(folders, ("CorpusPPL", "RetrievalHeads"), strict=True):
        make_run(folder, steps=20, lccp_from=10, every=10, name=folder.name, monitors=(monitor,), **SMALL)
    command = [*map(str, folders), "--margin", "corpus_nll=0.25", "--margin", "retrieval_score=0.5"]
    assert main(["report", *command]) == 0
    parsed = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    of_line = {line[0]: line for key in (0, 1) for line in parsed.tables[f"t-verdict-{key}"][1:]}
    assert "0.25 nat" in of_line["corpus_nll[en]"] and "50 points" in of_line["retrieval_score"]
    capsys.readouterr()
    for kind in ("report", "export"):
        assert main([kind, *command, "--margin", "answer_nll=0.1", "--out", str(tmp_path / "none")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--margin answer_nll: no such signal; there are corpus_nll[en]" in error
    assert not (tmp_path / "none").exists()


def test_a_run_of_200_checkpoints_stays_small(tmp_path):
    """32 layers of 32 heads and 16 x 11 cells at each of them: figures, tables and scripts under 15 MB."""
    rng, store = np.random.default_rng(0), RunStore(tmp_path)
    layer, head = (at.ravel() for at in np.indices((32, 32)))
    cell, length = (at.ravel() for at in np.indices((11, 16)))
    for step in range(200):
        base = {"run": "long", "config_hash": "h", "step": step, "tokens": step * 10**9, "stage": "lccp", "n": 30}
        scores = base | {"monitor": "RetrievalHeads", "metric": "retrieval_score", "unit": "share", "layer": layer,
                         "head": head, "value": rng.random(1024) ** 8}  # fmt: skip
        needles = base | {"monitor": "NeedleGrid", "metric": "answer_nll", "unit": "nat", "value": rng.random(176),
                          "length_tok": 4096 * (1 + length), "depth_cell": cell / 10, "sample": 0}  # fmt: skip
        frame = pd.concat([pd.DataFrame(scores), pd.DataFrame(needles)]).reindex(columns=row_schema().names)
        path = store.rows_dir / f"step-{step:08d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pandas(frame, row_schema(), preserve_index=False), path)
        store.append_step({"step": step, "tokens": step * 10**9, "stage": "lccp", "loss": 2.0, "skipped": False})
    run = load_run(tmp_path)
    parts = [page.figure(chart) for _, chart in make_charts([run]) if not isinstance(chart, NothingToDraw)]
    text = page.page("long", [], [*parts, *run_tables(run)])
    assert 2e6 < len(text.encode()) < 15e6
    assert len(Page(text).figures["head-cells"]["stops"]) == 200


def test_missing_monitors_leave_the_other_figures_and_a_sentence(tmp_path):
    make_run(tmp_path, steps=20, lccp_from=10, every=10, monitors=("CorpusPPL",), skip=())
    text = write_report(tmp_path).read_text(encoding="utf-8")
    parsed = Page(text)
    assert list(parsed.figures) == ["corpus", "positions", "training-curves", "UserMonitor-router_entropy"]
    folded = re.findall("Not measured: .*", "\n".join(parsed.text))
    missing = [[str(c) for f, c in make_charts([load_run(tmp_path)]) if f.level == level and isinstance(c, NothingToDraw)]
               for level in LEVELS]  # fmt: skip
    assert folded == [f"Not measured: {', '.join(texts)}." for texts in missing]  # one line a level
    needles, heads, before = "NeedleGrid", "RetrievalHeads", "InterferenceGrid"
    for number, monitor in ((2, needles), (3, needles), (4, heads), (5, heads), (7, needles), (8, before), (9, before)):
        assert len(re.findall(rf"\(Figure {number}; {monitor}\)", "".join(folded))) == 1, number
    assert (
        "Answer PPL" not in "".join(parsed.tables)
        and "t-needle" not in parsed.tables
        and "t-heads" not in parsed.tables
    )


def test_a_monitor_of_others_is_on_the_page(stranger):
    """At the level that it declares, with its table, its signals and their correlations."""
    text = write_report(stranger.dir).read_text(encoding="utf-8")
    parsed, truth = Page(text), stranger.truth
    order = [key for key in parsed.figures if key.startswith(("Stranger", "probe"))]
    assert order == [
        "probe-benchmarks", "Stranger-recall", "Stranger-by_task", "Stranger-calm", "Stranger-spread",
        "Stranger-perplexed", "Stranger-fragile", "Stranger-tilt-en", "Stranger-tilt-zh", "Stranger-pull-en",
        "Stranger-pull-zh",
    ]  # fmt: skip
    (trace,) = (trace for trace in parsed.figures["Stranger-calm"]["panels"][0]["traces"] if "fill" not in trace)
    calm = truth[truth["metric"] == "calm"].groupby("step")["value"].mean()
    assert trace["y"] == pytest.approx(calm.tolist(), rel=1e-5)
    spread = truth[(truth["metric"] == "spread") & (truth["step"] == 7)]
    values = spread.pivot(index="lag_tok", columns="temperature", values="value").to_numpy()
    np.testing.assert_allclose(parsed.figures["Stranger-spread"]["maps"][7]["values"], values, rtol=1e-5)
    signals = {line[0]: line for line in parsed.tables["t-verdict-0"][1:]}
    assert set(signals) == {"Stranger.recall", "Stranger.calm", "Stranger.fragile"}
    correlated = {line[0] for line in parsed.tables["t-correlations-0"][1:]}
    assert {"Stranger.calm", "Stranger.by_task[copy]", "Stranger.perplexed[books, zh]"} <= correlated
    assert parsed.tables["t-head-correlations-0"][1][0] == "Stranger.pull[en]"
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and "sort &lt;fast&gt;" in text and "<fast>" not in text


def test_of_two_runs_the_page_shows_what_one_of_them_measured(stranger, small_run, tmp_path):
    parsed = Page(write_report([small_run.dir, stranger.dir], tmp_path / "two.html").read_text(encoding="utf-8"))
    assert {"Stranger-spread", "needle-cells", "Stranger-pull-zh"} <= set(parsed.figures)
    assert {stop["tokens"] for stop in parsed.figures["Stranger-spread"]["stops"]} == {k * 10**6 for k in range(13)}
    assert "1-t-Stranger-recall" in parsed.tables and "t-Stranger-recall" not in parsed.tables


def test_rows_alone_are_enough(small_run):
    """What a team with its own loop has: monitors' rows and nothing else."""
    for name in ("steps.jsonl", "events.jsonl", "config.yaml"):
        (small_run.dir / name).unlink()
    parsed = Page(write_report(small_run.dir).read_text(encoding="utf-8"))
    every = {figure.key for figure in figures_of([load_run(small_run.dir)])}
    assert parsed.figures.keys() == every - {"training-curves", "probe-benchmarks"}
    assert "None was recorded" in "".join(parsed.text) and "20" in parsed.text


def test_a_first_window_alone_makes_a_report(tmp_path):
    make_run(tmp_path, steps=0, lccp_from=0, lengths=(1024,), layers=2, heads=3, skip=())
    facts = run_highlights(load_run(tmp_path))
    figures = Page(write_report(tmp_path).read_text(encoding="utf-8")).figures.keys()
    every = {figure.key for figure in figures_of([load_run(tmp_path)])}
    assert every - figures == {"probe-benchmarks", "difference-cells", "training-curves", "health"}
    assert facts and all("→" not in fact.value and not fact.change for fact in facts)


def test_changed_samples_and_changed_grids_are_named(small_run):
    make_run(
        small_run.dir,
        steps=20,
        lccp_from=10,
        every=20,
        lengths=(1024,),
        depths=(0.5,),
        samples=2,
        layers=2,
        heads=3,
        skip=(),
    )
    text = html.unescape(write_report(small_run.dir).read_text(encoding="utf-8"))
    assert "does not have the same cells at all checkpoints" in text
    assert "are not the same at all checkpoints" not in text


def test_a_second_report_replaces_the_first_and_is_the_same_to_the_byte(small_run, tmp_path):
    first, out = write_report(small_run.dir), tmp_path / "elsewhere" / "page.html"
    assert first == small_run.dir / "report.html"
    for _ in range(2):
        assert write_report(small_run.dir, out) == out and out.read_bytes() == first.read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_is_skipped_is_said_in_one_line_and_once(small_run, capsys):
    """Not as Python says it, with the line of its source, and not each time that a file is read."""
    store = RunStore(small_run.dir)
    torn = store.windows()[5]
    torn.write_bytes(torn.read_bytes()[:-20])
    store.steps_path.write_bytes(store.steps_path.read_bytes()[:-5])
    not_finite = [replace(row, value=np.inf) if row.metric == "answer_nll" else row for row in small_run.rows]
    store.write_window([row for row in not_finite if row.step == 20], 20)
    assert main(["report", str(small_run.dir)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        f"lccp: {torn}: skipped, not a readable Parquet file",
        f"lccp: {store.steps_path}:20: dropped, not a whole JSON object",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_times_and_rates_that_are_not_finite_are_shown(value, small_run):
    """And a step whose place in the training is not known is named and left out."""
    store = RunStore(small_run.dir)
    strange = [replace(row, value=value) if row.metric == "window_time" else row for row in small_run.rows]
    for step in store.windows():
        store.write_window([row for row in strange if row.step == step], step)
    steps = [json.loads(line) for line in store.steps_path.read_text().splitlines()]
    records = [{**step, "time_s": value, "tokens_per_s": value} for step in steps]
    records += [{**steps[-1], "tokens": value}, {**steps[-1], "step": value}]
    store.steps_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.warns(UserWarning) as said:
        found = Page(write_report(small_run.dir).read_text(encoding="utf-8"))
    dropped = [str(warning.message) for warning in said if "dropped" in str(warning.message)]
    text = f"{store.steps_path}:21: dropped, tokens is no whole number but {value!r}; and 1 more line"
    assert dropped == [text]
    shown = "∞" if value == np.inf else ""
    assert "Time spent measuring" not in "".join(found.text)
    assert {line[-1] for line in found.tables["t-windows"][1:]} == {"∞" if value == np.inf else "0.0 s"}
    assert [line[-2:] for line in found.tables["t-stages"][1:]] == [[shown, shown]] * 2


@pytest.mark.each_python
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "required: COMMAND; see lccp --help"), (["compare", "run"], "required: B; see lccp compare --help"),
     (["export", "run", "--only", "figs"], "invalid choice: 'figs'"), (["wach", "run"], "invalid choice: 'wach'"),
     (["watch", "run", "--every", "soon"], "invalid float value: 'soon'")],
)  # fmt: skip
def test_a_command_line_that_is_wrong_is_refused_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("lccp: ") and error.count("\n") == 1 and message in error


def test_what_is_not_a_run_is_refused_in_one_line(tmp_path, small_run):
    (tmp_path / "empty").mkdir()
    for wrong in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(ValueError, match="not a run directory") as error:
            write_report(wrong)
        assert "\n" not in str(error.value) and str(wrong) in str(error.value)
    shutil.rmtree(small_run.dir / "rows")
    with pytest.raises(ValueError, match=r"no rows in rows/") as error:
        write_report(small_run.dir)
    assert "\n" not in str(error.value)
