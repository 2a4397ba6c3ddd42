"""Checkpoints, stages, means and sample sets against the plainest loop over the same rows."""

import dataclasses

import pandas as pd
import pytest

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.measured.corpora import corpus_ppl
from megatron_lccp.analysis.measured.heads import head_scores, head_summary
from megatron_lccp.analysis.measured.needles import needle_averages, needle_cells
from megatron_lccp.analysis.measured.training import window_times
from megatron_lccp.records.store import RunStore, rows_frame
from tests.analysis.planted import row, run_of, table


def test_one_step_in_two_stages_is_two_checkpoints_in_order(run):
    at_boundary = [row for row in run.rows if row.step == 100]
    before = [dataclasses.replace(row, stage="pretrain", value=row.value / 2) for row in at_boundary]
    frame = rows_frame([row for row in run.rows if row.step == 125] + before + at_boundary)
    cells = needle_cells(frame)
    assert frames.checkpoints(cells)["stage"].tolist() == ["pretrain", "lccp", "lccp"]
    assert frames.checkpoints(cells)["step"].tolist() == [100, 100, 125]
    assert frames.start_checkpoint(cells, int(at_boundary[0].tokens))["stage"].tolist() == ["lccp"]


def test_empty_rows_give_empty_frames(tmp_path):
    rows = RunStore(tmp_path).read_rows()
    cells, scores = needle_cells(rows), head_scores(run_of(table([row("Other", "x", 1.0, "s", tokens=1)])))
    made = [cells, needle_averages(cells), scores, head_summary(scores), corpus_ppl(rows),
            window_times(rows), frames.stage_spans(rows)]  # fmt: skip
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
