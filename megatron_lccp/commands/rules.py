"""Rules that end a run (`stop_when`), and the verdict of a run that goes on.

In: a run directory, and rules of the user's. Out: why the run should end, in words; or that the verdict has changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_lccp.config.tree import StopRule

VERDICT_S = 900.0
"""Seconds that a verdict for an event may take."""


def why_end(run_dir: str | Path, rules: Sequence[StopRule], tokens: int, say: Callable[[str], None]) -> str | None:
    """The first rule that holds for what is on record at so many training tokens; None if none does.

    A rule that names no signal of the run does not hold; `say` is told the line.
    """
    due = [(number, rule) for number, rule in enumerate(rules) if tokens >= rule.at_least_tokens]
    if not due:
        return None
    from megatron_lccp.analysis.run import load_run  # they take a second, and no other rank needs them
    from megatron_lccp.analysis.verdict.judge import judge

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = load_run(run_dir)
    except ValueError:  # nothing was measured yet
        return None
    for number, rule in due:
        where = f"stop_when.{number}"
        try:
            verdict = judge(run, rule.margins)
        except ValueError as error:  # a margin of a signal that is not there
            say(f"{where}.margins: {error}; the rule does not hold")
            continue
        states = {signal.signal: str(signal.state) for signal in verdict.signals}
        held = [_held(name, wanted, states, str(verdict.state)) for name, wanted in rule.states.items()]
        for name, found in zip(rule.states, held):
            if found is None:
                say(
                    f"{where}.states: {name!r} is no signal of this run ({', '.join(states) or 'none'}); it does not hold"
                )
        if all(held):
            wanted = ", ".join(f"{name} is {state}" for name, state in rule.states.items())
            after = f", after at least {rule.at_least_tokens:,} tokens" if rule.at_least_tokens else ""
            return f"{where} holds at {tokens:,} tokens: {wanted}{after}"
    return None


def _held(name: str, wanted: str, states: dict[str, str], whole: str) -> bool | None:
    """Whether all signals of a name are in the wanted state; None if there is no such signal."""
    if name == "verdict":
        return whole == wanted
    found = [state for signal, state in states.items() if name in (signal, signal.partition("[")[0])]
    return all(state == wanted for state in found) if found else None


class VerdictWatch:
    """Says when the verdict has changed. It is taken in another process, so that the training does not wait for it."""

    def __init__(self, run_dir: str | Path, before: str | None, on_change: Callable[[str], None]):
        """`before`: the last one that was said; `on_change(text)` is called from a thread."""
        self._run_dir, self._before, self._on_change = str(run_dir), before or "undecided", on_change
        self._thread: threading.Thread | None = None
        self._due = threading.Event()

    def look(self) -> None:
        """Take it again, after the one that is under way."""
        self._due.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._look, name="lccp verdict", daemon=True)
            self._thread.start()

    def close(self, wait_s: float) -> None:
        """Wait for the one under way, no longer than this."""
        if self._thread is not None:
            self._thread.join(wait_s)

    def _look(self) -> None:
        while self._due.is_set():
            self._due.clear()
            with contextlib.suppress(OSError, ValueError, KeyError, subprocess.SubprocessError):
                found = self._verdict()
                state = "deceptive" if found["deceptive"] and found["state"] != "worse" else str(found["state"])
                if state != self._before:
                    text = f"{state}, was {self._before}: {found.get('sentence', '')}"
                    self._before = state
                    self._on_change(text)

    def _verdict(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "megatron_lccp.cli", "verdict", self._run_dir, "--json"]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=VERDICT_S,
            start_new_session=True,  # a signal to the job is not for it
        )  # fmt: skip
        return json.loads(done.stdout)
