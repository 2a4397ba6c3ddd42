"""The nouns every layer shares: Row (one number and where it was measured), Every (when), Monitor (who measures).

In: nothing. Out: plain Python types, free of torch, so that the analysis can read what training wrote.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal


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


KEY_COLUMNS = ("run", "config_hash", "step", "tokens", "stage", "monitor", "metric")
COORDINATES = tuple(f.name for f in dataclasses.fields(Row) if f.default is None)


@dataclass(frozen=True)
class Every:
    """When something is due: every so many optimizer steps, every so many training tokens, or either."""

    steps: int | None = None
    """Due after every this many optimizer steps."""
    tokens: int | None = None
    """Due whenever the token count passes a multiple of this."""

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

    Write a frozen dataclass with the two fields below and `measure`; its docstring lists each metric with unit,
    range and what the ends mean. Every rank calls `measure`, and all of them must make the same collectives.
    """

    every: Every
    """When it is due; besides, every monitor runs at step 0 and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on without this measurement, or stop the run."""

    @abstractmethod
    def measure(self, window: Any) -> Iterable[Row]:
        """Measure the model of `window`, a training.window.EvalWindow, and yield rows made with `window.row(...)`.

        They are the same on all ranks.
        """

    @property
    def name(self) -> str:
        return type(self).__name__
