"""What is read beside the synthetic run, its frames, figures and report, for the tests of this folder.

What a fixture gives is shared: read it, and change a copy.
"""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
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
def loaded(run, scores_csv):
    """The run as a report sees it, with those scores."""
    from megatron_lccp.analysis.measured.benchmarks import with_scores
    from megatron_lccp.analysis.run import load_runs

    (found,) = with_scores(load_runs([run.dir]), scores_csv)
    return found


@pytest.fixture(scope="session")
def rows(run) -> pd.DataFrame:
    """All rows of its windows."""
    from megatron_lccp.records.store import RunStore

    return RunStore(run.dir).read_rows(health=False)


@pytest.fixture(scope="session")
def charts(loaded):
    """Its figures by key."""
    from megatron_lccp.analysis.measured.registry import make_charts

    return {figure.key: chart for figure, chart in make_charts([loaded])}


@pytest.fixture(scope="session")
def drawn(charts):
    """The same as matplotlib draws them."""
    from megatron_lccp.analysis.charts.draw import draw

    return {key: draw(chart) for key, chart in charts.items()}


@pytest.fixture(scope="session")
def page(run, scores_csv) -> Path:
    """The report of `run`, in its directory, with every figure of the paper."""
    from megatron_lccp.analysis.report.report import write_report

    return write_report(run.dir, scores=scores_csv)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory) -> SimpleNamespace:
    """A run of a monitor of others: `dir`, and `truth`, its rows as one plain frame."""
    from tests.analysis.stranger import make_stranger

    directory = tmp_path_factory.mktemp("strange")
    return SimpleNamespace(dir=directory, truth=make_stranger(directory))
