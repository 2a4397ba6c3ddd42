"""Two measurements side by side: numbers computed here by hand, and what has no pair is left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_lccp.analysis.compare import as_text, compare
from megatron_lccp.records import RunStore
from megatron_lccp.schema import Row


def measured(directory: Path, nll: list[float], scores: list[float], step: int = 5, sample_set: str = "abc") -> Path:
    """A directory of `lccp measure`: answers with these NLLs (exact below 0.5), heads with these scores."""

    def row(monitor: str, metric: str, value: float, **where: Any) -> Row:
        about = dict(run="r", config_hash="h", step=step, tokens=step, stage="s", unit="", n=4)
        return Row(monitor=monitor, metric=metric, value=value, **about, **where)

    rows = []
    for sample, value in enumerate(nll):
        where = dict(length_tok=64, depth_cell=0.5, sample=sample, sample_set=sample_set)
        rows += [row("NeedleGrid", "answer_nll", value, **where)] * 2  # two grids may share a cell
        rows.append(row("NeedleGrid", "exact", float(value < 0.5), **where))
    for head, score in enumerate(scores):
        rows.append(row("RetrievalHeads", "retrieval_score", score, layer=0, head=head, sample_set=sample_set))
    rows.append(row("CorpusPPL", "nll", nll[0], corpus="zh"))
    RunStore(directory).write_window(rows, step)
    return directory


def test_numbers_are_paired(tmp_path: Path) -> None:
    before = measured(tmp_path / "a", [0.2, 0.4, 1.0, 2.0], [0.5, 0.05, 0.3])
    after = measured(tmp_path / "b", [0.6, 0.3, 1.2, 2.0], [0.05, 0.2, 0.35])
    lines = {line.label: line for line in compare(before, after)}
    ppl = lines["answer PPL, NeedleGrid"]
    assert (ppl.before, ppl.after) == (f"{math.exp(0.9):.4g}", f"{math.exp(1.025):.4g}")
    assert "over 4 samples" in ppl.note and "+0.1250 nat, 50% have more" in ppl.note
    assert lines["NIAH exact, NeedleGrid"].before == "50.0%" and "1 of 4 samples lost, 0 won" in str(lines)
    assert lines["corpus PPL, zh"].after == f"{math.exp(0.6):.4g}"
    heads = lines["retrieval heads"]
    assert (heads.before, heads.after) == ("2", "2") and "of 3" in heads.note and "at most 0.450" in heads.note
    kept = lines["best heads kept"]
    assert (kept.before, kept.after) == ("2", "1")
    head, *table = as_text(list(lines.values())).splitlines()
    assert [line.split("  ")[0] for line in table] == list(lines) and head.split() == ["before", "after"]


def test_what_has_no_pair_is_left_out_or_refused(tmp_path: Path) -> None:
    before = measured(tmp_path / "a", [0.2], [0.5])
    other = measured(tmp_path / "b", [0.2], [0.5], sample_set="xyz")
    assert [line.label for line in compare(before, other)] == ["corpus PPL, zh"]
    later = measured(tmp_path / "c", [0.2], [0.5], step=6)
    with pytest.raises(ValueError, match="hold no step in common"):
        compare(before, later)
    with pytest.raises(ValueError, match="holds no rows"):
        compare(before, tmp_path)
