"""What tests of several layouts start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks


@pytest.fixture(scope="session")
def base(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that loads one model's weights, on whatever layout."""
    path = str(tmp_path_factory.mktemp("base") / "base.safetensors")
    run_ranks(1, "save_base", path=tiny_yaml, overrides=[], base=path)
    return f"--model.init_from={path}"
