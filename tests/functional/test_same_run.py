"""The proof of a refactor compares what the code computes, to the last bit, and nothing that the machine decides."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.synthetic_run import make_run

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]
SIZES = dict(steps=4, lccp_from=0, every=2, lengths=(1024,), samples=2, layers=2, heads=2, skip=())


@pytest.fixture
def same_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("same_run")

    def call(before: Path, after: Path) -> tuple[int, list[str]]:
        code = tool.main([str(before), str(after)])
        said = capsys.readouterr()
        return code, (said.out + said.err).splitlines()

    return call


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    make_run(tmp_path / "before", **SIZES)
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    return tmp_path / "before", tmp_path / "after"


def edit_last_step(run: Path, **fields: float) -> None:
    *steps, last = (run / "steps.jsonl").read_text().splitlines()
    (run / "steps.jsonl").write_text("\n".join([*steps, json.dumps(json.loads(last) | fields)]) + "\n")


def test_times_and_names_do_not_count(same_run: Callable, runs: tuple[Path, Path]) -> None:
    edit_last_step(runs[1], time_s=77.0, tokens_per_s=1.5)
    code, (line,) = same_run(*runs)
    assert code == 0 and line.startswith("the same: 4 steps and ")


def test_the_last_bit_of_a_loss_counts(same_run: Callable, runs: tuple[Path, Path]) -> None:
    for run, loss in zip(runs, (0.3, 0.1 + 0.2), strict=True):
        edit_last_step(run, loss=loss)
    code, (line,) = same_run(*runs)
    assert code == 1 and line.startswith("steps: loss differs in 1 of 4, first at step 4: ")


def test_a_window_that_is_not_there_counts(same_run: Callable, runs: tuple[Path, Path]) -> None:
    max(runs[1].glob("rows/step-*.parquet")).unlink()
    code, (line,) = same_run(*runs)
    assert code == 1 and line.startswith("rows: ") and line.endswith(" after")


def test_a_new_metric_is_named_and_the_rest_compared(same_run: Callable, runs: tuple[Path, Path]) -> None:
    for path in runs[0].glob("rows/step-*.parquet"):
        rows = pq.read_table(path)
        pq.write_table(rows.filter(pc.not_equal(rows["metric"], "exact")), path)
    code, lines = same_run(*runs)
    assert code == 1 and lines and all(re.fullmatch(r"rows: exact of \w+ is new: \d+", line) for line in lines)


def test_what_is_no_run_is_refused(same_run: Callable, runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert same_run(runs[0], tmp_path / "none") == (2, [f"same_run: {tmp_path / 'none'} is not a run directory"])
