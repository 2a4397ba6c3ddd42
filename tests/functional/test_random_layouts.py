"""tools/random_layouts.py draws what the rules accept, finds a difference, and goes on where a record ends."""

from __future__ import annotations

import importlib
import json
import random
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from tests.distributed.ranks import ROOT


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("random_layouts")


def test_draws_are_of_all_kinds_and_the_same_for_a_seed(tool: ModuleType, tmp_path: Path) -> None:
    path, seen = tool.tiny_yaml(tmp_path), Counter()
    for number in range(12):
        layout = tool.draw(path, 0, number, [2, 4, 8])
        assert layout == tool.draw(path, 0, number, [2, 4, 8]) and not tool.problems_of(path, layout)
    rng = random.Random(0)
    for _ in range(400):
        text = tool.drawn(rng, 8).text
        kinds = {
            "uneven": "pipeline_stage=" in text, "VPP": " VPP" in text, "ETP": " ETP" in text,
            "CP x EP": " CP" in text and " EP" in text, "dense": "tiny_qwen3," in text, "TP": " TP" in text,
        }  # fmt: skip
        seen.update(kind for kind, there in kinds.items() if there)
    assert min(seen[kind] for kind in ("uneven", "VPP", "ETP", "CP x EP", "dense", "TP")) > 10, seen


def test_a_layout_is_run_and_a_record_is_gone_on_with(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.jsonl"
    call = ["--count", "1", "--ranks", "2", "--record", str(record)]
    assert tool.main(call) == 0, capsys.readouterr()
    assert ": equal, " in (said := capsys.readouterr().out) and "1 equal one rank, 0 do not" in said
    (line,) = map(json.loads, record.read_text().splitlines())
    record.write_text(json.dumps(line | {"why": "rank 1: losses"}) + "\n")
    assert tool.main(call) == 1  # of the record alone
    assert capsys.readouterr().out.splitlines()[0].endswith("0 equal one rank, 1 do not")
    record.write_text("{}\n")
    assert tool.main(call) == 2 and "is no record of this tool" in capsys.readouterr().err


def test_a_difference_is_one(tool: ModuleType) -> None:
    row = {"metric": "nll", "value": 1.0}
    one = {"events": [], "losses": [6.0], "grad_norms": [1.0], "health": [], "rows": [row] * 101}
    tool.compare(one, one, "rank 0")
    for other in ({"losses": [6.001]}, {"grad_norms": [1.001]}, {"rows": [row | {"value": 1.001}] * 101},
                  {"events": [("monitor_error", "x")]}, {"rows": [row] * 102}):  # fmt: skip
        with pytest.raises(AssertionError):
            tool.compare(one | other, one, "rank 0")
