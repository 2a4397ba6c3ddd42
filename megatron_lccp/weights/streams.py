"""Safetensors files read and written in parts, so that a file may be larger than memory.

In: paths, and parts of tensors. Out: the parts as read, or files that are complete or not there. A part is a tensor, or
what leading indices such as (layer, expert) pick of it: one range of bytes. Only headers (JSON) are parsed; nothing is
unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch

from megatron_lccp import lock
from megatron_lccp.files import require_format

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FORMAT_KEY, FORMAT = "lccp_format", 1
"""Key of the format's version in the header of a whole model's file, and the version that is written, the newest that
is read. (Hugging Face's files have a key `format`, of another meaning.)"""
_SYNC_BYTES = 256 << 20  # after as many bytes, parts are brought to disk and noted as done


@dataclass(frozen=True)
class Entry:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    start: int
    """First byte in the file."""

    def span(self, at: Sequence[int]) -> tuple[int, int, tuple[int, ...]]:
        """(first byte, bytes, shape) of the part at leading indices."""
        shape = self.shape[len(at) :]
        size = math.prod(shape) * self.dtype.itemsize
        index = 0
        for i, length in zip(at, self.shape):
            index = index * length + i
        return self.start + index * size, size, shape


def whole_header(about: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of a file that holds a whole model of Megatron-Core's tensors: what it is, and the file's format."""
    return {"about": json.dumps(dict(about)), FORMAT_KEY: str(FORMAT)}


def about_in(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What such a file says it is; nothing if it says nothing. ValueError for a newer format, or if it is damaged."""
    version = metadata.get(FORMAT_KEY)
    require_format(path, int(version) if version and version.isdecimal() else version, FORMAT)
    try:
        return dict(json.loads(metadata.get("about", "{}")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its header's `about` is no object of JSON: {error}") from error


def read_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(tensors, metadata) of a safetensors file. ValueError if it is none, or cut short."""
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError("its header is cut short")
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {name: _entry(name, about, path, 8 + length, size) for name, about in header.items()}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error
    return entries, metadata


def _entry(name: str, about: Mapping[str, Any], path: Path, base: int, size: int) -> Entry:
    if about["dtype"] not in DTYPES:
        raise ValueError(f"{name} has dtype {about['dtype']}; there are {', '.join(DTYPES)}")
    start, end = about["data_offsets"]
    entry = Entry(tuple(about["shape"]), DTYPES[about["dtype"]], path, base + start)
    if end - start != entry.span(())[1] or start < 0 or base + end > size:
        raise ValueError(f"{name} lies at bytes {start} to {end}, which its shape or the file's size contradicts")
    return entry


def read_part(entry: Entry, at: Sequence[int] = ()) -> torch.Tensor:
    """What leading indices pick of a tensor, in memory of its own."""
    start, size, shape = entry.span(at)
    data = bytearray(size)
    with entry.path.open("rb") as file:
        file.seek(start)
        if file.readinto(data) != size:
            raise ValueError(f"{entry.path}: ends before byte {start + size}")
    flat = torch.frombuffer(data, dtype=entry.dtype) if size else torch.empty(0, dtype=entry.dtype)
    return flat.view(shape)


class PartWriter:
    """A safetensors file written part by part; a run that was cut off goes on where it stopped.

    The file is `path.partial` until `finish`. `path.partial.done` lists the parts that are on disk, below a digest of
    the header; with another header (another source, say) everything starts over. `complete` says that the file is
    there already; any other file of that name is refused.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: dict[str, str]
    ):
        self.path, self.partial, self._header = path, Path(f"{path}.partial"), _header(tensors, metadata)
        start = len(self._header)
        self._entries: dict[str, Entry] = {}
        for name, (shape, dtype) in tensors.items():
            self._entries[name] = Entry(tuple(shape), dtype, self.partial, start)
            start += self._entries[name].span(())[1]
        self._size, self._pending_bytes = start, 0
        self._pending: list[str] = []
        self.done: set[str] = set()
        self._data: BinaryIO
        self._journal: TextIO
        self.complete = self._is_complete()

    def __enter__(self) -> PartWriter:
        if self.path.exists():
            raise ValueError(f"{self.path}: exists and is something else; remove it or name another")
        with contextlib.ExitStack() as held:
            held.enter_context(lock.sole_user(Path(f"{self.partial}.lock"), str(self.path)))
            self._open()
            self._held = held.pop_all()
        return self

    def _open(self) -> None:
        """Go on with what an earlier run wrote, or start over."""
        self._journal = open(f"{self.partial}.done", "a+", encoding="utf-8")
        self._journal.seek(0)
        text, digest = self._journal.read(), hashlib.sha256(self._header).hexdigest()
        lines = text[: text.rfind("\n") + 1].splitlines()  # what was cut off within a line is not done
        go_on = lines[:1] == [digest] and self.partial.exists() and self.partial.stat().st_size == self._size
        free = shutil.disk_usage(self.path.parent).free
        if not go_on and free < self._size:
            raise ValueError(f"{self.path}: needs {self._size:,} bytes, its disk has {free:,} free")
        self._data = self.partial.open("r+b" if go_on else "w+b")
        self.done = set(lines[1:]) if go_on else set()
        self._journal.truncate(0)
        self._journal.write("".join(f"{line}\n" for line in [digest, *sorted(self.done)]))
        self._data.write(self._header)
        self._data.truncate(self._size)
        self._sync()

    def __exit__(self, *_: object) -> None:
        with self._held:
            self._sync()
            self._data.close()
            self._journal.close()

    def has(self, name: str, at: Sequence[int] = ()) -> bool:
        """True if an earlier run, or this one, has written the part."""
        return part_label(name, at) in self.done

    def write(self, name: str, at: Sequence[int], tensor: torch.Tensor) -> None:
        """Write one part; ValueError if it is written twice or is not of the promised shape and type."""
        entry, label = self._entries[name], part_label(name, at)
        start, size, shape = entry.span(at)
        if label in self.done:
            raise ValueError(f"{self.path}: {label} is written twice")
        if tuple(tensor.shape) != shape or tensor.dtype != entry.dtype:
            raise ValueError(f"{self.path}: {label} is {tensor.dtype} {list(tensor.shape)}, not {entry.dtype} {shape}")
        self._data.seek(start)
        self._data.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        self.done.add(label)
        self._pending.append(label)
        self._pending_bytes += size
        if self._pending_bytes >= _SYNC_BYTES:
            self._sync()

    def finish(self, expected: set[str]) -> None:
        """Give the file its name once every part that is expected (labels by `part_label`) was written."""
        if missing := sorted(expected ^ self.done):
            raise ValueError(f"{self.path}: {len(missing)} parts were not written as planned, such as {missing[0]}")
        self._sync()
        self.partial.replace(self.path)
        Path(self._journal.name).unlink()

    def _sync(self) -> None:
        self._data.flush()
        os.fsync(self._data.fileno())
        self._journal.write("".join(f"{label}\n" for label in self._pending))
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._pending, self._pending_bytes = [], 0

    def _is_complete(self) -> bool:
        if not self.path.exists() or self.path.stat().st_size != self._size:
            return False
        with self.path.open("rb") as file:
            return file.read(len(self._header)) == self._header


def part_label(name: str, at: Sequence[int]) -> str:
    """How a part is called in the list of what is done."""
    return f"{name}[{','.join(map(str, at))}]"


def _header(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
