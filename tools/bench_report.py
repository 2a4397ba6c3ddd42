"""How long a long run takes to read and its report to open: 200 checkpoints, 10 million rows.

    python tools/bench_report.py [--checkpoints 200] [--keep FOLDER]

In: nothing. Out: seconds to read rows, to write the report, and its size; with Chromium on PATH, the milliseconds from
opening the page until it can be read (its first figures drawn) and, at most, until all are drawn, best of 3. The rows
are random numbers in the places of a real run: 32 layers of 32 heads and 16 samples with three scores, 16 x 11 cells.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_lccp.analysis.report.report import write_report
from megatron_lccp.records.store import RunStore, row_schema

STEP_TOK = 16_777_216
EVERY = 60
# The page's own policy lets no other script run, so that it is taken out of the copy that is timed. Before a page is
# printed all its figures are drawn, at the width of paper: that is the latest that the rest of them can be there.
TIMER = """<script>addEventListener("load", () => {
  const read = performance.now();
  dispatchEvent(new Event("beforeprint"));
  document.title = JSON.stringify({ read: Math.round(read), drawn: Math.round(performance.now()) });
});</script>"""


def window(step: int, rng: np.random.Generator) -> Iterator[pd.DataFrame]:
    """The rows of one window, monitor by monitor."""
    base = {"run": "long", "config_hash": "0123456789ab", "step": step, "tokens": step * STEP_TOK, "stage": "lccp"}
    layer, head, sample = (at.ravel() for at in np.indices((32, 32, 16)))
    where = base | {"monitor": "RetrievalHeads", "unit": "share", "n": 30, "layer": layer, "head": head,
                    "sample": sample, "length_tok": 65536, "depth_cell": 0.5, "sample_set": "b105"}  # fmt: skip
    for metric in ("retrieval_score", "content_score", "needle_mass"):
        yield pd.DataFrame(where | {"metric": metric, "value": rng.random(layer.size) ** 8})
    length, cell, sample = (at.ravel() for at in np.indices((16, 11, 4)))
    where = base | {"monitor": "NeedleGrid", "n": 21, "length_tok": 4096 * (1 + length), "depth_cell": cell / 10,
                    "sample": sample, "sample_set": "5eed"}  # fmt: skip
    nll = rng.gamma(2.0, 0.5, length.size) / (1 + step / EVERY / 20)
    yield pd.DataFrame(where | {"metric": "answer_nll", "value": nll, "unit": "nat"})
    yield pd.DataFrame(where | {"metric": "exact", "value": (nll < 0.5).astype(float), "unit": "share"})
    for k, corpus in enumerate(("en", "zh", "code")):
        value = 2 + 0.2 * k - 0.05 * np.log1p(step)
        yield pd.DataFrame([base | {"monitor": "CorpusPPL", "metric": "nll", "value": value, "unit": "nat", "n": 65536,
                                    "corpus": corpus, "length_tok": 65536}])  # fmt: skip


def make_run(folder: Path, checkpoints: int) -> RunStore:
    """A run directory with one window a checkpoint."""
    store, rng = RunStore(folder), np.random.default_rng(0)
    store.rows_dir.mkdir(parents=True)
    for step in range(0, checkpoints * EVERY, EVERY):
        parts = [part.reindex(columns=row_schema().names) for part in window(step, rng)]
        tables = [pa.Table.from_pandas(part, row_schema(), preserve_index=False) for part in parts]
        pq.write_table(pa.concat_tables(tables), store.rows_dir / f"step-{step:08d}.parquet", compression="zstd")
    return store


def timed(text: str, work):
    started = time.perf_counter()
    found = work()
    print(f"{text.format(found)}: {time.perf_counter() - started:.1f} s", flush=True)
    return found


def open_page(page: Path, folder: Path) -> dict[str, int] | None:
    """Milliseconds until the page can be read and until all is drawn, best of 3; None without a browser."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        return None
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    copy = folder / "timed.html"
    copy.write_text(text.replace("</body>", TIMER + "</body>"), encoding="utf-8")
    found = []
    for attempt in range(3):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--dump-dom",
                   f"--user-data-dir={folder / f'profile{attempt}'}", copy.as_uri()]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        title = re.search(r"<title>(.*?)</title>", dom)
        assert title is not None, dom[:1000]
        found.append(json.loads(title[1]))
    return {name: min(each[name] for each in found) for name in ("read", "drawn")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="a folder for the run and its report (default: removed at the end)")
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = known.keep or Path(temporary)
        store = make_run(folder / "run", known.checkpoints)
        timed("read all rows, {0:,}", lambda: len(store.read_rows()))
        one = pc.field("metric") == "retrieval_score"
        timed("read one metric, {0:,} rows", lambda: len(store.read_rows(columns=["step", "value"], where=one)))
        page = timed("write the report", lambda: write_report(folder / "run"))
        print(f"the report: {page.stat().st_size / 1e6:.1f} MB")
        if opened := open_page(page, Path(temporary)):
            print(
                f"to open it: {opened['read']} ms until it can be read, at most {opened['drawn']} ms until all is drawn"
            )


if __name__ == "__main__":
    main()
