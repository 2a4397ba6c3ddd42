"""A run of a monitor that this project does not know, with a metric of every kind that one can declare.

In: a folder. Out: the folder filled through RunStore, as a training fills it, and the same numbers as one plain frame.
Run as a script to make one to look at: python -m tests.analysis.stranger <folder>
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import COORDINATES, Every, Metric, Monitor, Row

STEP_TOK = 1_000_000
CHECKPOINTS = 13
SAMPLES = 4
LAGS, TEMPERATURES = (64, 1024, 16384), (0.5, 1.0)


@dataclass(frozen=True)
class Stranger(Monitor):
    """Of a package of others; its metrics alone are of use here."""

    metrics = (
        Metric(name="calm", unit="nat", about="No axis, and samples.", level="probabilistic", better="lower",
               bounds=(0.0, None), judged=True, margin=0.25),
        Metric(name="recall", unit="share", about="One axis, and samples.", level="behavioural", better="higher",
               bounds=(0.0, 1.0), axes=("lag_tok",), judged=True, margin=0.5),
        Metric(name="spread", unit="nat", about="Two axes.", level="probabilistic", axes=("temperature", "lag_tok")),
        Metric(name="by_task", unit="share", about="An axis of names.", level="behavioural", better="higher",
               bounds=(0.0, 1.0), axes=("task",)),
        Metric(name="perplexed", unit="ppl", about="Three decades by corpus and language.", level="probabilistic",
               better="lower", bounds=(1.0, None), series=("corpus", "language")),
        Metric(name="tilt", unit="share", about="From -1 to 1, a map for each language.", level="mechanistic",
               bounds=(-1.0, 1.0), axes=("temperature", "lag_tok"), series=("language",)),
        Metric(name="pull", unit="share", about="By head.", level="mechanistic", better="higher", bounds=(0.0, 1.0),
               axes=("head", "layer"), series=("language",)),
        Metric(name="fragile", unit="nat", about="Not finite at times.", level="probabilistic", better="lower",
               judged=True),
        Metric(name="grade", unit="points", about="A benchmark.", level="behavioural", better="higher",
               benchmark=True),
    )  # fmt: skip
    every: Every = Every(steps=1)
    on_error: Literal["skip", "stop"] = "skip"

    def measure(self, window: None = None) -> Iterable[Row]:
        """Nothing: its rows are those of `stranger_rows`."""
        return ()


def stranger_rows(step: int, name: str = "strange", monitor: str = "Stranger") -> Iterator[Row]:
    """Rows of a window: values that are easily told apart, and noise that the samples bring with them."""
    late, noise_s = math.log(step + 1), 0.05 * np.sin(np.arange(SAMPLES))
    jitter = 0.01 * math.cos(7 * step)

    def row(metric: str, value: float, **where) -> Row:
        fields = {name: value for name, value in where.items() if name in COORDINATES}
        own = {name: value for name, value in where.items() if name not in COORDINATES}
        unit = next(each.unit for each in Stranger.metrics if each.name == metric)
        return Row(
            run=name, config_hash="5742a6e", step=step, tokens=step * STEP_TOK, stage="lccp", monitor=monitor,
            metric=metric, value=float(value), unit=unit, n=1, own=own, **fields,
        )  # fmt: skip

    for sample, noise in enumerate(noise_s):
        of_sample = dict(sample=sample, sample_set="57a4")
        yield row("calm", 3 - 0.5 * late + noise + jitter, **of_sample)
        for lag in LAGS:
            share = 0.2 * late * (1 + noise) - 0.02 * math.log2(lag / 64)
            yield row("recall", min(max(share, 0), 1), lag_tok=lag, length_tok=lag + 64, **of_sample)
        for layer in range(2):
            for head in range(3):
                for language in ("en", "zh"):
                    pull = (head + 1) / 8 + layer / 4 + 0.1 * noise + 0.01 * step * (language == "en")
                    yield row("pull", pull, layer=layer, head=head, language=language, **of_sample)
    for temperature in TEMPERATURES:
        for lag in LAGS:
            yield row("spread", temperature * math.log(lag) / (step + 1), temperature=temperature, lag_tok=lag)
            for language, sign in (("en", 1), ("zh", -1)):
                tilt = sign * temperature * math.cos(step + math.log2(lag))
                yield row("tilt", tilt, temperature=temperature, lag_tok=lag, language=language)
    for task, least in (("copy", 0.1), ("sort <fast>", 0.3)):
        yield row("by_task", least + 0.05 * late, task=task)
    for corpus, language, start in (("books", "en", 4000.0), ("books", "zh", 900.0), ("code", "en", 40.0)):
        yield row("perplexed", 2 + start * math.exp(-0.6 * step), corpus=corpus, language=language)
    yield row("fragile", {5: math.nan, 8: math.inf}.get(step, 2 - 0.1 * late))
    yield row("grade", 40 + 10 * late + 3 * math.cos(7 * step))


def make_stranger(directory: Path, name: str = "strange", steps: Iterable[int] = range(CHECKPOINTS)) -> pd.DataFrame:
    """Fill `directory`. Returns the rows, a line each: step, metric, value and every coordinate that one has."""
    store, written = RunStore(directory), []
    store.write_config(f"name: {name}\n")
    store.write_metrics([Stranger()])
    for step in steps:
        rows = list(stranger_rows(step, name))
        store.write_window(rows, step)
        written += rows
    return pd.DataFrame(
        {name: getattr(row, name) for name in ("step", "metric", "value", *COORDINATES)} | dict(row.own)
        for row in written
    )


if __name__ == "__main__":
    make_stranger(Path(sys.argv[1]))
