"""What one file of this folder shows of runs.

In: its functions. Out: a Shown, which `registry` finds; the page, the export, W&B and the verdict take it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from megatron_lccp.analysis.charts.chart import Chart
from megatron_lccp.analysis.measured.columns import Column
from megatron_lccp.analysis.measured.highlight import Highlight
from megatron_lccp.analysis.measured.signal import Signal
from megatron_lccp.analysis.run import Measure, Run, Runs


@dataclass(frozen=True)
class Figure:
    """A figure of the report: where it belongs, and how it is made."""

    key: str
    """Id on the page, and name of its files in an export."""
    title: str
    level: str
    """behavioural, probabilistic, mechanistic (the paper's three), or training."""
    chart: Callable[[Runs], Chart]
    """Raises NothingToDraw where no run measured it."""
    of_window: bool = False
    """Whether a single checkpoint is worth it, as for a heat map: W&B has it of every window."""


@dataclass(frozen=True)
class Block:
    """A table that stands in the open beside the figures of a level, with a note."""

    key: str
    level: str
    table: Callable[[Run], tuple[str, pd.DataFrame, Sequence[Column], str]]
    """Title, frame, columns and note; a frame without lines gives no table."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Everything that is shown of one thing measured. A file of this folder has one, by the name SHOWN."""

    place: int
    """Where it stands among the others of its level, lowest first."""
    claims: Callable[[Measure], bool] = lambda measure: False
    """Which measures it shows; what nobody claims is shown by `panels`."""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Callable[[Run], Iterable[str]], ...] = ()
    """HTML of collapsible tables, under Numbers."""
    highlights: tuple[Callable[[Run], Iterable[Highlight]], ...] = ()
    signals: tuple[Callable[[Run], Iterable[Signal]], ...] = ()
    blocks: tuple[Block, ...] = ()
    frames: Mapping[str, Callable[[Run], pd.DataFrame]] = field(default_factory=dict)
    """Name -> frame that an export writes as tables/NAME.csv, besides those of figures."""
    scalars: Callable[[Run], Mapping[str, float]] = lambda run: {}
    """W&B's scalars of a run's last checkpoint, by path."""
    cautions: Callable[[Run], Iterable[str]] = lambda run: ()
    """Sentences at the top of the page about what a reader might take wrongly."""
