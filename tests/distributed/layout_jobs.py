"""What ranks do for tools/random_layouts.py; like jobs.py, a function runs on every rank and returns plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed.jobs import Silent, rows_of, save_base, train_state_for


def trained(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train as the command does, save included, without windows; then measure once.

    Losses and gradient norms by step, rows of training health and of the monitors, and what events said.
    """
    from megatron_lccp.training.loop import fit

    train_state, sinks = train_state_for(path, overrides), Silent()
    fit(train_state, (), sinks)
    return {
        "losses": [step["loss"] for step in sinks.steps], "grad_norms": [step["grad_norm"] for step in sinks.steps],
        "health": [dataclasses.asdict(row) for row in sinks.health], "rows": rows_of(train_state),
        "events": sinks.events,
    }  # fmt: skip


def reference(path: Path, model: Sequence[str], base: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One rank: draw weights and write them to `base`, for all layouts to start from, then `trained`."""
    save_base(path, model, base)
    return trained(path, overrides)
