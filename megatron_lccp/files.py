"""Files that are whole or absent, and their hashes.

In: a path, and a function that fills a file. Out: the file under its name only once it is complete; its SHA-256.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path` and rename it: readers see the old file or the whole new one.

    Raises OSError in one line that names `path` (a full disk, a read-only folder); nothing is left behind then.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        _discard(draft)
        _refuse(path, error)
    except BaseException:
        _discard(draft)
        raise


def _discard(draft: Path) -> None:
    try:
        draft.unlink(missing_ok=True)
    except OSError:
        pass  # the folder itself cannot be written: what the caller reports is the first error


def _refuse(path: Path, error: OSError) -> NoReturn:
    reason = os.strerror(error.errno) if error.errno else str(error)
    raise OSError(error.errno or errno.EIO, f"cannot write: {reason}; nothing was recorded", str(path)) from error


def flush_to_disk(path: Path) -> None:
    """Have the content on disk before something says that it is: after a loss of power it may be zeros else."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    """Hex digest of a file of any size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
