"""What the answer costs without some heads, against the plainest loop over the same rows."""

import math
from collections import defaultdict
from dataclasses import replace

import pandas as pd
import pytest
from scipy import stats

from megatron_lccp.analysis.measured.ablation import ablations
from megatron_lccp.analysis.measured.registry import make_charts
from tests.analysis.loops import mean


def test_ablated_heads_are_named_in_words(loaded, charts):
    (panel,) = charts["ablation"].panels
    assert [line.label for line in panel.lines] == ["2 random heads", "2 best retrieval heads"]
    rows = loaded.rows[loaded.rows["ablated"] == "top2"]
    sets = ("top1", "random1.0", "random2.0", "random2.1", "named")
    run = replace(loaded, rows=pd.concat([rows.assign(ablated=name) for name in sets], ignore_index=True))
    ((_, chart),) = make_charts([run], {"ablation"})
    assert [line.label for line in chart.panels[0].lines] == [
        "named heads", "1 random head", "2 random heads (draw 0)", "2 random heads (draw 1)", "1 best retrieval head",
    ]  # fmt: skip


def test_ablations(run, loaded):
    change = defaultdict(list)
    for row in run.rows:
        if row.metric == "nll_change":
            change[row.step, row.ablated].append(row.value)
    found = {(a.step, a.ablated): a for a in loaded.frame(ablations).itertuples()}
    assert {key for key in found if key[1] != "none"} == change.keys()
    for key, values in change.items():
        assert found[key].nll_change == pytest.approx(mean(values)) and (found[key].heads, found[key].n) == (2, 3)
        theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert found[key].high - found[key].low == pytest.approx(theirs.high - theirs.low, rel=0.15)
        assert found[key].low < found[key].nll_change < found[key].high
    assert math.isnan(found[300, "none"].nll_change) and found[300, "none"].heads == 0
