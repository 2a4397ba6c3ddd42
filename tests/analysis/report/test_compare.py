"""Two runs side by side: numbers computed here by hand, places between checkpoints, and what has no pair is left out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from megatron_lccp.analysis.report.compare import Difference, compare
from megatron_lccp.analysis.report.same_samples import as_text
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
    lines = {line.label: line for line in compare(before, after).changes}
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
    head, *table = as_text(list(lines.values()), ("A", "B")).splitlines()
    assert [line.split("  ")[0] for line in table] == list(lines) and head.split() == ["A", "B"]


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
    lines = {line.label: line for line in compare(tmp_path / "a", tmp_path / "b").changes}
    assert re.search(r"NLL \+0.1350 nat \[\+0.11\d+, \+0.15\d+\]", lines["corpus PPL, zh"].note)
    assert "; 1 head beyond noise" in lines["retrieval heads"].note
    assert re.search(r"noise alone replaces 0\.\d$", lines["best heads kept"].note)


def test_what_has_no_pair_is_left_out_or_refused(tmp_path: Path) -> None:
    before = measured(tmp_path / "a", [0.2], [0.5])
    other = measured(tmp_path / "b", [0.2], [0.5], sample_set="xyz")
    assert [line.label for line in compare(before, other).changes] == ["corpus PPL, zh"]
    later = measured(tmp_path / "c", [0.2], [0.5], step=6)
    with pytest.raises(ValueError, match="no checkpoint of one is as far as the first of the other; measure the same"):
        compare(before, later)
    with pytest.raises(ValueError, match="not a run directory"):
        compare(before, tmp_path / "none")
    with pytest.raises(ValueError, match="are the same run; give two"):
        compare(before, before)
    with pytest.raises(ValueError, match="--ranks: should be at least 1"):
        compare(before, other, ranks=0)


RATE = np.array([0.5, 1.0, 1.5, 2.0])
"""How fast each of four samples falls, in nat per 1,000 tokens."""


def trained(directory: Path, name: str, gain: float, tokens: list[int], step_s: float, ranks: int | None) -> Path:
    """A run of 100-token steps, measured after so many tokens: sample s has 5 + gain s - RATE[s] tokens / 1000."""
    store = RunStore(directory)
    for step in range(1, max(tokens) // 100 + 1):
        own = {} if ranks is None else {"ranks": ranks}
        store.append_step(dict(step=step, tokens=100 * step, stage="lccp", loss=1.0, grad_norm=1.0, lr=1e-3,
                               tokens_per_s=100 / step_s, time_s=step_s, skipped=False) | own)  # fmt: skip
    for count in tokens:
        about = dict(run=name, config_hash="h", step=count // 100, tokens=count, stage="lccp", unit="nat", n=9)
        where = dict(monitor="NeedleGrid", metric="answer_nll", length_tok=64, depth_cell=0.5, sample_set="abc")
        rows = [
            Row(**about, **where, sample=s, value=5 - gain * (1 + s / 10) - rate * count / 1000)
            for s, rate in enumerate(RATE)
        ]
        store.write_window(rows, count // 100)
    return directory


def only(place) -> Difference:
    (found,) = place.differences
    return found


def test_runs_meet_at_equal_tokens_and_at_equal_gpu_hours(tmp_path: Path) -> None:
    """B is 0.2 nat better, by sample 0.2 to 0.26, at any tokens; a step of its costs twice as much."""
    a = trained(tmp_path / "a", "first", 0.0, [0, 1000, 3000], step_s=36.0, ranks=2)
    b = trained(tmp_path / "b", "second", 0.2, [0, 500, 2500], step_s=72.0, ranks=2)
    found = compare(a, b)
    by_tokens, by_hours = found.places
    assert (found.a, found.b, found.shared_tokens, found.step) == ("first", "second", None, 0)
    # 2,500 tokens: B's last checkpoint; A's values stand three quarters of the way from 1,000 to 3,000
    nll = only(by_tokens)
    assert by_tokens.at == 2500 and nll.signal == "answer_nll" and nll.samples == 4
    assert nll.a == pytest.approx(5 - RATE.mean() * 2.5) and nll.gain == pytest.approx(0.23)
    ends = stats.ttest_1samp([0.2, 0.22, 0.24, 0.26], 0).confidence_interval(0.95)
    assert (nll.low, nll.high) == pytest.approx(ends, abs=0.02) and nll.better == "B"
    # 30 steps of A cost 0.6 GPU-hours, 25 of B 1.0: at 0.6, B has 1,500 tokens, half way from 500 to 2,500
    assert by_hours.at == pytest.approx(0.6)
    assert only(by_hours).b == pytest.approx(5 - 0.23 - RATE.mean() * 1.5)
    assert only(by_hours).gain == pytest.approx(0.23 - 1.5 * RATE.mean()) and only(by_hours).better == "A"
    text = found.text()
    assert "At equal tokens, 2.5K tokens: B is better by 1 of 1 signal, A by 0, 0 not told apart." in text
    assert "At equal GPU-hours, 0.60 GPU-hours: B is better by 0 of 1 signal, A by 1" in text
    assert json.loads(found.to_json())["places"][1]["differences"][0]["better"] == "A"


def test_gpu_hours_that_nobody_noted_are_asked_for(tmp_path: Path) -> None:
    a = trained(tmp_path / "a", "first", 0.0, [0, 1000], step_s=36.0, ranks=None)
    b = trained(tmp_path / "b", "second", 0.2, [0, 1000], step_s=36.0, ranks=4)
    hours = compare(a, b).places[1]
    assert hours.at is None and hours.why_not == "first: its steps do not say on how many ranks they ran; give --ranks"
    assert compare(a, b, ranks=2).places[1].at == pytest.approx(0.2)
    assert (
        compare(a, measured(tmp_path / "c", [0.2], [0.5]))
        .places[1]
        .why_not.endswith("; r: steps.jsonl has no times of steps")
    )


def test_heads_are_frozen_by_neither_of_the_two(tmp_path: Path) -> None:
    """The three best heads of A are the three worst of B: who is called first does not matter."""
    score = np.array([0.9, 0.8, 0.7, 0.02, 0.03, 0.04])
    for name, order in (("a", score), ("b", score[::-1])):
        rows = [
            row("RetrievalHeads", "retrieval_score", value + 0.01 * sample, layer=0, head=head, sample=sample, sample_set="b")
            for head, value in enumerate(order) for sample in range(3)
        ]  # fmt: skip
        RunStore(tmp_path / name).write_window(rows, 5)
    for one, other in (("a", "b"), ("b", "a")):
        found = {d.signal: d for d in compare(tmp_path / one, tmp_path / other).places[0].differences}
        assert found["retrieval_score"].gain == pytest.approx(0, abs=1e-9)
