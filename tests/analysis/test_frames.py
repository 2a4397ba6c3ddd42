"""Every frame against the plainest loop over the same rows."""

import dataclasses
import math
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from megatron_lccp.analysis.measured.others import other_scalars

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.measured.corpora import corpus_ppl
from megatron_lccp.analysis.measured.heads import head_scores, head_summary
from megatron_lccp.analysis.measured.needles import needle_averages, needle_cells
from megatron_lccp.analysis.measured.training import window_times
from megatron_lccp.records.store import RunStore, rows_frame


@pytest.fixture(scope="module")
def rows(run):
    return RunStore(run.dir).read_rows(health=False)


def groups(rows, metric, *names):
    found = defaultdict(list)
    for row in rows:
        if row.metric == metric and row.monitor not in ("InterferenceGrid", "HeadAblation"):
            found[(row.step, row.stage, *(getattr(row, name) for name in names))].append(row.value)
    return found


def mean(values):
    return sum(values) / len(values)


def keyed(frame, *names):
    return {(line["step"], line["stage"], *(line[name] for name in names)): line for line in frame.to_dict("records")}


def test_needle_cells(run, rows):
    nll, exact = (
        groups(run.rows, "answer_nll", "length_tok", "depth_cell"),
        groups(run.rows, "exact", "length_tok", "depth_cell"),
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


def test_head_scores(run, rows):
    score, mass = groups(run.rows, "retrieval_score", "layer", "head"), groups(run.rows, "needle_mass", "layer", "head")
    heads = keyed(head_scores(rows), "layer", "head")
    assert heads.keys() == score.keys()
    for key, values in score.items():
        assert heads[key]["score"] == pytest.approx(mean(values)) and heads[key]["n"] == len(values)
        assert heads[key]["needle_mass"] == pytest.approx(mean(mass[key]))


@pytest.mark.parametrize("threshold, tokens_from", [(0.1, 0), (0.1, 100 * 4_194_304), (0.3, 100 * 4_194_304)])
def test_head_summary(rows, threshold, tokens_from):
    scores = head_scores(rows)
    summary = keyed(head_summary(scores, threshold, top_k=5, tokens_from=tokens_from), "quantity")
    by_step = defaultdict(dict)
    for line in scores.to_dict("records"):
        by_step[(line["step"], line["tokens"], line["stage"])][(line["layer"], line["head"])] = line["score"]
    start = max((key for key in by_step if key[1] <= tokens_from), key=lambda key: key[1])
    initial = [head for head, score in by_step[start].items() if score > threshold]
    for (step, _, stage), heads in by_step.items():
        count = summary[(step, stage, "retrieval_heads")]
        assert count["value"] == sum(score > threshold for score in heads.values()) and count["n"] == len(heads)
        top = summary[(step, stage, "top_mean_score")]
        assert top["value"] == pytest.approx(mean(sorted(heads.values())[-5:])) and top["n"] == 5
        if initial:
            line = summary[(step, stage, "initial_mean_score")]
            assert line["value"] == pytest.approx(mean([heads[head] for head in initial])) and line["n"] == len(initial)
        else:
            assert (step, stage, "initial_mean_score") not in summary
    assert bool(initial) == (
        tokens_from > 0
    )  # at step 0 the synthetic model has none: no line rather than an invented one


def test_a_model_with_fewer_heads_than_the_top_says_so(rows):
    summary = head_summary(head_scores(rows), top_k=10_000)
    assert set(summary[summary["quantity"] == "top_mean_score"]["n"]) == {64}


def test_corpus_ppl(run, rows):
    expected = groups(run.rows, "nll", "corpus")
    found = keyed(corpus_ppl(rows), "corpus")
    assert found.keys() == expected.keys()
    for key, (nll,) in expected.items():
        assert (
            found[key]["nll"] == nll and found[key]["ppl"] == pytest.approx(math.exp(nll)) and found[key]["n"] == 65536
        )
        assert found[key]["label"] == found[key]["corpus"]


def test_one_corpus_at_two_lengths_is_two_series(run):
    some = [row for row in run.rows if row.metric == "nll" and row.corpus == "en"]
    both = rows_frame(some + [dataclasses.replace(row, length_tok=65536) for row in some])
    assert set(corpus_ppl(both)["label"]) == {"en (1024 tok)", "en (65536 tok)"}


def test_window_times_and_numbers_of_other_monitors(run, rows):
    times = window_times(rows)
    assert times["time_s"].sum() == pytest.approx(sum(row.value for row in run.rows if row.metric == "window_time"))
    others = other_scalars(rows)
    assert set(others["metric"]) == {"router_entropy"} and len(others) == len(frames.checkpoints(rows))


def test_one_step_in_two_stages_is_two_checkpoints_in_order(run):
    at_boundary = [row for row in run.rows if row.step == 100]
    before = [dataclasses.replace(row, stage="pretrain", value=row.value / 2) for row in at_boundary]
    frame = rows_frame([row for row in run.rows if row.step == 125] + before + at_boundary)
    cells = needle_cells(frame)
    assert frames.checkpoints(cells)["stage"].tolist() == ["pretrain", "lccp", "lccp"]
    assert frames.checkpoints(cells)["step"].tolist() == [100, 100, 125]
    assert frames.start_checkpoint(cells, int(at_boundary[0].tokens))["stage"].tolist() == ["lccp"]


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


def test_empty_rows_give_empty_frames(tmp_path):
    rows = RunStore(tmp_path).read_rows()
    cells, scores = needle_cells(rows), head_scores(rows)
    made = [cells, needle_averages(cells), scores, head_summary(scores), corpus_ppl(rows),
            window_times(rows), other_scalars(rows), frames.stage_spans(rows)]  # fmt: skip
    assert all(frame.empty and len(frame.columns) for frame in made)
    assert frames.pick_checkpoints(cells).empty and frames.lccp_from(frames.stage_spans(rows)) == 0
    assert frames.changed_sample_sets(rows) == []


def test_stages_and_where_the_lccp_begins(run):
    spans = frames.stage_spans(RunStore(run.dir).read_steps())
    boundary = 100 * 4_194_304
    assert spans.values.tolist() == [["pretrain", 0, boundary], ["lccp", boundary, 300 * 4_194_304]]
    assert frames.lccp_from(spans) == boundary
    assert frames.lccp_from(pd.DataFrame({"stage": ["a", "b"], "tokens_from": [0, 7], "tokens_to": [7, 9]})) == 7


@pytest.mark.parametrize("limit", [2, 3, 5, 8, 100])
def test_picked_checkpoints_run_from_the_start_of_the_lccp_to_the_end(rows, limit):
    picked = frames.pick_checkpoints(rows, 100 * 4_194_304, limit)
    assert picked["step"].iloc[0] == 100 and picked["step"].iloc[-1] == 300
    assert len(picked) == min(limit, 9) and picked["step"].is_monotonic_increasing and picked["step"].is_unique


def test_changed_samples_are_noticed(run, rows):
    assert frames.changed_sample_sets(rows) == []
    changed = [
        dataclasses.replace(row, sample_set="new") if row.step == 300 and row.metric == "exact" else row
        for row in run.rows
    ]
    assert frames.changed_sample_sets(rows_frame(changed)) == ["exact"]
