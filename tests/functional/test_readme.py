"""Every shipped YAML parses, and fits the fewest ranks that its layout needs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT

RUNS = sorted(path for path in ROOT.glob("examples/*.yaml") if "\nstages:" in path.read_text())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_shipped_yaml_parses_and_fits_its_ranks(path: Path, tmp_path: Path) -> None:
    from megatron_lccp.config.load import dump_config, parse_config
    from megatron_lccp.config.rules import layout_problems
    from megatron_lccp.model.resolved import resolve

    config = parse_config(path)
    fields = resolve(config).fields
    p = config.parallel
    ranks = math.lcm(p.tensor * p.pipeline * p.context, p.expert * (p.expert_tensor or p.tensor) * p.pipeline)
    assert layout_problems(config, ranks, fields, "0.16.1") == []
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert parse_config(tmp_path / "resolved.yaml") == config
