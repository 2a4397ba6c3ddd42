"""Fixtures that several test directories share."""

from __future__ import annotations

from pathlib import Path

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
