"""Head scores and their summary against the plainest loop over the same rows, and their figures."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from megatron_lccp.analysis.measured.heads import head_scores, head_summary
from megatron_lccp.analysis.measured.registry import make_charts
from megatron_lccp.analysis.run import make_run
from megatron_lccp.records.store import rows_frame, steps_frame
from tests.analysis.loops import groups, keyed, mean, panels
from tests.analysis.planted import run_of


def test_head_scores(run, rows):
    score, mass = (
        groups(run.rows, "RetrievalHeads", "retrieval_score", "layer", "head"),
        groups(run.rows, "RetrievalHeads", "needle_mass", "layer", "head"),
    )
    heads = keyed(head_scores(run_of(rows)), "layer", "head")
    assert heads.keys() == score.keys()
    for key, values in score.items():
        assert heads[key]["score"] == pytest.approx(mean(values)) and heads[key]["n"] == len(values)
        assert heads[key]["needle_mass"] == pytest.approx(mean(mass[key]))


@pytest.mark.parametrize("threshold, tokens_from", [(0.1, 0), (0.1, 100 * 4_194_304), (0.3, 100 * 4_194_304)])
def test_head_summary(rows, threshold, tokens_from):
    scores = head_scores(run_of(rows))
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
    summary = head_summary(head_scores(run_of(rows)), top_k=10_000)
    assert set(summary[summary["quantity"] == "top_mean_score"]["n"]) == {64}


def test_head_maps_mark_and_count_the_retrieval_heads(loaded, drawn):
    last = loaded.derived(head_scores)[loaded.derived(head_scores)["step"] == 300]
    axes = panels(drawn["head-cells"])[-1]
    above = last[last["score"] > 0.1]
    assert axes.get_title().endswith(f": {len(above)} above 0.1")
    dots = set(zip(axes.lines[0].get_ydata(), axes.lines[0].get_xdata(), strict=True))
    assert dots == set(zip(above["layer"], above["head"], strict=True))
    np.testing.assert_array_equal(axes.images[0].get_array(), last["score"].to_numpy().reshape(8, 8))


def test_a_step_with_two_stages_gives_two_maps(run):
    at = [row for row in run.rows if row.step == 100]
    rows = rows_frame([replace(row, stage="pretrain") for row in at] + at)
    chart = next(c for f, c in make_charts([make_run(rows, steps_frame([]))]) if f.key == "head-cells")
    assert [point["stage"] for point, *_ in chart.grids()] == ["pretrain", "lccp"]
