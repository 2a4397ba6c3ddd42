"""Who hears of events besides events.jsonl: a command, a webhook, a W&B alert (`events` in the configuration).

In: events of a training. Out: calls, one after another in a thread of their own, so that the training waits for none of
them; what fails or takes too long is one line on stderr. Nothing is called that the configuration does not name.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_lccp.config.tree import EventsConfig

WAITING = 100
"""Events that wait for their calls at most; what comes on top of them is left out."""


@dataclass(frozen=True)
class Event:
    """What a hook is told, as JSON."""

    kind: str
    text: str
    step: int
    """Optimizer steps done."""
    run: str
    """Name of the run."""
    run_dir: str
    """Its directory, as an absolute path."""
    time: str
    """When it happened: ISO 8601, UTC."""


class Hooks:
    """Calls for events of some kinds. `alert(title, text)` is W&B's, where there is one."""

    def __init__(
        self, settings: EventsConfig, run: str, run_dir: str | Path, alert: Callable[[str, str], None] | None = None
    ):
        self._settings, self._run, self._run_dir, self._alert = settings, run, str(Path(run_dir).resolve()), alert
        self._waiting: queue.Queue[Event | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen | None = None

    @property
    def anyone(self) -> bool:
        """Whether somebody is to hear of anything."""
        named = self._settings.command or self._settings.webhook or self._settings.wandb_alert
        return bool(named and self._settings.kinds)

    def wants(self, kind: str) -> bool:
        """Whether somebody is to hear of events of this kind."""
        return self.anyone and kind in self._settings.kinds

    def send(self, kind: str, text: str, step: int) -> None:
        """Have whoever is named hear of it, soon; returns at once, and never raises."""
        if not self.wants(kind):
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="lccp events", daemon=True)
            self._thread.start()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            self._waiting.put_nowait(Event(kind, text, step, self._run, self._run_dir, now))
        except queue.Full:
            _say(f"{WAITING} events wait for their calls already; one of kind {kind} is left out")

    def close(self) -> None:
        """Wait for the calls that are under way or waiting, no longer than one call may take."""
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(self._settings.timeout_s + 1)
        if self._thread.is_alive():
            _say("the calls that are left were not waited for")
            self._end()

    def _work(self) -> None:
        while (event := self._waiting.get()) is not None:
            calls = {
                "command": self._settings.command and self._command,
                "webhook": self._settings.webhook and self._webhook,
                "wandb_alert": self._settings.wandb_alert and self._alert and self._wandb,
            }
            for name, call in calls.items():
                if call:
                    try:
                        call(event)
                    except Exception as error:  # whatever it is, it is no reason to end a training
                        why = " ".join(str(error).split()) or type(error).__name__
                        _say(f"{name}: {why[:300]}; the event was {event.kind} at step {event.step}, training goes on")

    def _command(self, event: Event) -> None:
        command = self._settings.command
        assert command is not None
        about = {f"LCCP_EVENT_{name.upper()}": str(getattr(event, name)) for name in ("kind", "text", "step", "time")}
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], env={**os.environ, **about, "LCCP_RUN": event.run, "LCCP_RUN_DIR": event.run_dir},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,  # so that a signal to the job leaves it alone, and all of it can be ended
        )  # fmt: skip
        self._process = process
        try:
            _, said = process.communicate(json.dumps(asdict(event), ensure_ascii=False), self._settings.timeout_s)
        except subprocess.TimeoutExpired as error:
            self._end()
            process.wait()
            raise ValueError(f"took longer than events.timeout_s ({self._settings.timeout_s:g} s), ended") from error
        if process.returncode:
            last = said.strip().splitlines()[-1:]
            raise ValueError(f"exit code {process.returncode}{': ' if last else ''}{''.join(last)}")

    def _end(self) -> None:
        """End the command that runs, and what it has started."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _webhook(self, event: Event) -> None:
        assert self._settings.webhook is not None
        data = json.dumps(asdict(event), ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "megatron_lccp"}
        request = urllib.request.Request(self._settings.webhook, data, headers, method="POST")
        with urllib.request.urlopen(request, timeout=self._settings.timeout_s) as answer:
            answer.read(1)

    def _wandb(self, event: Event) -> None:
        assert self._alert is not None
        self._alert(f"{event.run}: {event.kind}", f"step {event.step}: {event.text}")


def _say(text: str) -> None:
    print(f"lccp: events: {text}", file=sys.stderr, flush=True)
