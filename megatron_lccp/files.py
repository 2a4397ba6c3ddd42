"""Files that are whole or absent, their hashes, and the version of their format.

In: a path, and a function that fills a file. Out: the file under its name only once it is complete; its SHA-256.
What others may keep for years (run and data directories, checkpoints, weights, what `lccp measure` measured) says which
version of its format it is of: 1, 2, ... What says nothing was written before formats had versions, and is of the first.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_lccp.processes import is_running, this_process

OLDEST = 1
"""Version of a format that was written before formats had versions."""
ABANDONED_S = 3600.0
"""A draft of another machine, of which nobody here can see whether it is still written, is one no more after this."""
_DRAFT = re.compile(r".*\.(?P<place>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)\.tmp")
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "name another path, or move away the file that is there",
    errno.ENOTDIR: "name another path, or move away the file that is there in place of a folder",
    errno.EISDIR: "name a file",
    errno.EACCES: "name another path, or ask its owner for the right to it",
    errno.EPERM: "name another path, or ask its owner for the right to it",
    errno.EROFS: "name a path on a disk that can be written to",
    errno.ENOSPC: "free some space, or name another path",
    errno.EDQUOT: "free some space of your quota, or name another path",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or name another path",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ELOOP: "its symbolic links lead in a circle; name the file itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
"""What to do about an error of the file system."""


def require_format(where: str | Path, found: Any, newest: int) -> int:
    """The version of a format, `found` where it is noted (None: nowhere), once it is one that this version can read.

    Raises ValueError in one line for one that a newer megatron_lccp wrote, and for what is no version.
    """
    found = OLDEST if found is None else found
    if not isinstance(found, int) or isinstance(found, bool) or found < OLDEST:
        raise ValueError(f"{where}: has format {found!r}, which is none; it is damaged or not of megatron_lccp")
    if found > newest:
        raise ValueError(
            f"{where}: has format {found}, written by a newer megatron_lccp (this one reads up to {newest}); update "
            "megatron_lccp"
        )
    return found


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path` and rename it: readers see the old file or the whole new one.

    Raises OSError in one line that names `path` (a full disk, a read-only folder); nothing is left behind then.
    """
    draft = path.with_name(f"{path.name}.{this_process().name}.tmp")  # another process may write the same file
    if is_device(path):  # /dev/null, say, which would be a file from then on
        raise OSError(errno.EINVAL, "is a device or a pipe; name a file", str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_abandoned(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        write(draft)
        flush_to_disk(draft)
        os.replace(draft, path)
    except OSError as error:
        _discard(draft)
        refuse_write(path, error)
    except BaseException:
        _discard(draft)
        raise


@functools.cache
def drop_abandoned(folder: Path) -> None:
    """Remove the drafts of processes that were killed while they wrote into a folder; once in a process is enough."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.endswith(".tmp") and entry.is_file() and _is_abandoned(entry):
                _discard(Path(entry.path))


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    place = this_process().name.partition("-")[0]
    if (match := _DRAFT.fullmatch(entry.name)) and match["place"] == place:
        return not is_running(int(match["pid"]), int(match["start"]))
    is_one = match or re.fullmatch(r".*\.\d+\.tmp", entry.name)  # the latter of version 0.1
    return bool(is_one) and time.time() - entry.stat().st_mtime > ABANDONED_S


def is_device(path: Path) -> bool:
    """True for what is neither a file nor a folder: it may have no end, and is nothing to put a file in place of."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _discard(draft: Path) -> None:
    try:
        draft.unlink(missing_ok=True)
    except OSError:
        pass  # the folder itself cannot be written: what the caller reports is the first error


def refuse_write(path: Path, error: OSError) -> NoReturn:
    """Raise the OSError of a file that cannot be written, in one line that names it."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    kept = "; the old file is kept" if os.path.isfile(path) else ""
    remedy = f"; {REMEDIES[error.errno]}" if error.errno in REMEDIES else ""
    text = f"cannot be written: {reason}{kept}{remedy}"
    raise OSError(error.errno or errno.EIO, text, str(path)) from error


def error_text(error: Exception) -> str:
    """An error as text; one of the file system in one line: the file, what is wrong, what to do."""
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return str(error)
    remedy = REMEDIES.get(error.errno or 0)
    more = f"; {remedy}" if remedy and ";" not in error.strerror else ""  # what has one already says what to do
    return f"{shown_path(error.filename)}: {error.strerror}{more}"


def shown_path(path: str | bytes | Path) -> str:
    """A path as text that prints in one line, and that a stream of any encoding takes."""
    text = os.fsdecode(path)
    return text if text and text.isprintable() else repr(text)


def one_line(text: str) -> str:
    """A text whose characters all show, in one line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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
