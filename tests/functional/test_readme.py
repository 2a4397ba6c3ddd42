"""The README's own monitor, taken from its text and plugged in as a user would; every shipped YAML parses."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.distributed.ranks import ROOT, free_port


def test_monitor_of_the_readme_works(tiny_yaml: Path, tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "(Monitor):" in code)
    (entry,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "my_monitors.py").write_text(code)
    tree = yaml.safe_load(tiny_yaml.read_text())
    tree["monitors"] = yaml.safe_load(entry)
    tree["monitors"][0]["init_args"]["corpus"] = "code"
    tree["dir"] = str(tmp_path / "run")
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(tree))
    environment = {
        **os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "megatron_lccp.cli", "train", str(config), "--training.steps=2"], check=True, cwd=ROOT,
        env=environment, timeout=120,
    )  # fmt: skip
    rows = pd.concat([pd.read_parquet(file) for file in (tmp_path / "run" / "rows").glob("*.parquet")])
    shares = rows[rows.metric == "top_one"]
    assert sorted(shares.step) == [0, 2] and shares.value.between(0, 1).all() and (shares.n == 4 * 127).all()
    assert "top_one" in (tmp_path / "run" / "report.html").read_text()


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
