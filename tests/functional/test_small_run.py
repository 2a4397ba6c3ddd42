"""The small run that the README shows, cut short, on two ranks: it learns what it is there to show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.distributed.ranks import ROOT
from tests.functional.test_main_job import rows, start


@pytest.mark.timeout(1500)
def test_small_run_shows_something_true(backend: str, tmp_path: Path) -> None:
    """What the README says of examples/tiny_moe.yaml: heads retrieve, and answers at the full length become likely."""
    from megatron_lccp.config.load import parse_config
    from megatron_lccp.data.prepare import prepare

    config, run_dir = ROOT / "examples" / "tiny_moe.yaml", tmp_path / "run"
    places = [f"--dir={run_dir}", f"--data.dir={tmp_path / 'tokens'}", "--wandb.mode=disabled"]
    places += ["--training.steps=62"]  # a third of the run, measured before it and after it
    places += [f"--monitors.{number}.init_args.every={{steps: 62}}" for number in range(5)]
    prepare(parse_config(config, places), say=lambda text: None)
    process = start(config, backend, *places, log=tmp_path / "log")
    assert process.wait(timeout=1400) == 0, (tmp_path / "log").read_text()
    measured = rows(run_dir)
    first, last = measured[measured.step == 0], measured[measured.step == measured.step.max()]

    def answer_nll(window: pd.DataFrame) -> float:
        return window[(window.metric == "answer_nll") & (window.length_tok == 1024)].value.mean()

    scores = last[last.metric == "retrieval_score"].groupby(["layer", "head"]).value.mean()
    assert scores.max() > 0.1
    assert answer_nll(last) < answer_nll(first) - np.log(10), "answer perplexity at 1,024 should fall at least tenfold"
