"""Where a training's results go: the run directory and W&B (training.loop.Sinks).

In: steps, windows and events of a training, on every rank. Out: files and W&B, from the main rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_lccp.config.load import as_tree, changed_fields, dump_config
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

    def open(self, step: int, resumed: bool) -> None:
        """Start a record, or go on with it after `step`."""
        if not self._is_main:
            return
        if not resumed and (aside := self._store.set_aside()):
            self._say(f"lccp: {self._config.dir}: has no checkpoint to go on from; what it held is now in {aside}")
        changed = changed_fields(self._store.config_path, self._config) if resumed else []
        self._store.write_config(dump_config(self._config))
        self._store.write_metrics(self._config.monitors)
        recorded = self._store.last_steps()
        self._store.rewind(step if resumed else -1)
        if resumed:
            text = f"resumed after step {step}" + (f", with other values of {', '.join(changed)}" if changed else "")
            self._store.append_event("resume", text, step=step)
            self._say(f"lccp: {self._config.dir}: {text}")
        w = self._config.wandb
        if w.mode != "disabled":
            from megatron_lccp.commands.wandb_sink import WandbSink

            self._wandb = WandbSink(
                w.mode, w.project, w.entity, self._config.name, self._config.dir, as_tree(self._config), recorded
            )

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

    def on_event(self, kind: str, text: str, step: int) -> None:
        self._keep(lambda: self._store.append_event(kind, text, step=step))

    def has_window(self, step: int, stage: str) -> bool:
        """True if the window at this step of this stage is on record."""
        rows = self._store.read_rows(first=step, last=step, health=False)
        return bool((rows["stage"] == stage).any())

    def close(self, done: bool = False) -> None:
        self.flush()
        if self._wandb:
            self._wandb.close(done)

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
