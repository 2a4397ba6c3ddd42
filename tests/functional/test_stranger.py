"""A package outside the repository ships a monitor with two axes of its own: everything shows what it measured.

The package is written here, installed by an entry point, named in YAML by its short name, and trained with. What comes
after the training reads the run directory alone: it runs in this process, which cannot import the package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from megatron_lccp.analysis.run import load_run
from megatron_lccp.cli import main
from tests.analysis.report.test_report_browser import CHROMIUM, browse
from tests.commands.test_wandb_sink import history
from tests.distributed.ranks import ROOT, free_port

pytestmark = pytest.mark.once

MONITOR = '''
"""How well a segment is copied that stood in the text several times, some way back."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_lccp.measuring import FIRST_ORDINARY_ID, Every, Metric, Monitor, Work, plain, run_trees

AXES = dict(axes=("gap_tok", "repeats"))


@dataclass(frozen=True)
class Echo(Monitor):
    """A drawn segment stands `repeats` times, `gap_tok` other tokens follow, and it comes once more."""

    metrics = (
        Metric(**AXES, name="echoed", unit="share", level="behavioural", better="higher", bounds=(0.0, 1.0),
               about="Tokens of the last copy that are the most likely ones: 1 is copied, 0 is not."),
        Metric(**AXES, name="echo_nll", unit="nat", level="probabilistic", better="lower", bounds=(0.0, None),
               judged=True, margin=0.02, about="Mean NLL of the last copy: 0 is certain and right."),
    )
    every: Every = Every(steps=1)
    """When it is due."""
    on_error: Literal["skip", "stop"] = "skip"
    """What follows an exception."""
    gaps_tok: tuple[int, ...] = (8, 32)
    """Tokens between."""
    repeats: tuple[int, ...] = (1, 2, 3)
    """Copies before."""
    samples: int = 2
    """Drawn texts of each cell."""

    def cells(self):
        return [(gap, count, sample) for gap in self.gaps_tok for count in self.repeats for sample in range(self.samples)]

    def trees(self, window):
        trees = []
        for number, (gap, count, sample) in enumerate(self.cells()):
            ids = np.random.default_rng(sample).permutation(np.arange(FIRST_ORDINARY_ID, window.tokenizer.ordinary_size))
            segment, between = ids[:6], ids[6 : 6 + gap]
            tokens = np.concatenate([*[segment] * count, between, segment])
            trees.append([plain(tokens, number, (len(tokens) - 5, len(tokens)))])
        return trees

    def measure(self, window):
        found = run_trees(window, self.trees(window), self.name, "echo")
        for number, (gap, count, sample) in enumerate(self.cells()):
            where = dict(gap_tok=gap, repeats=count, sample=sample, sample_set="ec40")
            answer = self.trees(window)[number][0].tokens[-5:]
            yield window.row(self, "echoed", (found[number].best_r == answer).mean(), 5, **where)
            yield window.row(self, "echo_nll", found[number].nll_r.mean(), 5, **where)

    def work(self, window):
        trees = self.trees(window)
        return Work(len(self.gaps_tok) * len(self.repeats), len(trees), trees, trees)
'''
FIGURES = ["Echo-echoed", "Echo-echo_nll"]


@pytest.fixture(scope="module")
def config(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with the monitor's short name, beside the folder `site` that the package is installed in."""
    directory = tmp_path_factory.mktemp("stranger")
    info = directory / "site/echo_monitor-1.0.dist-info"
    info.mkdir(parents=True)
    (directory / "site/echo_monitor.py").write_text(MONITOR)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-monitor\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[megatron_lccp.monitors]\necho = echo_monitor:Echo\n")
    tree = yaml.safe_load(tiny_yaml.read_text())
    tree["monitors"] = [{"class_path": "echo", "init_args": {"samples": 3}}]
    tree |= {"dir": str(directory / "run"), "wandb": {"mode": "offline"}}
    (directory / "run.yaml").write_text(yaml.safe_dump(tree))
    return directory / "run.yaml"


def lccp(config: Path, *command: str) -> str:
    """What the command prints, where the package is installed."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(config.parent / "site"), str(ROOT)]), "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lccp.cli", *command], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """The run directory after three steps, with windows at 0, 1, 2 and 3."""
    lccp(config, "train", str(config), "--training.steps=3")
    assert importlib.util.find_spec("echo_monitor") is None
    return config.parent / "run"


@pytest.fixture(scope="module")
def means(trained: Path) -> pd.DataFrame:
    """Means over samples by metric, step and the two axes, straight from the Parquet files."""
    rows = pd.concat([pd.read_parquet(path) for path in sorted((trained / "rows").glob("step-*.parquet"))])
    rows = rows[rows["monitor"] == "Echo"].reset_index(drop=True)
    rows = rows.dropna(subset="own").reset_index(drop=True)
    rows = rows.join(pd.DataFrame([json.loads(text) for text in rows["own"]]))
    assert len(rows) == 4 * 2 * 6 * 3
    return rows.groupby(["metric", "step", "gap_tok", "repeats"])["value"].mean()


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert main(["report", str(trained), "--out", str(path)]) == 0
    return path


def test_the_page_has_a_map_of_it_with_these_numbers(page: Path, trained: Path, means: pd.Series) -> None:
    assert FIGURES[0] in (trained / "report.html").read_text()  # the training wrote one by itself
    text = page.read_text()
    for key, metric in zip(FIGURES, ("echoed", "echo_nll"), strict=True):
        data = json.loads(re.search(rf'id="{key}".*?<script type="application/json">(.*?)</script>', text, re.S)[1])
        assert (data["x"], data["y"], len(data["maps"])) == (["8", "32"], ["1", "2", "3"], 4)
        for step, found in enumerate(data["maps"]):
            np.testing.assert_allclose(found["values"], means[metric, step].unstack("gap_tok"), rtol=1e-5)
    assert "Tokens of the last copy that are the most likely ones" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary found on PATH")
def test_a_browser_draws_it(page: Path, tmp_path: Path) -> None:
    dom, messages = browse(page, tmp_path, "--window-size=1280,900")
    drawn = re.findall(r'<figure class="chart" id="([\w-]+)" data-drawn=""', dom)
    assert set(FIGURES) <= set(drawn) and messages == []


def test_an_export_has_its_figures_and_its_coordinates(trained: Path, tmp_path: Path, means: pd.Series) -> None:
    assert main(["export", str(trained), "--out", str(tmp_path)]) == 0
    for key, metric in zip(FIGURES, ("echoed", "echo_nll"), strict=True):
        assert all((tmp_path / f"figures/{key}.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))
        csv = pd.read_csv(tmp_path / f"figures/{key}.csv").set_index(["step", "gap_tok", "repeats"])["value"]
        np.testing.assert_allclose(csv.sort_index(), means[metric].sort_index())
    measures = pd.read_csv(tmp_path / "measures.csv").query("metric == 'echo_nll'")
    found = measures.set_index(["step", "gap_tok", "repeats"])["mean"].sort_index()
    np.testing.assert_allclose(found, means["echo_nll"].sort_index())
    assert set(measures["rows"]) == {3}


def test_the_verdict_judges_what_it_declares_as_judged(trained: Path, means: pd.Series, capsys) -> None:
    assert main(["verdict", str(trained), "--json"]) == 11
    (signal,) = json.loads(capsys.readouterr().out)["signals"]
    assert (signal["signal"], signal["margin"], signal["samples"]) == ("Echo.echo_nll", 0.02, 3)
    assert load_run(trained).metrics["Echo", "echoed"].better == "higher"


def test_wandb_has_a_scalar_and_a_map_of_every_window(trained: Path, means: pd.Series) -> None:
    (folder,) = (trained / "wandb").glob("offline-run-*")
    lines, *_ = history(folder)
    windows = [line for line in lines if "Echo/echo_nll" in line]
    averages = means.groupby(["metric", "step"]).mean()
    for metric in ("echoed", "echo_nll"):
        assert [line[f"Echo/{metric}"] for line in windows] == pytest.approx(averages[metric].tolist())
        assert all(line[f"window/Echo-{metric}/_type"] == "image-file" for line in windows)
    (last,) = [line for line in lines if "figures/Echo-echo_nll/_type" in line]
    assert last["tables/verdict/nrows"] == 1


def test_a_plan_says_what_it_costs(config: Path) -> None:
    said = lccp(config, "plan", str(config))
    (line,) = [line for line in said.splitlines() if line.startswith("Echo ")]
    tokens = 3 * sum(6 * count + gap + 6 for gap in (8, 32) for count in (1, 2, 3))
    assert line.split()[1:3] == ["18", str(tokens)] and "%" in line, line
