"""The loop: stages of steps, with windows and checkpoints between them.

In: a `TrainState` (model, optimizer, data, where it stands), the monitors, and what to do with results. Out: the position
reached. The loop knows nothing of files, W&B or reports: it calls the `Sinks` it was given, on every rank alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_lccp.config.tree import Config, StageConfig, TrainingConfig
from megatron_lccp.data.loader import StageData, stage_data, text_of
from megatron_lccp.data.packed import PackedData, row_of
from megatron_lccp.data.stages import stage_steps, trained_on
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.measuring.megatron_engine import MegatronEngine
from megatron_lccp.measuring.pieces import Pieces, WindowStopped
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.model.build import set_rope
from megatron_lccp.parallel.gather import any_rank, first_text, largest
from megatron_lccp.parallel.groups import Groups, stage_seed
from megatron_lccp.parallel.zigzag import local_batch
from megatron_lccp.schema import Every, Monitor, Row
from megatron_lccp.training.health import HealthMeter
from megatron_lccp.training.launchers import Deadline, take_too_short
from megatron_lccp.training.optimizer import make_scheduler
from megatron_lccp.training.progress import Progress
from megatron_lccp.training.signals import Interrupted, StopSignals
from megatron_lccp.training.step import StepResult, prepare_schedules, train_step
from megatron_lccp.training.watch import Watch
from megatron_lccp.weights.checkpoint import Position
from megatron_lccp.weights.saving import DiskFull, Save, begin_save, drop_oldest
from megatron_lccp.weights.sharded import CheckpointError


class TrainingError(RuntimeError):
    """The training cannot go on; one line that says why."""


class Sinks(Protocol):
    """Where results go; all of them are called on every rank."""

    def on_step(self, values: Mapping[str, Any], rows: Sequence[Row]) -> None:
        """Scalars of one step, and its rows of training health if they are due; rows may be held back until `flush`."""

    def flush(self) -> None:
        """Keep what was held back: a checkpoint follows, and what is before it will not be trained again."""

    def on_window(self, rows: Sequence[Row], step: int) -> None:
        """Rows of one window."""

    def on_event(self, kind: str, text: str, step: int) -> None:
        """Something out of the ordinary."""

    def has_window(self, step: int, stage: str) -> bool:
        """True if this stage's window at this step is on record (after a resume); one rank that sees it is enough."""

    def why_end(self, tokens: int) -> str | None:
        """Why the run should end at so many tokens by a rule of the user's (`stop_when`), judged by what is on record;
        on the rank that keeps it."""

    def has_ended(self, step: int) -> bool:
        """True if it is on record that such a rule ended the run at this step, with its last window."""

    @property
    def failure(self) -> str | None:
        """Why results cannot be kept any more, on the rank that keeps them."""


@dataclass
class TrainState:
    """A model in training."""

    config: Config
    config_hash: str
    groups: Groups
    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    tokenizer: Tokenizer
    vocab_size: int
    about: Mapping[str, Any]
    """What identifies the model in a checkpoint."""
    position: Position = Position()
    taken: Mapping[str, Any] | None = None
    """What packed stages took before the stage at hand, or, after a resume, before its next step."""
    data: StageData | PackedData | None = None
    """The samples of the stage at hand."""
    saved: Position | None = None
    """What the newest checkpoint holds."""
    saving: Save | None = None
    """A checkpoint that is being written behind the training's back."""
    saves: int = 0
    """How many this start has begun."""
    cache: dict[Any, Any] = field(default_factory=dict)
    signals: StopSignals = field(default_factory=StopSignals)
    """Asked between two pieces of work; opened by `fit` unless they are open already."""
    watch: Watch = field(default_factory=lambda: Watch(TrainingConfig()))
    """Told how far the training is."""
    deadlines: list[Deadline] = field(default_factory=list)
    """Times after a signal that a save is to be done in; on the main rank, those that nothing was said of yet."""
    ended: str | None = None
    """The rule of `stop_when` that ended the run."""

    @property
    def directory(self) -> Path:
        return Path(self.config.dir)

    def text(self, source: str, at_least_tok: int) -> np.ndarray:
        """Text that training never sees, by its name."""
        return text_of(self.config, self.tokenizer, source, at_least_tok)


def fit(train_state: TrainState, monitors: Sequence[Monitor], sinks: Sinks) -> Position:
    """Train through all stages from where the train state stands. Raises TrainingError, Interrupted, CheckpointError."""
    config, stages = train_state.config, list(train_state.config.stages.items())
    prepare_schedules(train_state.chunks)
    meter = (
        HealthMeter(train_state.chunks, train_state.optimizer, train_state.groups)
        if config.training.health_every
        else None
    )
    total = _planned_tokens(config)
    progress = Progress(train_state.groups.is_main, total, train_state.position.tokens, config.training.log_every)
    with contextlib.nullcontext() if train_state.signals.open else train_state.signals:
        try:
            for number, (name, stage) in enumerate(stages):
                position = train_state.position
                over = position.stage_step >= stage_steps(stage) and not _finished(train_state)
                if number < position.stage or (number == position.stage and over):
                    continue  # the stage after it begins with the window at this step
                if number > position.stage:
                    if _finished(train_state):
                        break
                    train_state.position = dataclasses.replace(position, stage=number, stage_step=0)
                _run_stage(train_state, name, stage, monitors, meter, sinks, progress)
                train_state.taken = _taken(train_state)
            _save(train_state, sinks, progress, last=True)
            if any_rank(sinks.failure is not None, train_state.groups.device):
                raise TrainingError(sinks.failure or "results could not be kept; see the main rank")
        except TrainingError:  # of all ranks alike
            _settle(train_state, sinks, progress)
            raise
        finally:
            if train_state.saving is not None:
                train_state.saving.abort()
            progress.close()
    return train_state.position


def _taken(train_state: TrainState) -> Mapping[str, Any] | None:
    """What packed stages took before the step that comes next."""
    data = train_state.data
    return train_state.taken if data is None else data.taken(train_state.position.stage_step)


def _planned_tokens(config: Config) -> int:
    """Tokens of all steps that this run is to make."""
    total, left = 0, config.training.steps
    for stage in config.stages.values():
        steps = stage_steps(stage) if left is None else min(left, stage_steps(stage))
        total, left = total + steps * stage.global_batch_tok, None if left is None else left - steps
    return total


def _run_stage(
    train_state: TrainState, name: str, stage: StageConfig, monitors: Sequence[Monitor], meter: HealthMeter | None,
    sinks: Sinks, progress: Progress,
) -> None:  # fmt: skip
    config, steps, bad_in_a_row = train_state.config, stage_steps(stage), 0
    last = steps
    if config.training.steps is not None:
        last = min(steps, train_state.position.stage_step + config.training.steps - train_state.position.step)
    set_rope(train_state.chunks, stage)
    scheduler = make_scheduler(
        train_state.optimizer, config, stage, train_state.position.stage_step * stage.global_batch_tok
    )
    watch = train_state.watch
    watch.mark(f"the order of the samples of {name}")
    data = stage_data(config, name, train_state.directory / "cache", train_state.taken, train_state.position.stage_step)
    train_state.data = data
    if not any_rank(sinks.has_window(train_state.position.step, name), train_state.groups.device):
        before = dataclasses.replace(train_state.position, tokens=train_state.position.tokens - stage.global_batch_tok)
        _window(train_state, name, _due(train_state, monitors, before), sinks, progress)
    _ask_rules(train_state, name, monitors, sinks, progress)
    while train_state.position.stage_step < steps and not _finished(train_state):
        before, start = train_state.position, time.perf_counter()
        watch.mark(f"step {before.step + 1}")
        scheduler.step(increment=stage.global_batch_tok)
        due = meter is not None and (before.step + 1) % config.training.health_every == 0
        result = _step(train_state, stage, data, sinks, meter if due else None)
        train_state.position = position = _advance(before, stage, result)
        watch.mark(f"what step {position.step} measured")
        for text in data.news():
            _event(sinks, progress, "epoch", text, position.step)
        watch.step_took(time.perf_counter() - start)
        _tell(train_state, name, result, time.perf_counter() - start, sinks)
        note = "  SKIPPED: not finite" if result.skipped else ""
        progress.step(name, position.stage_step, last, stage.global_batch_tok, result.loss_nat, note)
        bad_in_a_row = bad_in_a_row + 1 if result.skipped else 0
        if result.skipped:
            sinks.on_event("skipped_step", f"loss {result.loss_nat}, gradient norm {result.grad_norm}", position.step)
        if bad_in_a_row >= config.training.max_bad_steps:
            raise TrainingError(
                f"step {position.step}: {bad_in_a_row} steps in a row had a non-finite loss or gradient and were "
                "skipped (training.max_bad_steps); the last checkpoint is untouched: look at lr and data"
            )
        if result.stop:
            _stop(train_state, sinks, progress)
        if train_state.saving is not None and train_state.saving.is_written():
            _settle(train_state, sinks, progress, again=True)
        if (config.checkpoint.every or Every(steps=500)).due(position.step, position.tokens, before.tokens):
            _save(train_state, sinks, progress)
        at_boundary = position.stage_step == steps and position.stage + 1 < len(config.stages)
        if not at_boundary or _finished(train_state):  # the next stage begins with a window of its own at this step
            if due_now := _due(train_state, monitors, before):
                rows = _window(train_state, name, due_now, sinks, progress)
                _ask_rules(train_state, name, monitors, sinks, progress, due_now, rows)


def _step(
    train_state: TrainState, stage: StageConfig, data: StageData | PackedData, sinks: Sinks, meter: HealthMeter | None
) -> StepResult:
    groups, position = train_state.groups, train_state.position
    # Random states are a function of seed and step, so a resume on any layout has them without saving them.
    model_parallel_cuda_manual_seed(stage_seed(train_state.config.seed + position.step, groups.pp.rank()))
    micro_batches = stage.global_batch_tok // (stage.context_tok * stage.micro_batch * groups.dp.size())
    iterators = [_micro_batches(train_state, data, micro_batches) for _ in train_state.chunks]
    asked = _asked(train_state, sinks)
    rows, row_tok = row_of(stage)
    return train_step(
        train_state.chunks, train_state.optimizer, groups, iterators, micro_batches, row_tok, rows, asked, meter,
        train_state.config.training.loss_chunk_tok,
    )  # fmt: skip


def _asked(train_state: TrainState, sinks: Sinks) -> Callable[[], bool]:
    """Whether this rank wants to stop: a signal came, or results cannot be kept."""
    return lambda: train_state.signals.asked() or sinks.failure is not None


def _tell(train_state: TrainState, stage: str, result: StepResult, seconds: float, sinks: Sinks) -> None:
    """Hand on what the step before the train state's position measured."""
    position, health = train_state.position, result.health
    values = {
        "step": position.step, "tokens": position.tokens, "stage": stage, "loss": result.loss_nat,
        "grad_norm": result.grad_norm, "lr": _rate(train_state.optimizer), "time_s": seconds,
        "tokens_per_s": train_state.config.stages[stage].global_batch_tok / seconds, "skipped": result.skipped,
        "ranks": torch.distributed.get_world_size(),
    }  # fmt: skip
    where = dict(
        run=train_state.config.name, config_hash=train_state.config_hash, step=position.step, tokens=position.tokens,
        stage=stage,
    )  # fmt: skip
    sinks.on_step(values | (health.scalars() if health else {}), health.to_rows(**where) if health else [])


def _micro_batches(train_state: TrainState, data: StageData | PackedData, count: int) -> Iterator[dict[str, Any]]:
    groups = train_state.groups
    for number in range(count):
        batch = data.batch(train_state.position.stage_step, number, groups.dp.rank(), groups.dp.size())
        yield local_batch(batch, groups.cp, groups.device)


def _advance(before: Position, stage: StageConfig, result: StepResult) -> Position:
    return dataclasses.replace(
        before,
        step=before.step + 1,
        tokens=before.tokens + stage.global_batch_tok,
        stage_step=before.stage_step + 1,
        updates=before.updates + (not result.skipped),
    )


def _finished(train_state: TrainState) -> bool:
    position, stages = train_state.position, list(train_state.config.stages.values())
    last = position.stage == len(stages) - 1 and position.stage_step >= stage_steps(stages[-1])
    cap = train_state.config.training.steps
    return last or (cap is not None and position.step >= cap) or train_state.ended is not None


def _due(train_state: TrainState, monitors: Sequence[Monitor], before: Position) -> list[Monitor]:
    """All monitors at the start of a stage and at the end of the run, else those whose turn it is after a step."""
    position = train_state.position
    if position.stage_step == 0 or _finished(train_state):
        return list(monitors)
    return [m for m in monitors if m.every.due(position.step, position.tokens, before.tokens)]


def _window(
    train_state: TrainState, stage: str, monitors: Sequence[Monitor], sinks: Sinks, progress: Progress,
    before: Sequence[Row] = (),
) -> list[Row]:  # fmt: skip
    """Measure, and hand on the rows after those that others measured at this step `before`; all of them."""
    if not monitors:
        return []
    position = train_state.position

    def say(what: str) -> None:
        train_state.watch.mark(f"the window at step {position.step}, {what}")
        progress.window(f"step {position.step}", what)

    train_state.watch.mark(f"the window at step {position.step}")
    in_fp8 = train_state.config.training.measure_in == "fp8"
    window = EvalWindow(
        engine=MegatronEngine(train_state.chunks, train_state.groups, train_state.vocab_size, in_fp8),
        run=train_state.config.name, tokenizer=train_state.tokenizer, config_hash=train_state.config_hash, stage=stage, step=position.step,
        tokens=position.tokens, text=train_state.text, corpora=trained_on(train_state.config),
        say=say, cache=train_state.cache,
        pieces=_pieces(train_state, sinks),
    )  # fmt: skip
    try:
        with window.opened():
            found = window.measure(monitors, lambda kind, text: _event(sinks, progress, kind, text, position.step))
    except WindowStopped:
        _stop(train_state, sinks, progress)
    train_state.watch.mark(f"the rows of the window at step {position.step}")
    rows = [*before, *found]
    sinks.on_window(rows, position.step)
    return rows


def _pieces(train_state: TrainState, sinks: Sinks) -> Pieces:
    """Of the windows of a run: half the time between a signal and the save is a piece's, the rest leaves room."""
    if Pieces not in train_state.cache:
        longest_s = train_state.config.training.stop_within_s / 2
        train_state.cache[Pieces] = Pieces(_asked(train_state, sinks), longest_s, train_state.groups.device)
    return train_state.cache[Pieces]


def _ask_rules(
    train_state: TrainState, stage: str, monitors: Sequence[Monitor], sinks: Sinks, progress: Progress,
    measured: Sequence[Monitor] = (), rows: Sequence[Row] = (),
) -> None:  # fmt: skip
    """End the run here if a rule of the user's says so (`stop_when`): save, and measure what is due at an end and was
    not `measured` at this step, with these `rows`."""
    position = train_state.position
    if not train_state.config.stop_when or _finished(train_state):
        return
    train_state.watch.mark(f"the verdict at step {position.step}")
    reason = first_text(sinks.why_end(position.tokens) if train_state.groups.is_main else None)
    if reason is None:
        return
    train_state.ended = reason
    _save(train_state, sinks, progress, last=True)
    if not any_rank(sinks.has_ended(position.step), train_state.groups.device):
        _window(train_state, stage, [m for m in monitors if m not in measured], sinks, progress, rows)
        _event(sinks, progress, "stop_when", reason, position.step)


def _event(sinks: Sinks, progress: Progress, kind: str, text: str, step: int) -> None:
    sinks.on_event(kind, text, step)
    progress.say(f"step {step}: {kind}: {text}")


def _save(train_state: TrainState, sinks: Sinks, progress: Progress, last: bool = False, stop: bool = False) -> None:
    """Save; in the middle of a run a full disk is reported and the training goes on, at the end it is an error.

    One that is written behind the training's back is waited for: two would fill the host memory. The `last` one is, too.
    """
    settings, position = train_state.config.checkpoint, train_state.position
    sinks.flush()
    _settle(train_state, sinks, progress)
    train_state.watch.mark(f"the save after step {position.step}")
    if position.updates == 0 or position == train_state.saved:
        return  # no update means that the optimizer has no state to save
    ends = not stop and (last or _finished(train_state))
    any_layout = ends or train_state.saves % settings.any_layout_every == 0
    train_state.saves += 1
    while True:
        start = time.perf_counter()
        try:
            save = begin_save(
                train_state.directory / "checkpoints", settings.keep, train_state.chunks, train_state.optimizer,
                train_state.groups, position, train_state.about, any_layout, settings.asynchronous and not last,
                _taken(train_state),
            )  # fmt: skip
            if save.calls is not None:
                train_state.saving = save
                return
            save.finish()
            _saved(train_state, progress, position, time.perf_counter() - start)
            return
        except CheckpointError as error:
            if not _made_room(train_state, sinks, progress, error):
                _event(sinks, progress, "checkpoint_error", str(error), position.step)
                if last:
                    raise
                return


def _saved(train_state: TrainState, progress: Progress, position: Position, seconds: float | None) -> None:
    """A checkpoint is whole; `seconds` are those that a stop would wait for such a save, if that is known."""
    train_state.saved = position
    train_state.watch.saved_step = position.step
    if seconds is not None:
        for line in take_too_short(train_state.deadlines, train_state.config.training.stop_within_s, seconds):
            progress.say(f"lccp: {line}")


def _settle(train_state: TrainState, sinks: Sinks, progress: Progress, again: bool = False) -> None:
    """Finish what is written behind the training's back, if there is something; all ranks alike.

    What could not be written is reported, and, `again`, saved where the training stands now if a full disk has room now.
    """
    if (save := train_state.saving) is None:
        return
    train_state.watch.mark(f"the save after step {save.position.step}, which is written since then")
    train_state.saving = None
    try:
        save.finish()
        _saved(train_state, progress, save.position, save.seconds)
    except CheckpointError as error:
        made_room = _made_room(train_state, sinks, progress, error)
        _event(sinks, progress, "checkpoint_error", str(error), train_state.position.step)
        if made_room and again:
            _save(train_state, sinks, progress)


def _made_room(train_state: TrainState, sinks: Sinks, progress: Progress, error: CheckpointError) -> bool:
    """True if the disk was full and the oldest checkpoint, which is not the newest, is gone."""
    directory = train_state.directory / "checkpoints"
    gone = drop_oldest(directory, train_state.groups) if isinstance(error, DiskFull) else None
    if gone is not None:
        text = f"{gone}: removed, for the disk has no room for one more checkpoint; checkpoint.keep asks to keep it"
        _event(sinks, progress, "checkpoint_dropped", text, train_state.position.step)
    return gone is not None


def _stop(train_state: TrainState, sinks: Sinks, progress: Progress) -> NoReturn:
    train_state.watch.stopping()
    _save(train_state, sinks, progress, last=True, stop=True)
    number, failed = largest(
        [float(train_state.signals.number), float(sinks.failure is not None)], train_state.groups.device
    )
    if failed:
        raise TrainingError(sinks.failure or "results could not be kept; see the main rank")
    saved = train_state.saved.step if train_state.saved else 0
    text = f"stopped after step {train_state.position.step}; the same command resumes after step {saved}"
    raise Interrupted(text, 128 + int(number))


def _rate(optimizer: MegatronOptimizer) -> float:
    return next((group["lr"] for group in optimizer.param_groups), 0.0)
