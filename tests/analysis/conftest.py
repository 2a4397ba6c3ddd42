"""What is read beside the synthetic run, and its report, for the tests of this folder."""

from pathlib import Path

import pytest

from tests.synthetic_run import STEP_TOK


@pytest.fixture(scope="session")
def scores_csv(tmp_path_factory) -> Path:
    """Benchmark scores of some of the run's checkpoints, as measured elsewhere."""
    path = tmp_path_factory.mktemp("scores") / "scores.csv"
    lines = [f"{step * STEP_TOK},{name},{40 + step / 10 + shift}" for name, shift in (("ruler", 3), ("mrcr", 0))
             for step in (100, 150, 200, 250, 300)]  # fmt: skip
    path.write_text("\n".join(["tokens,benchmark,score", *lines]) + "\n")
    return path


@pytest.fixture(scope="session")
def page(run, scores_csv) -> Path:
    """The report of `run`, in its directory, with every figure of the paper."""
    from megatron_lccp.analysis.report.report import write_report

    return write_report(run.dir, scores=scores_csv)
