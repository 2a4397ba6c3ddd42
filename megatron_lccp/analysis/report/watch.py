"""A report that follows its runs: written again whenever they have recorded more.

In: run directories, also ones in which nothing was measured yet. Out: the page of `report`, which the browser reads
again by itself while it is watched; the last one, written on Ctrl-C, no longer does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_lccp.analysis.report.report import write_report
from megatron_lccp.analysis.run import run_folders
from megatron_lccp.records.store import RunStore
from megatron_lccp.text import count_text

DAY_S = 86_400.0


def watch(
    run_dirs: Sequence[str | Path], out: str | Path | None, scores: str | Path | None, margins: Mapping[str, float],
    every_s: float, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Look every `every_s` seconds and write the report if there is more, until KeyboardInterrupt.

    Raises ValueError if `every_s` is not above 0 and a day at most; a run that has not measured anything yet is waited for.
    """
    if not 0 < every_s <= DAY_S:
        raise ValueError(f"watch: --every should be above 0 seconds, and a day at most, is {every_s:g}")
    for path in map(Path, run_dirs):
        if not path.exists():
            print(f"{path} does not exist yet; waiting", file=sys.stderr, flush=True)
    seen, waiting, page = None, False, None
    try:
        while True:
            now = [_state(Path(path)) for path in run_dirs]
            if all(now) and now != seen:
                started = time.monotonic()
                page, seen = write_report(run_dirs, out, scores, every_s, margins), now
                say(f"{page}: {_newest(now)}, drawn in {time.monotonic() - started:.1f} s; Ctrl-C ends")
            elif not all(now) and not waiting:
                say(f"waiting for the first window of {', '.join(map(str, run_dirs))}; Ctrl-C ends")
                waiting = True
            sleep(every_s)
    except KeyboardInterrupt:
        if page is not None:
            say(f"{write_report(run_dirs, out, scores, None, margins)}: the last one, which stays as it is")


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of what was recorded; empty if no window is."""
    stores = [RunStore(path) for path in run_folders([folder])]
    if not any(store.windows() for store in stores):
        return ()
    files = []
    for store in stores:
        for path in (*store.windows().values(), *store.health_files().values(), store.steps_path, store.events_path):
            if path.is_file():
                files.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
    return tuple(files)


def _newest(states: Sequence[tuple[tuple[str, int, int], ...]]) -> str:
    windows = [Path(name).stem for state in states for name, _, _ in state if Path(name).stem.startswith("step-")]
    return f"{count_text(len(windows), 'window')}, the last at step {int(max(windows)[5:]):,}"
