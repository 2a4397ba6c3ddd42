"""The record of a run inside W&B's own files of it, so that a report can be made from those alone.

In: a run directory and W&B's folder of a start; later, what was copied of W&B's folders. Out: `files/record` in that
folder, which is a run directory itself: hard links while both are on one file system, so that it takes no room and has
each step at once; copies elsewhere, as new as the last window.
A start links what those before it left, as far as the run directory still holds it: the latest start has it all.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_lccp.files import write_whole
from megatron_lccp.records.store import RunStore

RECORD = Path("files/record")
_START = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(\w+)(?:-(\d+))?")
"""W&B's folder of a start: when it was, the id of the W&B run (the same for all starts of a training), and a number if
another start had this name."""


def keep_record(store: RunStore, record: Path) -> list[Path]:
    """Bring `record` up to date with a run directory; returns its files that are new or were copied anew.

    The first time it appears only when it is whole. Raises OSError.
    """
    if record.is_dir():
        return list(_keep(store, record))
    draft = record.with_name(record.name + ".tmp")
    draft.mkdir(parents=True, exist_ok=True)
    new = [record / path.relative_to(draft) for path in _keep(store, draft)]
    draft.rename(record)
    return new


def _keep(store: RunStore, record: Path) -> Iterator[Path]:
    lines = (store.format_path, store.config_path, store.metrics_path, store.steps_path, store.events_path)
    for path in (*lines, *store.windows().values(), *store.health_files().values()):
        kept = record / path.relative_to(store.dir)
        if path.is_file() and not _is_same(path, kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.unlink(missing_ok=True)
            try:
                os.link(path, kept)
            except OSError:  # another file system, or one without links
                write_whole(kept, partial(shutil.copy2, path))
            yield kept


def _is_same(path: Path, kept: Path) -> bool:
    if not kept.is_file():
        return False
    one, two = path.stat(), kept.stat()
    return os.path.samestat(one, two) or (one.st_size, one.st_mtime_ns) == (two.st_size, two.st_mtime_ns)


def find_records(folder: Path) -> list[Path]:
    """The records in W&B's folder of a start, or in a folder of such: of each W&B run the latest start's."""
    latest: dict[str, tuple[str, int, Path]] = {}
    for folder in sorted((folder, *folder.iterdir())):
        match = _START.fullmatch(Path(os.path.realpath(folder)).name)
        if match and RunStore(folder / RECORD).exists():
            time, run_id, number = match.groups()
            start = time, int(number or 0), folder / RECORD
            latest[run_id] = max(latest.get(run_id, start), start)
    return sorted(record for *_, record in latest.values())


def folder_name(path: Path) -> str:
    """What tells a run directory from others: its own name, or that of W&B's folder around it."""
    path = Path(os.path.realpath(path))
    return path.parents[1].name if path.parts[-2:] == RECORD.parts else path.name
