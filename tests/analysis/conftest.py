"""Synthetic runs that the tests of this folder share; a test that writes makes one of its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_lccp.analysis.report.report import write_report
from tests.analysis.synthetic_run import STEP_TOK, make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run with all monitors and two stages: `dir`, and `rows`, the Rows of its windows as they were written."""
    directory = tmp_path_factory.mktemp("run")
    return SimpleNamespace(dir=directory, rows=make_run(directory))


@pytest.fixture(scope="session")
def scores_csv(tmp_path_factory):
    """Benchmark scores of some of its checkpoints, as measured elsewhere."""
    path = tmp_path_factory.mktemp("scores") / "scores.csv"
    lines = [f"{step * STEP_TOK},{name},{40 + step / 10 + shift}" for name, shift in (("ruler", 3), ("mrcr", 0))
             for step in (100, 150, 200, 250, 300)]  # fmt: skip
    path.write_text("\n".join(["tokens,benchmark,score", *lines]) + "\n")
    return path


@pytest.fixture(scope="session")
def page(run, scores_csv):
    """The report of `run`, in its directory, with every figure of the paper."""
    return write_report(run.dir, scores=scores_csv)


@pytest.fixture
def small_run(tmp_path: Path):
    """The same, small, to be changed: windows at 0, 5, 10, 15, 20, the second stage from 10."""
    directory = tmp_path / "run"
    rows = make_run(
        directory, steps=20, lccp_from=10, every=5, lengths=(1024, 4096), depths=(0.0, 0.5, 1.0), samples=2, layers=2,
        heads=3, skip=(7,),
    )  # fmt: skip
    return SimpleNamespace(dir=directory, rows=rows)
