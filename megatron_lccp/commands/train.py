"""`lccp train`: a configuration from its start, or from its last checkpoint, to its report.

In: a configuration, on one rank of torchrun's job or alone. Out: the run directory, W&B, the report; an exit code.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_lccp.commands.sinks import RunSinks
from megatron_lccp.config.tree import Config
from megatron_lccp.parallel.groups import make_groups, start_ranks, stop_ranks
from megatron_lccp.training.loop import Interrupted, fit
from megatron_lccp.training.progress import tell
from megatron_lccp.training.setup import check_everything, make_train_state, resume, sole_user, with_precision
from megatron_lccp.weights.checkpoint import Position


def train(config: Config, source: str) -> int:
    """Train `config` from its start or from its last checkpoint; returns the exit code."""
    device = start_ranks()
    config = with_precision(config)
    model, tokenizer = check_everything(config, source)
    groups = make_groups(config.parallel, device, config.seed)
    with sole_user(Path(config.dir), groups.is_main):
        train_state = make_train_state(config, model, groups, tokenizer)
        sinks = RunSinks(config, groups.is_main, tell)
        resumed = resume(train_state)
        sinks.open(train_state.position.step, resumed)
        done = False
        try:
            position = fit(train_state, config.monitors, sinks)
            done = True
        except Interrupted as stop:
            if groups.is_main:
                print(f"lccp: {stop}", file=sys.stderr)
            return 1
        finally:
            sinks.close(done)
        if groups.is_main:
            _report(config, position)
    stop_ranks()
    return 0


def _report(config: Config, position: Position) -> None:
    """Write the page and say where; what it cannot show is no failure of the training."""
    from megatron_lccp.analysis.report.report import write_report  # it takes seconds, and no other rank needs it

    if any(Path(config.dir, "rows").glob("step-*.parquet")):
        try:
            page: Path | str = write_report(Path(config.dir))
        except Exception as error:
            page = f"none ({type(error).__name__}: {' '.join(str(error).split())}); try lccp report {config.dir}"
        tell(f"lccp: {position.step} steps, {position.tokens:,} tokens; report: {page}")
    else:
        tell(f"lccp: {position.step} steps, {position.tokens:,} tokens; no monitor ran, so there is no report")
