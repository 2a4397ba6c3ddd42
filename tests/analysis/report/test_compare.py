"""Two measurements side by side: numbers computed here by hand, and what has no pair is left out."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_lccp.analysis.report.compare import as_text, compare
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import Row


def row(monitor: str, metric: str, value: float, step: int = 5, **where: Any) -> Row:
    about = dict(run="r", config_hash="h", step=step, tokens=step, stage="s", unit="", n=4)
    return Row(monitor=monitor, metric=metric, value=float(value), **about, **where)


def measured(directory: Path, nll: list[float], scores: list[float], step: int = 5, sample_set: str = "abc") -> Path:
    """A directory of `lccp measure`: answers with these NLLs (exact below 0.5), heads with these scores."""

    rows = []
    for sample, value in enumerate(nll):
        where = dict(step=step, length_tok=64, depth_cell=0.5, sample=sample, sample_set=sample_set)
        rows += [row("NeedleGrid", "answer_nll", value, **where)] * 2  # two grids may share a cell
        rows.append(row("NeedleGrid", "exact", float(value < 0.5), **where))
    for head, score in enumerate(scores):
        rows.append(row("RetrievalHeads", "retrieval_score", score, step, layer=0, head=head, sample_set=sample_set))
    rows.append(row("CorpusPPL", "nll", nll[0], step, corpus="zh"))
    RunStore(directory).write_window(rows, step)
    return directory


def test_numbers_are_paired(tmp_path: Path) -> None:
    before = measured(tmp_path / "a", [0.2, 0.4, 1.0, 2.0], [0.5, 0.05, 0.3])
    after = measured(tmp_path / "b", [0.6, 0.3, 1.2, 2.0], [0.05, 0.2, 0.35])
    lines = {line.label: line for line in compare(before, after)}
    ppl = lines["answer PPL, NeedleGrid"]
    assert (ppl.before, ppl.after) == (f"{math.exp(0.9):.4g}", f"{math.exp(1.025):.4g}")
    found = re.search(r"over 4 samples; NLL \+0.1250 nat \[(.*), (.*)\], 50% have more", ppl.note)
    theirs = stats.ttest_1samp([0.4, -0.1, 0.2, 0.0], 0).confidence_interval(0.95)
    assert [float(end) for end in found.groups()] == pytest.approx(list(theirs), abs=0.05)
    assert "won; -25.0 points [" in lines["NIAH exact, NeedleGrid"].note
    assert "+0.4000 nat (averages alone: no interval)" in lines["corpus PPL, zh"].note
    assert lines["NIAH exact, NeedleGrid"].before == "50.0%" and "1 of 4 samples lost, 0 won" in str(lines)
    assert lines["corpus PPL, zh"].after == f"{math.exp(0.6):.4g}"
    heads = lines["retrieval heads"]
    assert (heads.before, heads.after) == ("2", "2") and "of 3" in heads.note and "at most 0.450" in heads.note
    kept = lines["best heads kept"]
    assert (kept.before, kept.after) == ("2", "1")
    head, *table = as_text(list(lines.values())).splitlines()
    assert [line.split("  ")[0] for line in table] == list(lines) and head.split() == ["before", "after"]


def test_sequences_and_heads_say_what_is_beyond_noise(tmp_path: Path) -> None:
    """Head 0 loses what all samples agree on, the rest is noise; two sequences of eight lose 0.1 nat."""
    rng = np.random.default_rng(0)
    score_hs, hard = rng.uniform(0.2, 0.9, size=(6, 1)) + rng.normal(scale=0.01, size=(6, 8)), rng.normal(size=8)
    for name, change in (("a", 0.0), ("b", 0.3)):
        rows = [
            row("CorpusPPL", "nll", hard.mean() + change / 3, corpus="zh", length_tok=64),
            *(row("CorpusPPL", "sequence_nll", nll + (change / 3 + 0.01 * s if change else 0), corpus="zh",
                  length_tok=64, sample=s, sample_set="5e9") for s, nll in enumerate(hard)),
        ]  # fmt: skip
        noisy = score_hs + rng.normal(scale=0.002, size=score_hs.shape) - change * (np.arange(6) == 0)[:, None]
        rows += [
            row("RetrievalHeads", "retrieval_score", value, layer=0, head=head, sample=sample, sample_set="b105")
            for (head, sample), value in np.ndenumerate(noisy)
        ]
        RunStore(tmp_path / name).write_window(rows, 5)
    lines = {line.label: line for line in compare(tmp_path / "a", tmp_path / "b")}
    assert re.search(r"NLL \+0.1350 nat \[\+0.11\d+, \+0.15\d+\]", lines["corpus PPL, zh"].note)
    assert "; 1 head beyond noise" in lines["retrieval heads"].note
    assert re.search(r"noise alone replaces 0\.\d$", lines["best heads kept"].note)


def test_what_has_no_pair_is_left_out_or_refused(tmp_path: Path) -> None:
    before = measured(tmp_path / "a", [0.2], [0.5])
    other = measured(tmp_path / "b", [0.2], [0.5], sample_set="xyz")
    assert [line.label for line in compare(before, other)] == ["corpus PPL, zh"]
    later = measured(tmp_path / "c", [0.2], [0.5], step=6)
    with pytest.raises(ValueError, match="hold no step in common"):
        compare(before, later)
    with pytest.raises(ValueError, match="holds no rows"):
        compare(before, tmp_path)
