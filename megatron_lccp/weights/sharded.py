"""Checkpoint directories in Megatron-Core's format (dist_checkpointing's torch_dist), written and read in parts.

In: a directory, and parts of tensors: what leading indices such as (layer, expert) pick. Out: a directory that is
complete or not there and that any layout loads, or the parts of one that a training or a conversion wrote. One process
and no ranks; never more than a part in memory, with what is stored of it.
`checkpoint.json` says what it is and gives the SHA-256 of every file. Of what pickle wrote, `.metadata` alone is
unpickled, with nothing in it but torch's descriptions of checkpoints; tensors are read with weights_only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import importlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo  # what a writer notes of a part; needed to resume
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_lccp import lock
from megatron_lccp.files import file_sha256, require_format, write_whole

ABOUT, JOURNAL = "checkpoint.json", ".journal"
FORMAT, FORMAT_ANY_LAYOUT = 2, 1
"""Newest version of the format that is read, and the version of a checkpoint that fits any layout. (2: its optimizer's
state is as one layout holds it, which says `layout`.)"""
BACKENDS = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
"""What Megatron-Core reads first (dist_checkpointing/core.py, CheckpointingConfig); Megatron-Core is not imported."""
OPTIMIZER = "optimizer."
"""Names of tensors that are the optimizer's begin with this."""
Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Part = tuple[str, tuple[int, ...]]  # (name, leading indices)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; one line that names it and the remedy."""


def read_about(path: Path) -> dict[str, Any]:
    """The content of checkpoint.json; without `position`, the directory holds weights alone. Raises CheckpointError."""
    try:
        content = json.loads((path / ABOUT).read_text())
        version = content.get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise _incomplete(path, error) from error
    try:
        require_format(path, version, FORMAT)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    try:
        if not isinstance(content["about"], dict) or not isinstance(content["sha256"], dict):
            raise ValueError("it describes none")
        _require_counts(content.get("position", {}))
    except (ValueError, KeyError) as error:
        raise _incomplete(path, error) from error
    return content


def _require_counts(position: Any) -> None:
    """ValueError unless a position of a training is counts by name."""
    counts = position.values() if isinstance(position, dict) else [position]
    if wrong := [value for value in counts if type(value) is not int or not 0 <= value < 1 << 63]:
        raise ValueError(f"its position counts {wrong[0]!r}, which is no whole number of at least 0")


def _incomplete(path: Path, error: Exception) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) else error
    return CheckpointError(f"{path}: is not a complete checkpoint ({ABOUT}: {reason}); move it away or name another")


class _Descriptions(pickle.Unpickler):
    """Refuses all but plain values and the dataclasses and enumerations in which torch describes a checkpoint."""

    MODULES = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))
    OTHERS = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}

    def find_class(self, module: str, name: str) -> Any:
        if module in self.MODULES:
            found = getattr(importlib.import_module(module), name, None)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in self.OTHERS or module.split(".")[0] == "pathlib" and name == "PosixPath":
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it is more than data, do not trust it ({module}.{name})")


def read_metadata(path: Path) -> Metadata:
    """What `.metadata` says of the tensors. CheckpointError if it is damaged, or would run code when unpickled."""
    try:
        with (path / ".metadata").open("rb") as stream:
            found = _Descriptions(stream).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise ValueError("it describes no checkpoint")
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{path / '.metadata'}: cannot be read: {error}") from error
    if odd := [s.relative_path for s in found.storage_data.values() if Path(s.relative_path).name != s.relative_path]:
        raise CheckpointError(f"{path / '.metadata'}: cannot be read: {odd[0]} is not in the directory")
    return found


def tensors_in(metadata: Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of the model's tensors by name; the optimizer's are left out."""
    described = metadata.state_dict_metadata.items()
    return {
        name: (tuple(of.size), of.properties.dtype)
        for name, of in described
        if isinstance(of, TensorStorageMetadata) and not name.startswith(OPTIMIZER)
    }


class _Into(DefaultLoadPlanner):
    """Reads into a part."""

    def __init__(self, part: torch.Tensor):
        super().__init__()
        self._part = part

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        target = self._part
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            target = target.narrow(axis, start, length)
        return target

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        pass


class ShardedReader:
    """The model's tensors in a checkpoint of any layout; call `check_files` before the first is read."""

    def __init__(self, path: Path):
        self.path, content = path, read_about(path)
        self.about: dict[str, Any] = content["about"]
        self.position: dict[str, int] | None = content.get("position")
        self.identity = hashlib.sha256((path / ABOUT).read_bytes()).hexdigest()
        self._sha256: dict[str, str] = content["sha256"]
        self._metadata = read_metadata(path)
        self.tensors = tensors_in(self._metadata)
        self._reader = FileSystemReader(path)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def check_files(self, progress: Callable[[int, int], None]) -> None:
        """CheckpointError unless the directory's files are those of checkpoint.json, byte by byte."""
        found = {file.name: file.stat().st_size for file in self.path.iterdir() if file.name != ABOUT}
        if odd := sorted(found.keys() ^ self._sha256.keys()):
            raise CheckpointError(f"{self.path}: missing or extra since it was saved: {', '.join(odd)}")
        done = 0
        for name, size in sorted(found.items()):
            if file_sha256(self.path / name) != self._sha256[name]:
                raise CheckpointError(f"{self.path}: altered since it was saved: {name}")
            progress(done := done + size, sum(found.values()))

    def read(self, name: str, at: Sequence[int] = ()) -> torch.Tensor:
        """What leading indices pick of a tensor. CheckpointError if not all of it is stored."""
        shape, dtype = self.tensors[name]
        inner = shape[len(at) :]
        sizes, offsets = torch.Size([1] * len(at) + list(inner)), torch.Size([*at, *[0] * len(inner)])
        part = torch.empty(sizes, dtype=dtype)
        wanted = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
        stored = self._metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)  # `tensors` names no others
        items = create_read_items_for_chunk_list(name, stored, [wanted])
        if sum(math.prod(item.lengths) for item in items) != part.numel():
            raise CheckpointError(f"{self.path}: {name}{list(at)} is not stored whole")
        try:
            self._reader.read_data(LoadPlan(items), _Into(part)).wait()
        except (OSError, RuntimeError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"{self.path}: {name}{list(at)} cannot be read: {reason}") from error
        return part.view(inner)


class _From(DefaultSavePlanner):
    """Reads each part as it is written."""

    def __init__(self, read: Callable[[str, tuple[int, ...]], torch.Tensor], parts: Mapping[MetadataIndex, Part]):
        super().__init__(flatten_state_dict=False)
        self._read, self._parts = read, parts

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        part = self._read(*self._parts[write_item.index])
        data = write_item.tensor_data
        assert data is not None
        wanted, dtype = data.chunk.sizes, data.properties.dtype
        assert part.numel() == math.prod(wanted) and part.dtype == dtype, write_item.index
        return part.contiguous().view(wanted)


def write_sharded(
    out: Path, tensors: Tensors, parts: Sequence[Part], read: Callable[[str, tuple[int, ...]], torch.Tensor],
    about: Mapping[str, Any], file_bytes: int, progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Write the directory `out` in files of about `file_bytes`; the same call goes on where an earlier one was cut off.

    `parts` tile `tensors`; `read` gives each as its turn comes. It is `out.partial` until it is complete. ValueError if
    `out` is there and is something else; what is there already and is the same is left alone.
    """
    if out.exists():
        if not (out / ABOUT).is_file() or read_about(out)["about"] != dict(about):
            raise ValueError(f"{out}: exists and is something else; remove it or name another")
        return
    draft = Path(f"{out}.partial")
    draft.mkdir(parents=True, exist_ok=True)
    items = [_write_item(name, at, tensors[name]) for name, at in parts]
    planner = _From(read, {item.index: part for item, part in zip(items, parts)})
    # (the planner's own method would compare every two parts of a tensor; that they tile is the caller's to say)
    plans, metadata = create_default_global_save_plan(_plans(items, file_bytes))
    writer = FileSystemWriter(draft)
    plans = writer.prepare_global_plan(plans)
    total, done = sum(map(_bytes, items)), 0
    content = json.dumps([dict(about), file_bytes, [[name, list(s), str(d)] for name, (s, d) in tensors.items()]])
    with _Journal(out, draft, hashlib.sha256(content.encode()).hexdigest(), total) as journal:
        for number, plan in enumerate(plans):
            if number not in journal.results:
                journal.note(number, writer.write_data(plan, planner).wait())
            done += sum(map(_bytes, plan.items))
            progress(done, total)
        writer.finish(metadata, list(journal.results.values()))
        (draft / "metadata.json").write_text(json.dumps(BACKENDS))
        torch.save({}, draft / "common.pt")
        more = {name: file_sha256(draft / name) for name in (".metadata", "metadata.json", "common.pt")}
        found = {
            "format": FORMAT_ANY_LAYOUT,
            "about": dict(about),
            "sha256": dict(sorted((journal.sha256 | more).items())),
        }
        write_whole(draft / ABOUT, lambda file: file.write_text(json.dumps(found, indent=1)))
        (draft / JOURNAL).unlink()
        draft.rename(out)


def _write_item(name: str, at: Sequence[int], tensor: tuple[tuple[int, ...], torch.dtype]) -> WriteItem:
    shape, dtype = tensor
    inner = shape[len(at) :]
    offsets, sizes = torch.Size([*at, *[0] * len(inner)]), torch.Size([*[1] * len(at), *inner])
    chunk = ChunkStorageMetadata(offsets=offsets, sizes=sizes)
    data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=dtype), size=torch.Size(shape))
    return WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.SHARD, tensor_data=data)


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _plans(items: Sequence[WriteItem], file_bytes: int) -> list[SavePlan]:
    """One plan for each file: as many parts as fit into `file_bytes`, at least one."""
    files: list[list[WriteItem]] = [[]]
    room = file_bytes
    for item in items:
        if files[-1] and _bytes(item) > room:
            files.append([])
            room = file_bytes
        files[-1].append(item)
        room -= _bytes(item)
    return [SavePlan(items=of) for of in files]


class _Journal:
    """Which files of a draft are whole, with what is in them: a line for each, below a digest of what is written."""

    def __init__(self, out: Path, draft: Path, content: str, total: int):
        self._out, self._draft, self._content, self._total = out, draft, content, total
        self.results: dict[int, list[WriteResult]] = {}
        self.sha256: dict[str, str] = {}

    def __enter__(self) -> _Journal:
        with contextlib.ExitStack() as held:
            held.enter_context(lock.sole_user(Path(f"{self._draft}.lock"), str(self._out)))
            self._open()
            self._held = held.pop_all()
        return self

    def _open(self) -> None:
        """Take what an earlier call wrote of the same, and remove the rest of it."""
        self._stream = (self._draft / JOURNAL).open("a+", encoding="utf-8")
        self._stream.seek(0)
        text = self._stream.read()
        whole = text[: text.rfind("\n") + 1]  # what was cut off within a line is not, nor may the next line join it
        self._stream.truncate(len(whole.encode()))
        lines = whole.splitlines()
        for line in lines[1:] if lines[:1] == [self._content] else ():
            self._take(json.loads(line))
        if not self.results:
            free = shutil.disk_usage(self._draft).free
            if free < self._total:
                raise ValueError(f"{self._out}: needs {self._total:,} bytes, its disk has {free:,} free")
            self._stream.truncate(0)
            self._write(self._content)
        for file in self._draft.iterdir():
            if file.name not in self.sha256 and file.name != JOURNAL:
                file.unlink()

    def __exit__(self, *_: object) -> None:
        with self._held:
            self._stream.close()

    def note(self, number: int, results: Sequence[WriteResult]) -> None:
        """A file is on disk."""
        name = results[0].storage_data.relative_path
        parts = [
            [r.index.fqn, list(r.index.offset or ()), r.storage_data.offset, r.storage_data.length] for r in results
        ]
        file = self._draft / name
        found = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        line = {"number": number, "file": name, **found, "parts": parts}
        self._take(line)
        self._write(json.dumps(line))

    def _take(self, line: Mapping[str, Any]) -> None:
        name = line["file"]
        if not (self._draft / name).is_file() or (self._draft / name).stat().st_size != line["bytes"]:
            return  # it is written again
        self.sha256[name] = line["sha256"]
        self.results[line["number"]] = [
            WriteResult(MetadataIndex(fqn, torch.Size(at)), length, _StorageInfo(name, start, length))
            for fqn, at, start, length in line["parts"]
        ]

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())
