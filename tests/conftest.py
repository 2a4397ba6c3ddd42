"""Fixtures that several test directories share. What a fixture needs is imported when a test asks for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.tiny import tiny_tree


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny configuration whose data are prepared; tests give it a run directory of their own with --dir."""
    from megatron_lccp.config.load import parse_config
    from megatron_lccp.data.prepare import prepare

    directory = tmp_path_factory.mktemp("tiny")
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(directory)))
    prepare(parse_config(path), say=lambda text: None)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A synthetic run with all monitors and two stages, to be read: `dir`, and `rows`, its Rows as written."""
    from tests.synthetic_run import make_run

    directory = tmp_path_factory.mktemp("run")
    return SimpleNamespace(dir=directory, rows=make_run(directory))


@pytest.fixture
def small_run(tmp_path: Path) -> SimpleNamespace:
    """The same, small, to be changed: windows at 0, 5, 10, 15, 20, the second stage from 10."""
    from tests.synthetic_run import make_run

    directory = tmp_path / "run"
    rows = make_run(
        directory, steps=20, lccp_from=10, every=5, lengths=(1024, 4096), depths=(0.0, 0.5, 1.0), samples=2, layers=2,
        heads=3, skip=(7,),
    )  # fmt: skip
    return SimpleNamespace(dir=directory, rows=rows)
