"""The how-to pages, followed by the letter: a monitor, two head scores, a source and a figure, in one small training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.distributed.ranks import ROOT, free_port
from tests.tiny import tiny_tree

pytestmark = pytest.mark.once

FIGURE = """
import sys
from megatron_lccp.analysis import measured
measured.__path__.append(sys.argv[1])  # as if the file lay in the folder
from megatron_lccp.analysis.report.report import write_report
print(write_report(sys.argv[2], sys.argv[3]))
"""


def code(page: str) -> str:
    """The first Python block of a how-to page."""
    text = (ROOT / f"docs/howto/{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[0]


def entry(page: str) -> dict:
    """The first YAML block of a how-to page."""
    text = (ROOT / f"docs/howto/{page}.md").read_text(encoding="utf-8")
    return yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has the source, the monitor and the scores of the pages."""
    folder = tmp_path_factory.mktemp("followed")
    for page, name in (("monitor", "my_monitors"), ("head_score", "my_scores"), ("source", "my_sources")):
        (folder / f"{name}.py").write_text(code(page))
    (folder / "novel.txt").write_text("".join(f"Chapter {n}\n" + f"It was day {n}. " * 80 + "\n" for n in range(40)))
    tree = tiny_tree(folder)
    (source,) = entry("source")["data"]["sources"].values()
    source["init_args"]["path"] = str(folder / "novel.txt")
    tree["data"]["sources"]["novel"] = source
    tree["stages"]["lccp"]["mixture"]["long"]["sources"] = {"novel": 1.0}
    (monitor,), (scores,) = entry("monitor")["monitors"], entry("head_score")["monitors"]
    monitor["init_args"] |= {"corpus": "novel", "length_tok": 64}
    scores["init_args"] |= {"lengths_tok": [128], "samples": 2}
    tree["monitors"] = [monitor, scores]
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree))
    for command in (["prepare"], ["train", "--training.steps=2"]):
        run(folder, "-m", "megatron_lccp.cli", command[0], str(folder / "mine.yaml"), *command[1:])
    return folder


def run(folder: Path, *words: str) -> str:
    environment = {
        **os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, timeout=180, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(folder: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(file) for file in sorted((folder / "run/rows").glob("step-*.parquet"))])


def test_the_monitor_measures_and_is_seen(trained: Path) -> None:
    rows = rows_of(trained)
    shares = rows[rows.metric == "top_one"]
    assert sorted(shares.step) == [0] * 4 + [2] * 4 and shares.value.between(0, 1).all() and (shares.n == 63).all()
    assert sorted(shares["sample"]) == sorted([0, 1, 2, 3] * 2)  # what an interval is drawn from
    quarters = rows[rows.metric == "top_one_at"]
    assert sorted(json.loads(own)["quarter"] for own in quarters.own) == sorted([1, 2, 3, 4] * 8)
    page = (trained / "run/report.html").read_text()
    assert "TopOne: top one" in page and "TopOne: top one at" in page
    assert "TopOne" in run(trained, "-m", "megatron_lccp.cli", "measure", str(trained / "mine.yaml"), "--dry-run")


def test_the_head_scores_are_measured_and_seen(trained: Path) -> None:
    rows = rows_of(trained)
    assert rows[rows.metric == "first_token"].value.between(0, 1).all()
    assert rows[rows.metric == "entropy"].value.gt(0).all()
    for metric in ("retrieval_score", "first_token", "entropy"):
        assert {*rows[rows.metric == metric].layer} == {0, 1}
    assert "RetrievalHeads: entropy" in (trained / "run/report.html").read_text()


def test_the_source_is_prepared(trained: Path) -> None:
    manifest = json.loads((trained / "tokens/manifest.json").read_text())
    assert "novel" in manifest["sources"]


def test_the_figure_is_found_and_takes_the_place_of_the_generic_one(trained: Path) -> None:
    (trained / "shown").mkdir()
    (trained / "shown/top_one.py").write_text(code("figure"))
    (trained / "figure.py").write_text(FIGURE)
    run(trained, str(trained / "figure.py"), str(trained / "shown"), str(trained / "run"), str(trained / "own.html"))
    page = (trained / "own.html").read_text()
    assert "Gain from context" in page and "TopOne: top one at" not in page


def test_the_family_has_the_size_that_it_should() -> None:
    from megatron_lccp.model import families

    space = dict(vars(families))
    exec(code("family"), space)
    model = space["qwen3_4b"]()
    fields = model.transformer
    width, queries = fields["hidden_size"], fields["num_attention_heads"] * fields["kv_channels"]
    keys = fields["num_query_groups"] * fields["kv_channels"]
    layer = 2 * width * (queries + keys) + 3 * width * fields["ffn_hidden_size"] + 2 * width + 2 * fields["kv_channels"]
    assert fields["num_layers"] * layer + model.vocab_size * width + width == 4_022_468_096
