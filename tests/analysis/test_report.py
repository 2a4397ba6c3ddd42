"""The page holds every figure and the numbers of the frames, needs nothing from outside, and says what is missing."""

import html
import re
import shutil
from html.parser import HTMLParser

import pytest

from megatron_lccp.analysis.facts import run_facts
from megatron_lccp.analysis.report import FIGURES, write_report
from megatron_lccp.analysis.run import load_run
from megatron_lccp.analysis.style import length_text, number_text
from tests.analysis.synthetic_run import make_run

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and collects tables, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.attributes, self.figures, self.text = [], {}, [], [], []
        self._table = None
        self.feed(text)
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.attributes += [(tag, name, value) for name, value in attributes.items()]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "details":
            self._table = self.tables.setdefault(attributes["id"], [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")
        elif tag == "figure":
            self.figures.append(attributes["id"])

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self._table[-1][-1] += data


@pytest.fixture(scope="module")
def report(page):
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(report):
    return Page(report)


def test_every_figure_is_there(parsed):
    assert parsed.figures == [spec.key for spec in FIGURES] and len(FIGURES) == 6


def test_nothing_comes_from_outside(report, parsed):
    stripped = re.sub(r' xmlns(:\w+)?="[^"]*"', "", report)
    assert "://" not in stripped and "<script" not in report and "@import" not in report
    for tag, name, value in parsed.attributes:
        if name in ("href", "xlink:href", "src"):
            assert value.startswith(("#", "data:")), (tag, value)
    assert all(reference.startswith("#") for reference in re.findall(r"url\(([^)]*)\)", report))


def test_every_reference_inside_the_page_has_one_target(parsed):
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    wanted = {value[1:] for _, name, value in parsed.attributes if name == "xlink:href" and value.startswith("#")}
    wanted |= {match for _, _, value in parsed.attributes for match in re.findall(r"url\(#([^)]*)\)", value or "")}
    assert wanted and wanted <= set(ids)


def test_text_from_the_run_is_escaped(report):
    assert "synthetic &lt;run&gt;" in report and "<run>" not in report and "<inf>" not in report


def test_tables_hold_the_numbers_of_the_frames(run, parsed):
    loaded = load_run(run.dir)
    head, *body = parsed.tables["t-needle"]
    assert head[3:] == ["mean_ppl", "exp_mean_nll", "exact", "cells", "samples"]
    assert [line[3:6] for line in body] == [
        [f"{a.mean_ppl:.4g}", f"{a.exp_mean_nll:.4g}", f"{100 * a.exact_share:.1f} %"]
        for a in loaded.averages.itertuples()
    ]
    assert [line[-4:] for line in parsed.tables["t-corpus"][1:]] == [
        ["1K", f"{c.ppl:.4g}", f"{c.nll:.4g}", f"{c.n:,}"] for c in loaded.corpora.itertuples()
    ]
    last = loaded.scores[loaded.scores["step"] == 300].nlargest(30, "score")
    assert [line[:3] for line in parsed.tables["t-top"][1:]] == [
        [str(h.layer), str(h.head), f"{h.score:.4g}"] for h in last.itertuples()
    ]
    shown = loaded.cells[loaded.cells["step"] == 300]
    assert [line[3:6] for line in parsed.tables["t-cells"][1:] if line[1] == "300"] == [
        [length_text(c.length_tok), f"{100 * c.depth_cell:.1f} %", f"{c.mean_ppl:.4g}"] for c in shown.itertuples()
    ]
    assert [line[:2] for line in parsed.tables["t-stages"][1:]] == [["pretrain", "0"], ["lccp", "419M"]]
    assert parsed.tables["t-others"][1][3:5] == ["UserMonitor", "router_entropy"]


def test_events_and_configuration_are_there(parsed):
    kinds = [line[1] for line in parsed.tables["events"][1:]]
    assert kinds == ["skipped_step", "skipped_step", "monitor_error", "resume"]
    assert "NeedleGrid: out of memory at length 131072" in "".join(parsed.text)
    assert "name: synthetic <run>" in "".join(parsed.text)


def test_facts_are_computed_from_the_rows(run, parsed):
    loaded = load_run(run.dir)
    facts = {fact.label: fact for fact in run_facts(loaded)}
    ends = []
    for step in (100, 300):
        values = loaded.cells[(loaded.cells["step"] == step) & (loaded.cells["length_tok"] == 65536)]["mean_ppl"]
        ends.append(sum(values) / len(values))
    longest = facts["Answer PPL at 64K tokens"]
    assert longest.value == f"{number_text(ends[0])} → {number_text(ends[1])}"
    assert f"{ends[0] / ends[1]:.3g}× lower" in longest.note and "6 depths" in longest.note
    last = loaded.scores[loaded.scores["step"] == 300]
    best = last.loc[last["score"].idxmax()]
    heads = facts["Retrieval heads"]
    assert heads.value.endswith(f"→ {(last['score'] > 0.1).sum()}")
    assert f"layer {best['layer']} head {best['head']} with {best['score']:.2f}" in heads.note
    measuring, training = loaded.windows["time_s"].sum(), loaded.steps["time_s"].sum()
    assert facts["Time spent measuring"].value == f"{100 * measuring / (measuring + training):.1f} %"
    assert facts["Skipped steps"].value == "2"
    text = "".join(parsed.text)
    assert all(fact.value in text and fact.note in text for fact in facts.values())


def test_missing_monitors_leave_the_other_figures_and_a_sentence(tmp_path):
    make_run(tmp_path, steps=20, lccp_from=10, every=10, monitors=("CorpusPPL",), skip=())
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert page.figures == ["training", "corpus"]
    for number, monitor in ((2, "NeedleGrid"), (3, "NeedleGrid"), (4, "RetrievalHeads"), (5, "RetrievalHeads")):
        assert re.search(rf"\(Figure {number}\): no rows of \w+; add the {monitor} monitor", text)
    assert "Answer PPL" not in "".join(page.tables) and "t-needle" not in page.tables and "t-heads" not in page.tables


def test_rows_alone_are_enough(small_run):
    """What a team with its own loop has: monitors' rows and nothing else."""
    for name in ("steps.jsonl", "events.jsonl", "config.yaml"):
        (small_run.dir / name).unlink()
    page = Page(write_report(small_run.dir).read_text(encoding="utf-8"))
    assert "training" not in page.figures and len(page.figures) == 5
    assert "None was recorded" in "".join(page.text) and "20" in page.text


def test_a_first_window_alone_makes_a_report(tmp_path):
    make_run(tmp_path, steps=0, lccp_from=0, lengths=(1024,), layers=2, heads=3, skip=())
    facts = run_facts(load_run(tmp_path))
    assert len(Page(write_report(tmp_path).read_text(encoding="utf-8")).figures) == 5
    assert facts and all("→" not in fact.value for fact in facts)


def test_changed_samples_and_changed_grids_are_named(small_run, monkeypatch):
    monkeypatch.setattr("megatron_lccp.analysis.report.FIGURES", ())
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


def test_a_second_report_replaces_the_first_and_is_the_same_to_the_byte(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_lccp.analysis.report.FIGURES", FIGURES[-2:])  # two are enough to see it
    first, out = write_report(small_run.dir), tmp_path / "elsewhere" / "page.html"
    assert first == small_run.dir / "report.html"
    for _ in range(2):
        assert write_report(small_run.dir, out) == out and out.read_bytes() == first.read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_what_is_not_a_run_is_refused_in_one_line(tmp_path, small_run):
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="not a run directory") as error:
            write_report(wrong)
        assert "\n" not in str(error.value) and str(wrong) in str(error.value)
    shutil.rmtree(small_run.dir / "rows")
    with pytest.raises(ValueError, match=r"no rows in rows/") as error:
        write_report(small_run.dir)
    assert "\n" not in str(error.value)
