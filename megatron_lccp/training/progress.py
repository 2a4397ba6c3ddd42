"""The progress line: step, loss, tokens/s, time left, which window is being measured.

In: what the loop tells. Out: a live bar on a terminal, elsewhere one line every few steps, and in a window one a monitor
and every QUIET_S seconds; nothing on other ranks.
"""

from __future__ import annotations

import os
import sys
import time

from tqdm import tqdm


def on_terminal() -> bool:
    """Whether a bar can be drawn: stderr is a terminal that has columns (a container's or a serial one may have 0)."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def tell(text: str) -> None:
    """A line on stdout, dropped once its reader has left (`| head`), and from then on what goes to stderr with it
    (`2>&1`): what a run finds is in its files."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stderr, sys.stdout):
            if os.path.sameopenfile(stream.fileno(), sys.stdout.fileno()):
                os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


QUIET_S = 10.0
"""Seconds without a line while a monitor measures and there is no terminal."""


class Progress:
    """Progress over the tokens of a run, or over something else that has a unit."""

    def __init__(self, shown: bool, total_tokens: int, done_tokens: int, log_every: int, unit: str = "tok"):
        self._log_every = log_every
        self._live = on_terminal()
        self._said: tuple[str, str] | None = None
        self._said_at_s = 0.0
        self._bar = tqdm(
            total=total_tokens, initial=done_tokens, unit=unit, unit_scale=unit == "tok", disable=not shown,
            dynamic_ncols=True, smoothing=0.05, file=sys.stderr if self._live else _Nowhere(), mininterval=0.2,
        )  # fmt: skip

    def step(self, stage: str, step: int, steps: int, tokens: int, loss_nat: float, note: str = "") -> None:
        """One step more is done."""
        self._bar.set_description(f"{stage} step {step}/{steps}", refresh=False)
        self._bar.set_postfix_str(f"loss {loss_nat:.3f}{note}", refresh=False)
        self._bar.update(tokens)
        if not self._live and not self._bar.disable and (step % self._log_every == 0 or step == steps):
            d = self._bar.format_dict
            rate = d["rate"] or (d["n"] - d["initial"]) / max(d["elapsed"], 1e-9)
            left = tqdm.format_interval((d["total"] - d["n"]) / rate) if rate else "?"
            tell(f"{stage} step {step}/{steps}  loss {loss_nat:.3f}  {rate:,.0f} tok/s  {left} left{note}")

    def more(self, count: int = 1) -> None:
        """So much more is done."""
        self._bar.update(count)

    def window(self, where: str, what: str) -> None:
        """The window at `where`, a step or a model, is measuring `what`, which begins with the monitor's name."""
        self._bar.set_postfix_str(f"measuring {what}", refresh=True)
        if self._live or self._bar.disable:
            return
        name, now_s = what.split()[0], time.monotonic()
        if self._said != (where, name) or now_s - self._said_at_s >= QUIET_S:
            tell(f"{where}: measuring {what}")
            self._said, self._said_at_s = (where, name), now_s

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar.disable:
            return
        if self._live:
            tqdm.write(text, file=sys.stderr)
        else:
            tell(text)

    def close(self) -> None:
        self._bar.close()


class _Nowhere:
    """Where the bar goes without a terminal: its arithmetic is wanted, its drawing is not."""

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass
