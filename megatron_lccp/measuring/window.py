"""The evaluation window: the one place where a model in training is measured.

In: an engine, which answers prefills: Megatron-Core's chunks in whatever state the training left them, or a model of
transformers. Out: rows; and the training goes on as if nothing happened: a step after a window is bitwise the step that
would have been without it. Every rank enters it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.measuring.engine import Engine
from megatron_lccp.measuring.pace import Pace
from megatron_lccp.measuring.pieces import Pieces
from megatron_lccp.parallel.gather import first_text
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.schema import COORDINATES, Monitor, Row


class MonitorError(RuntimeError):
    """A monitor with `on_error: stop` failed."""


class Journal(Protocol):
    """Keeps results by sample number, under a key, as they come; every rank calls it alike."""

    def read(self, key: str) -> dict[int, Any]:
        """What was kept under this key."""

    def write(self, key: str, found: dict[int, Any]) -> None:
        """Keep more."""

    def batches(self, trees: Sequence[Any], prefills: int) -> Iterable[Sequence[Any]]:
        """The work cut into what is lost at most; `prefills` keep the ranks busy."""

    def discard(self) -> None:
        """Forget everything: the rows are written."""


class NoJournal:
    """Nothing is kept, and all work is done at once."""

    def read(self, key: str) -> dict[int, Any]:
        return {}

    def write(self, key: str, found: dict[int, Any]) -> None:
        pass

    def batches(self, trees: Sequence[Any], prefills: int) -> Iterable[Sequence[Any]]:
        return [trees] if trees else []

    def discard(self) -> None:
        pass


@dataclass(frozen=True)
class EvalWindow:
    """What a monitor may use. Open it with `opened()`; the fields below do not change while it is open."""

    engine: Engine
    """The model, and how it is run. A monitor asks by `run_trees`, `run_samples` and `without_heads`."""
    run: str
    """Name of the run."""
    tokenizer: Tokenizer
    """The tokenizer of data and needles."""
    config_hash: str
    """Hash of the configuration."""
    stage: str
    """Stage of the training."""
    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens consumed."""
    text: Callable[[str, int], np.ndarray]
    """Held-out tokens of a source by its name, the documents joined: [tokens]; so many of them, if it has them."""
    corpora: tuple[str, ...] = ()
    """Names of the sources that are measured unless a monitor names others."""
    say: Callable[[str], None] = lambda text: None
    """Shows what is being measured on the progress line."""
    pace: Pace = field(default_factory=Pace)
    """How far the monitors are, for that line."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Kept over the windows of a run: samples that a monitor made once."""
    journal: Journal = NoJournal()
    """Keeps results of a measurement that may be cut off."""
    pieces: Pieces | None = None
    """Where a signal may end the window; None: nowhere. `run_trees` sees to it; a monitor that works long without it
    calls `rest`."""
    sketch: bool = False
    """Plans alone: one sample of each cell will do, for the others take as much."""
    missing: list[str] = field(default_factory=list)
    """What `cannot` was told since the running monitor began."""
    cautions: list[str] = field(default_factory=list)
    """What `caution` was told since then."""

    @property
    def groups(self) -> Groups:
        """Process groups; collectives belong to the groups named here."""
        return self.engine.groups

    @property
    def chunks(self) -> Sequence[torch.nn.Module]:
        """This rank's chunks of a Megatron-Core model, wrapped or bare. Raises ValueError if it is none."""
        if not hasattr(self.engine, "chunks"):
            raise ValueError("chunks: this model is none of Megatron-Core's; ask it by run_trees or run_samples")
        return self.engine.chunks

    @property
    def layers(self) -> int:
        """Transformer layers of the whole model."""
        return self.engine.sizes.layers

    @property
    def heads(self) -> int:
        """Query heads of a layer over all tensor-parallel ranks."""
        return self.engine.sizes.heads

    @property
    def context_tok(self) -> int:
        """Tokens of the longest sequence that the model was built for."""
        return self.engine.sizes.context_tok

    @property
    def vocab_size(self) -> int:
        """Tokens that the model can predict, without padding."""
        return self.engine.sizes.vocab_size

    def without_heads(self, heads: Iterable[tuple[int, int]]) -> contextlib.AbstractContextManager[None]:
        """While open, the output of these heads (layer, head), counted over the whole model, is zero in every forward.

        Raises ValueError for a model whose heads cannot be reached.
        """
        return self.engine.without_heads(heads)

    def row(self, monitor: Monitor, metric: str, value: float, n: int, **where: Any) -> Row:
        """A row of this window: a metric that the monitor declares, over `n` tokens or samples.

        `where` holds coordinates of schema.Row, and those of its own that the metric declares as axes or series.
        Raises ValueError for a metric or a coordinate that is not declared.
        """
        declared = monitor.metric(metric)
        own = {name: where.pop(name) for name in declared.own if name in where}
        if strange := [name for name in where if name not in COORDINATES]:
            raise ValueError(
                f"{monitor.name}.{metric}: has a coordinate {strange[0]!r} that it does not declare; name it in axes "
                "or series"
            )
        return Row(
            run=self.run, config_hash=self.config_hash, step=self.step, tokens=self.tokens, stage=self.stage,
            monitor=monitor.name, metric=metric, value=float(value), unit=declared.unit, n=int(n), **where, own=own,
        )  # fmt: skip

    def cannot(self, monitor: Monitor, metric: str, why: str) -> None:
        """Say that a metric that was asked for has no row in this window, and why; on every rank alike. It is recorded
        as an event, and stands in the report and beside the verdict."""
        self.missing.append(f"{monitor.name}.{metric}: {why}")

    def caution(self, monitor: Monitor, why: str) -> None:
        """Say that what this monitor measures is not all that its fields claim, and why; on every rank alike.

        It is recorded as an event once a run, and stands in the report.
        """
        self.cautions.append(f"{monitor.name}: {why}")

    def rest(self) -> None:
        """Between two pieces of a monitor's work: the place where a signal may end the window. Every rank calls it."""
        if self.pieces is not None:
            self.pieces.rest()

    @contextlib.contextmanager
    def opened(self) -> Iterator[EvalWindow]:
        """Evaluation mode, no gradients, gathered parameters; all of it as before on leaving."""
        with self.engine.opened():
            yield self

    def measure(self, monitors: Sequence[Monitor], on_event: Callable[[str, str], None]) -> list[Row]:
        """Run the monitors one after another; rows are the same on all ranks.

        A monitor that raises on all ranks alike gives no rows at all: `on_event(kind, text)` records it, and the next
        one runs, unless the monitor says `on_error: stop` (MonitorError). One that raises on some ranks while others
        are in a collective (out of memory, say) cannot be taken back: its trace is printed, and the job ends when the
        collective times out. Raises WindowStopped if a signal ends the window; then nothing of it is kept.
        """
        rows: list[Row] = []
        self.pace.plan([self._tokens_of(monitor) for monitor in monitors])
        for monitor in monitors:
            self.rest()
            self.pace.next()
            self.say(monitor.name)
            self.missing.clear()
            self.cautions.clear()
            start, measured, problem = time.perf_counter(), [], None
            try:
                if problems := list(monitor.check(self)):
                    raise ValueError("; ".join(problems))
                measured = list(monitor.measure(self))
            except Exception as error:
                traceback.print_exc()  # at once: if only this rank failed, the others wait for it in a collective
                problem = f"{monitor.name}: {type(error).__name__}: {error}"
            if problem := first_text(problem):
                on_event("monitor_error", problem)
                if monitor.on_error == "stop":
                    raise MonitorError(problem)
                continue
            seconds = time.perf_counter() - start
            for text in dict.fromkeys(self.missing):
                on_event("no_rows", text)
            for text in dict.fromkeys(self.cautions):
                if not self.cache.setdefault(("said", text), False):
                    on_event("sample", text)
                    self.cache["said", text] = True
            rows += [*measured, self.row(monitor, "window_time", seconds, 1)]
        return rows

    def _tokens_of(self, monitor: Monitor) -> int:
        """About how many tokens a monitor will run, by one sample of each cell; 0 if it does not say."""
        key = "tokens of", id(monitor)  # it need not be hashable
        if key not in self.cache:
            try:
                work = monitor.work(dataclasses.replace(self, sketch=True))
                trees = work.planned if self.engine.why_not_shared() is None else work.alone
                self.cache[key] = work.times * sum(len(prefill) for tree in trees for prefill in tree)
            except Exception:  # what is wrong with it is an event of its own measurement
                self.cache[key] = 0
        return self.cache[key]
