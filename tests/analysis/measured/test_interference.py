"""The interference grid against the plainest loop over the same rows."""

import math
from collections import defaultdict

import pytest

from megatron_lccp.analysis.measured.interference import interference_cells
from tests.analysis.loops import mean


def test_interference_cells(run, loaded):
    nll, exact = defaultdict(list), defaultdict(list)
    for row in run.rows:
        if row.monitor == "InterferenceGrid" and row.metric in ("answer_nll", "exact"):
            (nll if row.metric == "answer_nll" else exact)[row.step, row.before_tok, row.after_tok].append(row.value)
    found = {(c.step, c.before_tok, c.after_tok): c for c in loaded.frame(interference_cells).itertuples()}
    assert found.keys() == nll.keys() and len(found) == 13 * 9
    for key, values in nll.items():
        assert found[key].mean_ppl == pytest.approx(mean([math.exp(value) for value in values]))
        assert found[key].exact_share == pytest.approx(mean(exact[key])) and found[key].n == len(values)


def test_the_caption_gives_the_distance_that_is_shown(charts):
    assert "always 16K tokens behind" in charts["interference-curves"].caption
    assert set(charts["interference-curves"].frame["after_tok"]) == {16384}
