"""The evaluation window: the one place where a model in training is measured.

In: model chunks in whatever state the training left them. Out: rows; and the training goes on as if nothing happened:
a step after a window is bitwise the step that would have been without it. Every rank enters it.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.measuring.fp8 import precision
from megatron_lccp.measuring.pieces import Pieces
from megatron_lccp.model.build import bare
from megatron_lccp.parallel.gather import first_text
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.schema import COORDINATES, Monitor, Row


class MonitorError(RuntimeError):
    """A monitor with `on_error: stop` failed."""


class Sizes(NamedTuple):
    """What is known of a model before there is one."""

    layers: int
    heads: int
    """Query heads of a layer."""
    context_tok: int
    """Tokens of its longest sequence."""


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

    chunks: Sequence[MegatronModule]
    """This rank's model chunks, wrapped or bare."""
    groups: Groups
    """Process groups; collectives belong to the groups named here."""
    run: str
    """Name of the run."""
    tokenizer: Tokenizer
    """The tokenizer of data and needles."""
    vocab_size: int
    """Tokens that exist, without padding."""
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
    cache: dict[Any, Any] = field(default_factory=dict)
    """Kept over the windows of a run: samples that a monitor made once."""
    journal: Journal = NoJournal()
    """Keeps results of a measurement that may be cut off."""
    pieces: Pieces | None = None
    """Where a signal may end the window; None: nowhere. `run_trees` sees to it; a monitor that works long without it
    calls `rest`."""
    fp8: bool = False
    """Measure a model that trains in FP8 in FP8 too; else in BF16, where a token depends on what it sees alone."""
    sizes: Sizes | None = None
    """Where there is no model to ask."""
    sketch: bool = False
    """Plans alone: one sample of each cell will do, for the others take as much."""
    missing: list[str] = field(default_factory=list)
    """What `cannot` was told since the running monitor began."""
    cautions: list[str] = field(default_factory=list)
    """What `caution` was told since then."""

    @property
    def layers(self) -> int:
        """Transformer layers of the whole model."""
        return self.sizes.layers if self.sizes else self.chunks[0].config.num_layers

    @property
    def heads(self) -> int:
        """Query heads of a layer over all tensor-parallel ranks."""
        return self.sizes.heads if self.sizes else self.chunks[0].config.num_attention_heads

    @property
    def context_tok(self) -> int:
        """Tokens of the longest sequence that the model was built for."""
        return self.sizes.context_tok if self.sizes else bare(self.chunks[0]).max_sequence_length

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
        text = f"{monitor.name}: {why}"
        if ("caution", text) not in self.cache:
            self.cache["caution", text] = True
            self.cautions.append(text)

    def rest(self) -> None:
        """Between two pieces of a monitor's work: the place where a signal may end the window. Every rank calls it."""
        if self.pieces is not None:
            self.pieces.rest()

    @contextlib.contextmanager
    def opened(self) -> Iterator[EvalWindow]:
        """Evaluation mode, no gradients, gathered parameters; all of it as before on leaving."""
        modules = [module for chunk in self.chunks for module in chunk.modules()]
        was_training = [module.training for module in modules]
        hooked = [
            c for c in self.chunks if isinstance(c, DistributedDataParallel) and c.remove_forward_pre_hook_handles
        ]
        random_states = _random_states(self.groups.device)
        try:
            for chunk in hooked:  # parameters are gathered now, not by a hook in the middle of a measurement
                chunk.disable_forward_pre_hook()
            for module in modules:
                module.training = False
            with torch.no_grad(), precision(modules, self.fp8):
                yield self
        finally:
            for module, training in zip(modules, was_training):
                module.training = training
            for chunk in hooked:
                chunk.enable_forward_pre_hook()
            _restore(random_states, self.groups.device)

    def measure(self, monitors: Sequence[Monitor], on_event: Callable[[str, str], None]) -> list[Row]:
        """Run the monitors one after another; rows are the same on all ranks.

        A monitor that raises on all ranks alike gives no rows at all: `on_event(kind, text)` records it, and the next
        one runs, unless the monitor says `on_error: stop` (MonitorError). One that raises on some ranks while others
        are in a collective (out of memory, say) cannot be taken back: its trace is printed, and the job ends when the
        collective times out. Raises WindowStopped if a signal ends the window; then nothing of it is kept.
        """
        rows: list[Row] = []
        for monitor in monitors:
            self.rest()
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
            for kind, texts in (("no_rows", self.missing), ("sample", self.cautions)):
                for text in dict.fromkeys(texts):
                    on_event(kind, text)
            rows += [*measured, self.row(monitor, "window_time", seconds, 1)]
        return rows


def _random_states(device: torch.device) -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "tracker": dict(get_cuda_rng_tracker().get_states())}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
