"""The page of published models: what each comes to side by side, and no word of a training."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_lccp.analysis.report.report import report_html, write_report
from megatron_lccp.analysis.run import load_run
from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import PUBLISHED
from tests.analysis.report.test_report import Page
from tests.synthetic_run import make_run

SMALL = dict(steps=0, lccp_from=0, lengths=(512, 1024), depths=(0.0, 0.5, 1.0), samples=2, skip=())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models as `lccp measure --hf` leaves them."""
    directory = tmp_path_factory.mktemp("models")
    for number, (name, heads) in enumerate((("small <b>", 3), ("large", 5))):
        folder = directory / name[:5]
        make_run(folder, name=name, seed=number, layers=2, heads=heads, **SMALL)
        (path,) = RunStore(folder).windows().values()
        table = pq.read_table(path)
        place = table.column_names.index("stage")
        pq.write_table(table.set_column(place, "stage", pa.array([PUBLISHED] * len(table))), path)
        about = {"name": name, "weights_sha256": "0123456789abcdef", "transformers": "5.0.0"}
        RunStore(folder).write_config(f"model: {json.dumps(about)}\n")
    return directory


def test_models_stand_side_by_side(measured: Path) -> None:
    page = Page(write_report([measured]).read_text(encoding="utf-8"))
    words = "".join(page.text)
    assert page.headings[0] == "probabilistic"  # no verdict, and no level that has nothing to show
    heads = next(line for line in page.tables["t-models"] if line[0] == "Retrieval heads")
    assert "of 10 heads" in heads[1] + heads[2] and "of 6 heads" in heads[1] + heads[2]
    assert {"needle-cells", "interference-cells", "head-cells", "positions"} <= page.figures.keys()
    assert not {"needle-averages", "corpus", "head-curves", "training-curves"} & page.figures.keys()
    assert "0123456789ab" in words and "0 tokens" not in words


def test_one_model_has_its_numbers_first(measured: Path) -> None:
    run = load_run(measured / "large")
    assert run.is_published
    page = Page(report_html([run]))
    assert "t-models" not in page.tables and "Retrieval heads" in "".join(page.text)
