"""Everything that a run can show: figures, tables, highlights and signals of each file in this folder.

In: Runs. Out: charts, HTML, Highlights, Signals, in the order of the page. A file that has a SHOWN is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
import traceback
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from megatron_lccp.analysis import measured
from megatron_lccp.analysis.charts.chart import Chart, NothingToDraw
from megatron_lccp.analysis.measured.highlight import Highlight
from megatron_lccp.analysis.measured.panels import (
    generic_figures,
    generic_highlights,
    generic_scalars,
    generic_signals,
    generic_tables,
)
from megatron_lccp.analysis.measured.shown import Block, Figure, Shown
from megatron_lccp.analysis.measured.signal import Signal
from megatron_lccp.analysis.run import Measure, Run, Runs

_T = TypeVar("_T")
LEVELS = ("behavioural", "probabilistic", "mechanistic", "training")


@cache
def all_shown() -> tuple[Shown, ...]:
    """The SHOWN of every file in this folder, in the order of their places."""
    names = [f"{measured.__name__}.{module.name}" for module in pkgutil.iter_modules(measured.__path__)]
    modules = [importlib.import_module(name) for name in names if name != __name__]
    return tuple(sorted((m.SHOWN for m in modules if hasattr(m, "SHOWN")), key=lambda shown: shown.place))


def unclaimed(run: Run) -> list[Measure]:
    """What was measured and has no file here: it is shown by its declared axes."""
    return [measure for measure in run.measures if not any(shown.claims(measure) for shown in all_shown())]


def run_signals(run: Run) -> tuple[Signal, ...]:
    """All signals that the run's rows support, behavioural first; those of benchmarks and unjudged ones too."""
    found = [signal for shown in all_shown() for make in shown.signals for signal in make(run)]
    found += [signal for measure in unclaimed(run) for signal in generic_signals(run, measure)]
    return tuple(sorted((s for s in found if len(s.tokens_k)), key=lambda signal: LEVELS.index(signal.level)))


def signal_table(signals: Sequence[Signal]) -> pd.DataFrame:
    """Signals as lines, one per token count (the later checkpoint, as in `after_start`): signal, tokens, value."""
    columns = ["signal", "tokens", "value"]
    tables = [
        pd.DataFrame({"signal": signal.name, "tokens": signal.tokens_k, "value": signal.value_k}) for signal in signals
    ]
    found = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    return found.drop_duplicates(["signal", "tokens"], keep="last", ignore_index=True)


def figures_of(runs: Runs) -> list[Figure]:
    """The figures of each level in order: those of the files here, then one for each measure without a file."""
    found = [figure for shown in all_shown() for figure in shown.figures]
    measures = {(m.monitor, m.metric.name): m for run in runs for m in unclaimed(run)}  # a run may declare it anew
    found += [figure for measure in measures.values() for figure in generic_figures(runs, measure)]
    return sorted(found, key=lambda figure: LEVELS.index(figure.level))


def make_charts(runs: Runs, keys: Container[str] | None = None) -> Iterator[tuple[Figure, Chart | NothingToDraw]]:
    """Every figure, or those of some keys, with its chart or with what is missing for it."""
    for figure in figures_of(runs):
        if keys is not None and figure.key not in keys:
            continue
        try:
            yield figure, replace(figure.chart(runs), key=figure.key, title=figure.title)
        except NothingToDraw as nothing:
            yield figure, nothing
        except Exception as error:  # of a file that somebody added, say: the rest of the page is worth having
            yield figure, NothingToDraw(_left_out(f"figure {figure.key}", error))


def run_tables(run: Run, prefix: str = "") -> list[str]:
    """Every table that the run has numbers for; `prefix` keeps ids of runs apart."""
    tables = [html for shown in all_shown() for make in shown.tables for html in _made(make, run)]
    tables += [html for measure in unclaimed(run) for html in _made(generic_tables, run, measure)]
    return [html.replace('id="', f'id="{prefix}', 1) for html in tables if html]


def run_highlights(run: Run) -> list[Highlight]:
    """All highlights that the run's rows and steps support."""
    own = [measure for measure in unclaimed(run) if measure.metric.judged]
    highlights = [
        (shown.place, highlight) for shown in all_shown() for make in shown.highlights for highlight in _made(make, run)
    ]
    highlights += [
        (BEFORE_TRAINING, highlight) for measure in own for highlight in _made(generic_highlights, run, measure)
    ]
    return [highlight for _, highlight in sorted(highlights, key=lambda placed: placed[0])]


def blocks_of(level: str) -> list[Block]:
    """The tables that stand beside the figures of a level."""
    return [block for shown in all_shown() for block in shown.blocks if block.level == level]


def run_cautions(run: Run) -> list[str]:
    """Sentences about what a reader of the page might take wrongly: monitors' own, and those of what is shown."""
    said = run.events.loc[run.events["kind"] == "sample", "text"].astype(str).drop_duplicates()
    own = [f"{text.rstrip('.')}." for text in said]
    return own + [text for shown in all_shown() for text in shown.cautions(run)]


def run_frames(run: Run) -> dict[str, pd.DataFrame]:
    """Name -> frame of what an export writes beside the figures; those that have lines."""
    made = {name: make(run) for shown in all_shown() for name, make in shown.frames.items()}
    return {name: frame for name, frame in made.items() if len(frame)}


def run_scalars(run: Run) -> dict[str, float]:
    """W&B's scalars of the run's last checkpoint, by path; what is not a number is left out."""
    values = {name: value for shown in all_shown() for name, value in shown.scalars(run).items()}
    values |= {name: value for measure in unclaimed(run) for name, value in generic_scalars(run, measure).items()}
    return {name: float(value) for name, value in values.items() if pd.notna(value)}


def _made(make: Callable[..., Iterable[_T]], *about: Any) -> list[_T]:
    """What `make` makes; nothing, with a warning, if it fails. (Signals may not fail: a verdict rests on all of them.)"""
    try:
        return list(make(*about))
    except Exception as error:
        _left_out(make.__qualname__, error)
        return []


def _left_out(what: str, error: Exception) -> str:
    """Say, in one line with the file and line, what is left out of the page and why."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    text = (
        f"{what} failed: {type(error).__name__}: {' '.join(str(error).split())} ({Path(at.filename).name}:{at.lineno})"
    )
    warnings.warn(f"{text}; it is left out", stacklevel=2)
    return text


BEFORE_TRAINING = 89
"""Place of highlights of measures without a file: after all others, but for what the training cost."""
