"""`lccp train`: a configuration from its start, or from its last checkpoint, to its report.

In: a configuration, on one rank of torchrun's job or alone. Out: the run directory, W&B, the report; an exit code.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_lccp.commands.sinks import RunSinks
from megatron_lccp.config.tree import Config
from megatron_lccp.parallel.gather import largest
from megatron_lccp.parallel.groups import Groups, make_groups, start_ranks, stop_ranks
from megatron_lccp.parallel.lost import lost_ranks
from megatron_lccp.training.launchers import deadlines, take_too_short
from megatron_lccp.training.loop import TrainState, fit
from megatron_lccp.training.progress import tell
from megatron_lccp.training.setup import (
    check_everything,
    check_start,
    make_train_state,
    resume,
    sole_user,
    with_precision,
)
from megatron_lccp.training.signals import Interrupted, StopSignals
from megatron_lccp.training.watch import Watch


def train(config: Config, source: str) -> int:
    """Train `config` from its start or from its last checkpoint; returns the exit code."""
    device = start_ranks()
    config = with_precision(config)
    with StopSignals() as signals:
        try:
            model, tokenizer = check_everything(config, source)
            check_start(config, source, model, tokenizer)
            groups = make_groups(config.parallel, device, config.seed)
            _leave_if_asked(signals, groups)
            with sole_user(Path(config.dir), groups.is_main):
                sinks = RunSinks(config, groups.is_main, tell)
                train_state = None

                def alarm(kind: str, text: str) -> None:
                    print(f"lccp: {kind}: {text}", file=sys.stderr, flush=True)
                    sinks.alarm(kind, text, train_state.position.step if train_state else 0)

                with Watch(config.training, signals, alarm) as watch:
                    watch.mark("the model")
                    train_state = make_train_state(config, model, groups, tokenizer)
                    train_state.signals, train_state.watch = signals, watch
                    _run(train_state, sinks)
        except Interrupted as stop:
            if groups.is_main:
                print(f"lccp: {stop}", file=sys.stderr, flush=True)
            return stop.exit_code
        except RuntimeError as error:
            if signals.asked() and lost_ranks(error):  # they had the same signal
                return 128 + signals.number
            raise
    stop_ranks()
    return 0


def _run(train_state: TrainState, sinks: RunSinks) -> None:
    """Go on from the last checkpoint to the end and the report. Raises Interrupted, and what `fit` raises."""
    config, groups, watch = train_state.config, train_state.groups, train_state.watch
    watch.mark("the checkpoint to go on from")
    aside = resume(train_state)
    watch.saved_step = train_state.position.step
    _leave_if_asked(train_state.signals, groups)
    watch.mark("the record of the run")
    sinks.open(train_state.position.step, resumed=aside is not None)
    for text in aside or ():
        sinks.on_event("checkpoint_set_aside", text, train_state.position.step)
        if groups.is_main:
            tell(f"lccp: {text}")
    if groups.is_main:
        train_state.deadlines = deadlines()
        for line in take_too_short(train_state.deadlines, config.training.stop_within_s):
            print(f"lccp: {line}", file=sys.stderr, flush=True)
    done = False
    try:
        fit(train_state, config.monitors, sinks)
        done = True
    except Interrupted:
        raise
    except (RuntimeError, ValueError) as error:
        if not lost_ranks(error):
            sinks.on_event("failed", " ".join(str(error).split()), train_state.position.step)
        raise
    finally:
        watch.mark("W&B and the last events")
        sinks.close(done)
    if groups.is_main:
        watch.mark("the report")
        _report(train_state)


def _leave_if_asked(signals: StopSignals, groups: Groups) -> None:
    """Between two parts of the start. Raises Interrupted on all ranks if a signal came to one."""
    (number,) = largest([float(signals.number)], groups.device)
    if number:
        raise Interrupted("stopped before the training began", 128 + int(number))


def _report(train_state: TrainState) -> None:
    """Write the page and say where; what it cannot show is no failure of the training."""
    from megatron_lccp.analysis.report.report import write_report  # it takes seconds, and no other rank needs it

    config, position = train_state.config, train_state.position
    ended = f"; ended by {train_state.ended}" if train_state.ended else ""
    if any(Path(config.dir, "rows").glob("step-*.parquet")):
        try:
            page: Path | str = write_report(Path(config.dir))
        except Exception as error:
            page = f"none ({type(error).__name__}: {' '.join(str(error).split())}); try lccp report {config.dir}"
        tell(f"lccp: {position.step} steps, {position.tokens:,} tokens{ended}; report: {page}")
    else:
        tell(f"lccp: {position.step} steps, {position.tokens:,} tokens; no monitor ran, so there is no report")
