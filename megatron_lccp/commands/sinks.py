"""Where a training's results go: the run directory, W&B, and who is to hear of events (training.loop.Sinks).

In: steps, windows and events of a training, on every rank. Out: files, W&B and the user's hooks, from the main rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_lccp.commands.hooks import Hooks
from megatron_lccp.commands.rules import VerdictWatch, why_end
from megatron_lccp.config.load import as_tree, changed_fields, changes_text, dump_config
from megatron_lccp.config.tree import Config
from megatron_lccp.files import error_text
from megatron_lccp.schema import Row

if TYPE_CHECKING:
    from megatron_lccp.commands.wandb_sink import WandbSink


class RunSinks:
    """Where a training's results go: the run directory and W&B, both on the main rank (training.loop.Sinks).

    A directory that is gone or cannot be written does not raise in the middle of a step, where other ranks wait: it is
    kept in `failure`, on which the loop stops all ranks.
    """

    ROWS_HELD = 20_000
    """Rows of training health kept in memory at most; windows and checkpoints write them out too."""

    def __init__(self, config: Config, is_main: bool, say: Callable[[str], None] = print):
        from megatron_lccp.records.store import RunStore

        self._config, self._is_main, self._say = config, is_main, say
        self._store = RunStore(config.dir)
        self._wandb: WandbSink | None = None
        self._health: list[Row] = []
        self.failure: str | None = None
        self._hooks = Hooks(config.events, config.name, config.dir, self._alert)
        self._events = threading.Lock()  # they come from threads too
        self._verdicts: VerdictWatch | None = None
        self._said: set[str] = set()
        self._opened, self._step = False, 0
        """Of the last window."""

    def open(self, step: int, resumed: bool) -> None:
        """Start a record, or go on with it after `step`."""
        if not self._is_main:
            return
        if not resumed and (aside := self._store.set_aside()):
            self._say(f"lccp: {self._config.dir}: has no checkpoint to go on from; what it held is now in {aside}")
        changed = changed_fields(self._store.config_path, self._config) if resumed else []
        self._store.write_config(dump_config(self._config))
        self._store.write_metrics(self._config.monitors)
        self._store.rewind(step if resumed else -1)
        if resumed:
            text = f"resumed after step {step}" + (f"; changed since: {changes_text(changed)}" if changed else "")
            self._say(f"lccp: {self._config.dir}: {text}")
        w = self._config.wandb
        if w.mode != "disabled":
            from megatron_lccp.commands.wandb_sink import WandbSink

            self._wandb = WandbSink(
                w.mode, w.project, w.entity, self._config.name, self._config.dir, as_tree(self._config)
            )
        self._opened = True
        if resumed:
            self.on_event("resume", text, step)
        if self._hooks.wants("verdict"):
            self._verdicts = VerdictWatch(self._config.dir, self._last_verdict(), self._verdict_changed)

    def on_step(self, values: Mapping[str, Any], rows: Sequence[Row]) -> None:
        self._keep(lambda: self._store.append_step(values))
        if self._wandb:
            self._wandb.log_step(values)
        if self._is_main:
            self._health += rows
        if len(self._health) > self.ROWS_HELD:
            self.flush()

    def flush(self) -> None:
        """Write the rows of training health held back since the last time, as one file."""
        rows, self._health = self._health, []
        self._keep(lambda: self._store.write_health(rows) if rows else None)

    def on_window(self, rows: Sequence[Row], step: int) -> None:
        self.flush()
        self._keep(lambda: self._store.write_window(rows, step))
        if self._wandb:
            self._wandb.log_window(rows, step)
        self._step = step
        if self._verdicts:
            self._verdicts.look()

    def on_event(self, kind: str, text: str, step: int) -> None:
        if self._is_main:
            self._hooks.send(kind, text, step)
        self._record_event(kind, text, step)

    def _record_event(self, kind: str, text: str, step: int) -> None:
        with self._events:
            self._keep(lambda: self._store.append_event(kind, text, step=step))

    def alarm(self, kind: str, text: str, step: int) -> None:
        """An event that comes from a thread, while the main thread may wait for a disk: it waits for none itself, and
        may come from another rank than the main one, which then does not answer."""
        self._hooks.send(kind, text, step)
        if self._is_main and self._opened:
            threading.Thread(target=self._record_event, args=(kind, text, step), daemon=True).start()

    def why_end(self, tokens: int) -> str | None:
        """The rule of `stop_when` that holds, by the verdict of the rows so far."""
        try:
            return why_end(self._config.dir, self._config.stop_when, tokens, self._say_once)
        except Exception as error:  # of the analysis: it is no reason to end a training
            self._say_once(f"no verdict could be taken ({type(error).__name__}: {' '.join(str(error).split())})")
            return None

    def has_ended(self, step: int) -> bool:
        events = self._store.read_events()
        return bool(((events["kind"] == "stop_when") & (events["step"] == step)).any())

    def has_window(self, step: int, stage: str) -> bool:
        """True if the window at this step of this stage is on record."""
        rows = self._store.read_rows(first=step, last=step, health=False)
        return bool((rows["stage"] == stage).any())

    def close(self, done: bool = False) -> None:
        self.flush()
        if self._verdicts:
            self._verdicts.close(self._config.events.timeout_s if done else 0.0)
        self._hooks.close()
        if self._wandb:
            self._wandb.close(done)

    def _alert(self, title: str, text: str) -> None:
        if self._wandb:
            self._wandb.alert(title, text)

    def _verdict_changed(self, text: str) -> None:
        self.on_event("verdict", text, self._step)

    def _last_verdict(self) -> str | None:
        """What the last event of that kind begins with."""
        events = self._store.read_events()
        texts = events.loc[events["kind"] == "verdict", "text"]
        return str(texts.iloc[-1]).partition(",")[0] if len(texts) else None

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(f"lccp: {text}")

    def _keep(self, write) -> None:
        if self._is_main and self.failure is None:
            if not self._store.config_path.is_file():  # to write would make it anew, as if all were well
                where = self._config.dir
                self.failure = f"{where}: was removed or moved while it was written to; what it held is not here"
                return
            try:
                write()
            except OSError as error:
                self.failure = error_text(error)
