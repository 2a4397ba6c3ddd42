"""The nouns every layer shares: Metric (what a number means), Row (one number and where it was measured), Every (when),
Monitor (who measures).

In: nothing. Out: plain Python types, free of torch, so that the analysis can read what training wrote.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

Level = Literal["behavioural", "probabilistic", "mechanistic"]
"""The paper's three levels: is the answer right, how sure is the model of it, what do its heads do."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a monitor says of one of its metrics; the report, W&B, the export, the verdict and a plan read it.

    A metric that has no figure of its own gets one by its axes: none gives a curve over training tokens, one gives
    curves over the axis, two give a heat map with a slider over checkpoints. Only numbers make an axis. An axis of
    names is taken for a series: each name, in alphabetical order, has its own curve or map. What differs besides, such
    as samples, is averaged.
    """

    name: str
    """In snake_case, as rows carry it."""
    unit: str
    """nat, share, ppl, count, s, ..."""
    about: str
    """One sentence: what it is, and what its smallest and largest value mean."""
    level: Level | None = None
    """Where it belongs in the report; None: beside the training."""
    better: Literal["higher", "lower"] | None = None
    """Which way is progress; None: neither, so that it is no signal."""
    bounds: tuple[float | None, float | None] = (None, None)
    """Least and largest value there can be; None: there is no such bound."""
    axes: tuple[str, ...] = ()
    """Coordinates to show it over, at most two, across first: of Row, or of the monitor's own."""
    series: tuple[str, ...] = ()
    """Coordinates that tell series apart, such as corpus: each has a line or a heat map, and a signal, of its own."""
    judged: bool = False
    """Whether the verdict asks if it is saturated; else it is shown and correlated alone."""
    margin: float | None = None
    """Gain per +25 % tokens that is no longer worth them, in `unit`; None: 0.01 of a share or a nat, else 1."""
    benchmark: bool = False
    """The score of a task after fine-tuning: what signals are correlated with (Figure 1 of the paper)."""

    def __post_init__(self) -> None:
        for field_name, known in (("level", get_args(Level)), ("better", ("higher", "lower"))):
            if (given := getattr(self, field_name)) is not None and given not in known:
                raise ValueError(
                    f"{self.name}.{field_name}: {given!r} is none of {', '.join(known)}; leave it out for none"
                )
        if taken := [name for name in self.own if name in _TAKEN]:
            raise ValueError(
                f"{self.name}: a coordinate {taken[0]!r} would hide a column of the frames; name it otherwise"
            )
        if len(self.axes) > 2:
            raise ValueError(f"{self.name}.axes: {', '.join(self.axes)} are more than two; make one of them a series")
        if self.judged and (self.better is None or self.level is None):
            raise ValueError(f"{self.name}.judged: needs `better` and `level` as well")

    @property
    def own(self) -> tuple[str, ...]:
        """Its coordinates that Row does not have."""
        return tuple(name for name in (*self.axes, *self.series) if name not in COORDINATES)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number and where it was measured. A coordinate that does not apply is None; not measured means no row."""

    run: str
    """Name of the run."""
    config_hash: str
    """Hash of the resolved configuration."""
    step: int
    """Optimizer steps done when it was measured, over all stages."""
    tokens: int
    """Training tokens consumed when it was measured, over all stages."""
    stage: str
    """Stage the training was in."""
    monitor: str
    """Class name of the monitor."""
    metric: str
    """What was measured, in snake_case."""
    value: float
    """The number."""
    unit: str
    """Unit of the number: nat, ppl, share, count, s, ..."""
    n: int
    """How many tokens or samples the number averages over."""
    length_tok: int | None = None
    """Total tokens of the sample."""
    depth: float | None = None
    """Real position of the needle, tokens before it / haystack tokens, in [0, 1]."""
    depth_cell: float | None = None
    """Depth that was asked for; the samples of one grid cell share it."""
    before_tok: int | None = None
    """Haystack tokens before the needle."""
    after_tok: int | None = None
    """Haystack tokens after the needle."""
    layer: int | None = None
    """Transformer layer, from 0."""
    head: int | None = None
    """Query head in the layer, from 0."""
    expert: int | None = None
    """Expert of the layer's mixture, from 0."""
    ablated: str | None = None
    """Which heads' output was set to zero: none, top10, random10.0, ..."""
    from_tok: int | None = None
    """First position of a stretch of the sample."""
    to_tok: int | None = None
    """End of the stretch, not included."""
    corpus: str | None = None
    """Held-out corpus."""
    family: str | None = None
    """Family of the needle sample."""
    sample: int | None = None
    """Index of the sample in its set."""
    sample_set: str | None = None
    """Hash of the sample set: equal hashes mean the same samples, so differences are paired."""
    own: Mapping[str, str | int | float] = field(default_factory=dict)
    """Coordinates of the monitor's own, as its metric declares them: lag, temperature, task, ..."""


KEY_COLUMNS = ("run", "config_hash", "step", "tokens", "stage", "monitor", "metric")
COORDINATES = tuple(f.name for f in dataclasses.fields(Row) if f.default is None)
_TAKEN = (*KEY_COLUMNS, "value", "unit", "n", "own", "label", "low", "high", "mean", "rows")
"""Columns of frames that no coordinate of a monitor's own may be named as."""

PUBLISHED = "published"
"""Stage of rows of a published model, of whose training nothing is known; their step and tokens are 0."""
LONGEST_TOK = 1 << 24
"""Tokens of the longest sample, 16.8 million: what is longer is a slip, which would take all memory there is."""
MOST_SAMPLES = 1_000_000
"""Of a cell, of a corpus: for the same reason."""


@dataclass(frozen=True)
class Every:
    """When something is due: every so many optimizer steps, every so many training tokens, or either."""

    steps: int | None = None
    """Due every so many optimizer steps."""
    tokens: int | None = None
    """Due whenever the count of training tokens passes a multiple of this."""

    def __post_init__(self) -> None:
        given = [n for n in (self.steps, self.tokens) if n is not None]
        if not given or min(given) < 1:
            raise ValueError(f"`every` needs steps or tokens, at least 1, got steps={self.steps} tokens={self.tokens}")

    def due(self, step: int, tokens: int, tokens_before: int) -> bool:
        """True if the step that took the count from `tokens_before` to `tokens` made it due."""
        by_steps = self.steps is not None and step % self.steps == 0
        by_tokens = self.tokens is not None and tokens // self.tokens > tokens_before // self.tokens
        return by_steps or by_tokens


class Monitor(ABC):
    """Something measured in an evaluation window.

    Write a frozen dataclass with `every` and `on_error`, declare `metrics`, and write `measure`; all that it needs can
    be imported from megatron_lccp.measuring. Every rank calls `measure`, and all must make the same collectives.
    """

    metrics: ClassVar[tuple[Metric, ...]] = ()
    """What it measures. A row of a metric that is not among them is refused."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Fields by the names that they had in earlier versions -> their names now; a YAML file may still use those."""
    every: Every
    """When it is due; besides, every monitor runs at step 0 and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on without this measurement, or stop the run."""

    @abstractmethod
    def measure(self, window: Any) -> Iterable[Row]:
        """Measure the model of `window`, a measuring.EvalWindow, and yield rows made with `window.row(...)`.

        They are the same on all ranks.
        """

    def work(self, window: Any) -> Any:
        """What `measure` runs, as measuring.Work, for `lccp plan`, dry runs and `lccp measure --dry-run`.

        The window has no model then. None: it does not say.
        """
        return None

    def check(self, window: Any) -> Iterable[str]:
        """What it cannot do on this model or text, a line each, before anything runs.

        A line begins with the field, and says the remedy. The window may have no model then, but says `layers`, `heads`,
        `vocab_size` and `context_tok`. A training does not start with such a monitor.
        """
        return ()

    @property
    def name(self) -> str:
        """Of the monitor in rows, tables and W&B."""
        return type(self).__name__

    def metric(self, name: str) -> Metric:
        """The declaration of one of its metrics. Raises ValueError for a name that it does not declare."""
        for metric in (*self.metrics, WINDOW_TIME):
            if metric.name == name:
                return metric
        known = ", ".join(metric.name for metric in self.metrics) or "none"
        raise ValueError(f"{self.name}.metrics: does not declare {name!r}; there are {known}")


WINDOW_TIME = Metric(name="window_time", unit="s", about="Seconds that a monitor took in a window.")
"""Every monitor has it."""
