"""Writing a checkpoint: at once, or behind the back of the training.

In: model chunks, optimizer, where the training stands, the directory. Out: `<dir>/step-00000100/`, complete or not
there. It is a draft, `step-00000100.<job>.tmp`, until every rank has written its part; then `checkpoint.json`, with a
SHA-256 of every file, is written last and the directory gets its name. So a save that dies, of which rank or process it
may be, is never taken for a checkpoint; and a rank that is still dying on another node writes into no draft but its own.

Behind the back: the training waits until what is saved lies in host memory. A process that each rank forks, by
Megatron-Core's own asynchronous save, writes it and computes digests; ranks agree after later steps that all have.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import multiprocessing
import os
import queue
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException

from megatron_lccp.files import file_sha256, write_whole
from megatron_lccp.parallel.compat import OWN_ASYNC, save_without_helpers
from megatron_lccp.parallel.gather import RanksApart, all_out, any_rank, first_text, union
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.parallel.lost import lost_ranks
from megatron_lccp.processes import end_with_parent, this_process
from megatron_lccp.weights.checkpoint import Position, checkpoints_in, digests_of, drop, drop_old
from megatron_lccp.weights.sharded import ABOUT, FORMAT, FORMAT_ANY_LAYOUT, CheckpointError
from megatron_lccp.weights.state import slices_digest, state_for_any_layout, state_of_this_layout

ROOM_BYTES = 1 << 20
NICENESS = 10
"""Of what writes behind the back, so that it takes no core from the training."""
FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))


class DiskFull(CheckpointError):
    """There is no room for a checkpoint, where an older one could go."""


@dataclass
class Save:
    """A checkpoint that is being written; every rank calls its methods alike."""

    directory: Path
    final: Path
    keep: int
    groups: Groups
    position: Position
    job: str
    """Names the processes that write it: no later start of the same run has the same one."""
    content: dict[str, Any]
    """Of checkpoint.json, but for the digests."""
    calls: AsyncCallsQueue | None = None
    """Megatron-Core's, with one call in it, of what is written behind the back."""
    digests: Connection | None = None
    """Where the process that writes says the digests of its files."""
    started_s: float = field(default_factory=time.perf_counter, init=False)
    seconds: float | None = field(default=None, init=False)
    """That it took until it was seen to be written: at least what a save takes that is waited for."""
    _ended: bool = field(default=False, init=False)

    def is_written(self) -> bool:
        """True on all ranks once nothing is left to do but to finish."""
        if self.calls is None:
            return True
        caller = self.calls.async_calls[0].async_caller
        mine = caller.is_current_async_call_done(blocking=False, no_dist=True)
        written = not any_rank(not mine, self.groups.device)
        if written and self.seconds is None:
            self.seconds = time.perf_counter() - self.started_s
        return written

    def finish(self) -> Path:
        """Wait until all is written, and make it a checkpoint. CheckpointError on all ranks if one could not write."""
        problem: str | None = None
        known: dict[str, str] = {}
        if self.calls is not None:
            with _agreed(self) as met:
                self.calls.maybe_finalize_async_calls(blocking=True)
            self._ended, problem = True, met.problem
            if self.digests is not None:
                with contextlib.suppress(EOFError):  # what writes has died before it could say them
                    known = self.digests.recv() if self.digests.poll() else {}
            known = union(known)
        digests: dict[str, str] = {}
        if problem is None:
            digests, problem = digests_of(self.draft, known)
        if problem is None and self.groups.is_main:
            try:
                content = {**self.content, "sha256": digests}
                # on disk before the directory has its name
                write_whole(self.draft / ABOUT, lambda file: file.write_text(json.dumps(content, indent=1)))
                shutil.rmtree(self.final, ignore_errors=True)
                self.draft.rename(self.final)
                drop_old(self.directory, self.keep)
            except OSError as error:
                problem = str(error)
        if problem := first_text(problem):
            _give_up(self, problem)
        return self.final

    def abort(self) -> None:
        """End what writes; of this rank alone, without the others. The draft stays, for the next start to discard."""
        if self.calls is not None and not self._ended:
            self._ended = True
            for call in self.calls.async_calls:
                if (process := call.async_caller.process) is not None:
                    process.kill()
                    process.join()
                    *_, results = call.async_request.async_fn_args
                    while not results.empty():  # or the next save would take them for its own
                        results.get()

    @property
    def draft(self) -> Path:
        return self.directory / f"{self.final.name}.{self.job}.tmp"


def save_checkpoint(
    directory: Path, keep: int, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, groups: Groups,
    position: Position, about: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Write `step-*` for any layout and wait for it; every rank calls it.

    Drops all but the newest `keep`. Raises CheckpointError on all ranks if one could not write; earlier ones stay.
    """
    return begin_save(directory, keep, chunks, optimizer, groups, position, about).finish()


def begin_save(
    directory: Path, keep: int, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, groups: Groups,
    position: Position, about: Mapping[str, Any], any_layout: bool = True, behind: bool = False,
    taken: Mapping[str, Any] | None = None,
) -> Save:  # fmt: skip
    """Write `step-*` under `directory`, or have it written `behind` the training's back; every rank calls it.

    `taken` is noted with the position: what its steps took of packed documents. `any_layout=False` saves the
    optimizer's state as this layout holds it, gathering nothing. Raises CheckpointError on all ranks if one could not
    write (DiskFull if an older checkpoint could make room); earlier ones stay.
    """
    content: dict[str, Any] = {
        "format": FORMAT_ANY_LAYOUT if any_layout else FORMAT, "position": asdict(position),
        "about": dict(about), "taken": taken,
    }  # fmt: skip
    if not any_layout:
        assert optimizer is not None  # weights alone fit any
        content["layout"] = {"digest": slices_digest(optimizer), "text": _layout_text(groups)}
    job = first_text(this_process().name if groups.is_main else None)
    assert job is not None  # the main rank's
    save = Save(directory, directory / f"step-{position.step:08d}", keep, groups, position, job, content)
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)  # else what is saved is from before the last update
    _make_room(save)
    with _agreed(save) as met:
        save_without_helpers()
        request = _request(save.draft, chunks, optimizer, any_layout)
        if behind:
            save.calls, request = AsyncCallsQueue(), _written_behind(save, request)
            save.calls.schedule_async_request(request)
        else:
            request.execute_sync()
    if met.problem is not None:
        save.abort()
        _give_up(save, met.problem)
    return save


@dataclass
class _Met:
    """What a rank met in a part of a save; after it, what any did."""

    problem: str | None = None


@contextlib.contextmanager
def _agreed(save: Save) -> Iterator[_Met]:
    """A part of a save in which ranks wait for each other: what one meets, all hear of, or RanksApart if they cannot."""
    met = _Met()
    try:
        yield met
    except (Exception, CheckpointException) as error:
        if lost_ranks(error):
            raise
        met.problem = _last_line(error)
    if not all_out(failed=met.problem is not None):
        raise RanksApart(
            f"{save.final}: not saved ({met.problem}), and other ranks wait in the middle of the save; earlier ones "
            "stay, and the same command resumes"
        )
    met.problem = first_text(met.problem)


def drop_oldest(directory: Path, groups: Groups) -> str | None:
    """Remove the oldest checkpoint, if it is not the newest, and say its name; every rank calls it."""
    name = None
    if groups.is_main and len(found := checkpoints_in(directory)) > 1:
        drop(found[0])
        name = found[0].name
    return first_text(name)


def _request(
    draft: Path, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, any_layout: bool
) -> AsyncRequest:
    """What is to be written. The state, of which the request has what this rank writes, is free again after this."""
    if any_layout or optimizer is None:
        state = state_for_any_layout(chunks, optimizer, loading=False)
    else:
        state = state_of_this_layout(chunks, optimizer)
    return dist_checkpointing.save(state, str(draft), async_sharded_save=True, **OWN_ASYNC)


def _written_behind(save: Save, request: AsyncRequest) -> AsyncRequest:
    """The request with our own writing in place of Megatron-Core's, which in 0.16.1 forks again, and waits for ever for
    one of these processes that dies."""
    if request.async_fn is None:
        return request
    save.digests, say = multiprocessing.Pipe(duplex=False)
    transforms, _ = request.async_fn.args
    return request._replace(async_fn=partial(_write, transforms, say, os.getpid()))


def _write(
    transforms: list[Any], say: Connection, parent: int, rank: int, buckets: list[Any], results: queue.Queue
) -> None:
    """Write this rank's files; in a process of its own, whose memory is the rank's as it was when it was forked.

    It ends with the rank, and by no signal that is meant for the training, which waits for it.
    """
    end_with_parent()
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)
    for asked in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(asked, signal.SIG_IGN)
    gc.disable()  # it would give back memory of a GPU that is the parent's
    os.nice(NICENESS)
    written: Any = {}
    try:
        digests = {}
        for number, bucket in enumerate(buckets):
            done: queue.Queue[Any] = queue.Queue()
            count: queue.Queue[int] = queue.Queue()
            count.put(number)
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, done, count, True)
            _, found = done.get_nowait()
            if isinstance(found, Exception):
                raise found
            written[number] = found
            path, name, _ = bucket
            digests[name] = file_sha256(Path(path))
        say.send(digests)
    except Exception as error:
        written = error
    results.put(written)


def _make_room(save: Save) -> None:
    """An empty draft that can be written to. Raises CheckpointError on all ranks.

    Rank 0 writes some files of a checkpoint alone; a disk without room for those is found out here, where no other
    rank waits in the middle of a save. If there are older checkpoints, there must be room for one as large as the
    newest, or DiskFull tells who can drop one.
    """
    problem = None
    if save.groups.is_main:
        try:
            shutil.rmtree(save.draft, ignore_errors=True)
            save.draft.mkdir(parents=True)
            probe = save.draft / "probe"
            with probe.open("wb") as stream:
                stream.write(bytes(ROOM_BYTES))
                os.fsync(stream.fileno())
            probe.unlink()
            if len(checkpoints_in(save.directory)) > 1 and (missing := _missing_bytes(save.directory)) > 0:
                problem = f"{FULL[0]}: {missing:,} bytes more are needed"
        except OSError as error:
            problem = str(error)
    if problem := first_text(problem):
        _give_up(save, problem)


def _missing_bytes(directory: Path) -> int:
    """Bytes that the disk lacks for one more checkpoint as large as the newest."""
    newest = checkpoints_in(directory)[-1]
    return sum(file.stat().st_size for file in newest.iterdir()) - shutil.disk_usage(directory).free


def _give_up(save: Save, problem: str) -> NoReturn:
    """Remove the draft and raise on all ranks: DiskFull if dropping an older checkpoint may help."""
    full = None
    if save.groups.is_main:
        try:
            said = any(text in problem for text in FULL)
            if len(checkpoints_in(save.directory)) > 1 and (said or _missing_bytes(save.directory) > 0):
                full = "full"
        except OSError:  # the directory itself is gone
            pass
        shutil.rmtree(save.draft, ignore_errors=True)
    kind = DiskFull if first_text(full) else CheckpointError
    raise kind(f"{save.final}: not saved, free some space or fix the directory; earlier ones stay ({problem})")


def _layout_text(groups: Groups) -> str:
    p = groups.layout
    chunks = f" x {p.virtual_pipeline} chunks" if p.virtual_pipeline else ""
    ranks = torch.distributed.get_world_size()
    return (
        f"TP {p.tensor} x PP {p.pipeline}{chunks} x CP {p.context}, EP {p.expert} x ETP {p.expert_tensor or p.tensor} on "
        f"{ranks} ranks"
    )


def _last_line(error: BaseException) -> str:
    """What went wrong, without the traces that torch puts into the text of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
