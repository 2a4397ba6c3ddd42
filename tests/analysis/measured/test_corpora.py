"""Perplexity of held-out text, whole and by position, against the plainest loop over the same rows, and the law."""

import dataclasses
import math
import re

import numpy as np
import pandas as pd
import pytest

from megatron_lccp.analysis.measured.corpora import corpus_ppl, log_law, position_ppl
from megatron_lccp.records.store import rows_frame
from tests.analysis.loops import groups, keyed


def test_corpus_ppl(run, rows):
    expected = groups(run.rows, "CorpusPPL", "nll", "corpus")
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


def test_positions(run, loaded):
    expected = [row for row in run.rows if row.metric == "position_nll"]
    assert loaded.frame(position_ppl)["ppl"].tolist() == pytest.approx([math.exp(row.value) for row in expected])
    assert loaded.frame(position_ppl)["to_tok"].tolist() == [row.to_tok for row in expected]


def test_the_law_of_the_corpora_is_found_again():
    tokens = np.array([0, 100, 1000, 10_000, 100_000]) + 7
    frame = pd.DataFrame({"run": "r", "step": tokens, "tokens": tokens, "stage": "s", "label": "en", "n": 9})
    with np.errstate(divide="ignore"):
        frame["ppl"] = np.where(tokens > 7, 20 - 0.7 * np.log(tokens - 7.0), 99.0)
    (law,) = log_law(frame, {"r": 7}).itertuples()
    assert (law.a, law.b, law.r2, law.n) == pytest.approx((-0.7, 20.0, 1.0, 4))
    assert log_law(frame.head(3), {"r": 7}).empty  # two points always lie on a line


def test_the_caption_gives_the_law(charts):
    law = re.findall(r"(\w+): PPL = (-[\d.]+) ln N", charts["corpus"].caption)
    assert [name for name, _ in law] == ["en", "zh", "code"]
    fitted = charts["corpus"].frame.query("label == 'zh'")
    seen = np.log((fitted["tokens"] - 100 * 4_194_304)[fitted["tokens"] > 100 * 4_194_304].astype(float))
    slope, _ = np.polyfit(seen, fitted["ppl"].tail(len(seen)), 1)
    assert float(law[1][1]) == pytest.approx(slope, rel=5e-3)
