"""What `lccp doctor` finds out about one node: versions, GPUs, Transformer Engine, disks, limits.

In: a configuration or none, and the ranks of this node. Out: findings, a line each.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from megatron_lccp.config.tree import Config

State = Literal["ok", "not run", "warning", "problem"]
GIB, GB = 2**30, 1e9
PAIRS = {"0.16.1": ("2.13.0", "2.11.0"), "0.19.2": ("2.15.0", "2.20.2")}
"""Megatron-Core -> the torch and the Transformer Engine that it was tested with."""
OLDEST_TORCH = (2, 10)
"""CVE-2026-24747: torch.load, even with weights_only."""
PROBE_BYTES = 256 * 2**20
"""What is written and read to measure a disk."""


@dataclass(frozen=True)
class Finding:
    """One line."""

    state: State
    about: str
    text: str
    """What was found, and the remedy."""

    def __str__(self) -> str:
        return f"{self.state:<8} {self.about:<12} {self.text}"


def look_here(config: Config | None, ranks_here: int, probe_bytes: int = PROBE_BYTES) -> list[Finding]:
    """Everything about this node. A check that fails is a finding, too."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", versions),
        ("gpu", lambda: gpus(ranks_here)),
        ("engine", lambda: engine(config)),
        ("limits", lambda: limits(ranks_here)),
    ]
    for about, directory, needs_bytes in places(config):
        checks.append((about, partial(disk, about, directory, needs_bytes, probe_bytes)))
    found: list[Finding] = []
    for about, check in checks:
        try:
            found += check()
        except Exception as error:  # one check less is no reason to hear nothing of the others
            why = " ".join(str(error).split()) or type(error).__name__
            found.append(Finding("problem", about, f"could not be checked: {why[:300]}"))
    return found


def versions() -> Iterator[Finding]:
    """Python, torch and Megatron-Core, and whether they were tested together."""
    has = {name: _version(name) for name in ("torch", "megatron-core")}
    said = f"Python {platform.python_version()}, torch {has['torch']}, megatron-core {has['megatron-core']}"
    plain = (has["torch"] or "").partition("+")[0]
    number = tuple(int(part) for part in plain.split(".")[:2] if part.isdigit())
    if number < OLDEST_TORCH:
        yield Finding(
            "problem", "versions", f"{said}; torch before 2.10 can be made to run code by a checkpoint: update it"
        )
    elif has["megatron-core"] not in PAIRS:
        known = " or ".join(PAIRS)
        yield Finding("problem", "versions", f"{said}; install megatron-core {known}: no other was tested")
    elif plain != (tested := PAIRS[has["megatron-core"]][0]):
        yield Finding("warning", "versions", f"{said}; tested with torch {tested}: run bash tests/run.sh with yours")
    else:
        yield Finding("ok", "versions", f"{said}: tested together")


def gpus(ranks_here: int) -> Iterator[Finding]:
    """GPUs of this node, their memory, and NCCL."""
    import torch

    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "unset") != "":
            why = "is a build without CUDA" if torch.version.cuda is None else "does not find them: look at nvidia-smi"
            yield Finding("problem", "gpu", f"there is a driver for GPUs, and torch {torch.__version__} {why}")
        else:
            yield Finding("ok", "gpu", "none here; ranks run on the CPU over gloo")
        return
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    memory = [torch.cuda.mem_get_info(i) for i in range(count)]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    said = f"{count} x {', '.join(names)}, {min(m[1] for m in memory) / GIB:.0f} GiB, CUDA {torch.version.cuda}, NCCL {nccl}"
    busy = [i for i, (free, total) in enumerate(memory) if total - free > 0.05 * total + 2 * GIB * (ranks_here > 1)]
    if ranks_here > count:
        yield Finding("problem", "gpu", f"{said}; {ranks_here} ranks are here: start one for each GPU")
    elif busy:
        yield Finding(
            "warning", "gpu", f"{said}; others hold memory of GPU {', '.join(map(str, busy))}: see nvidia-smi"
        )
    elif not torch.cuda.is_bf16_supported():
        yield Finding("problem", "gpu", f"{said}; they cannot compute in BF16: set training.precision: fp32")
    else:
        yield Finding("ok", "gpu", said)


def engine(config: Config | None) -> Iterator[Finding]:
    """Transformer Engine, and whether the configuration needs it."""
    import torch

    has, core = _version("transformer-engine"), _version("megatron-core")
    fp8 = config is not None and config.training.fp8 != "none"
    if not torch.cuda.is_available():
        text = f"Transformer Engine {has or 'is not installed'}; without a GPU nothing uses it"
        yield Finding("ok", "engine", text)
        return
    if has is None:
        text = "Transformer Engine is not installed: LCCP_EXTRAS=gpu bash tools/setup_env.sh"
        state: State = "problem" if fp8 else "warning"
        yield Finding(state, "engine", text + ("; training.fp8 needs it" if fp8 else "; portable layers are slower"))
        return
    from megatron_lccp.model.attention import has_transformer_engine

    tested = PAIRS.get(core or "", ("", ""))[1]
    if not has_transformer_engine():
        text = f"Transformer Engine {has} is installed and cannot be imported: python -c 'import transformer_engine.pytorch'"
        yield Finding("problem", "engine", text)
    elif has.partition("+")[0] != tested:
        yield Finding("warning", "engine", f"Transformer Engine {has}; tested with {tested}: run lccp doctor --gpu")
    else:
        yield Finding("ok", "engine", f"Transformer Engine {has}: tested with megatron-core {core}")


def limits(ranks_here: int) -> Iterator[Finding]:
    """Open files, processes, locked memory, shared memory, temporary files, cores."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    wrong: list[tuple[State, str]] = []
    if files != resource.RLIM_INFINITY and files < 4096:
        wrong.append(("problem" if files < 1024 else "warning", f"{files} open files: ulimit -n 65536"))
    if processes != resource.RLIM_INFINITY and processes < 4096:
        wrong.append(("warning", f"{processes} processes and threads: ulimit -u 65536"))
    fabric = Path("/sys/class/infiniband")
    if fabric.is_dir() and any(fabric.iterdir()) and locked != resource.RLIM_INFINITY and locked < GIB:
        text = f"{locked // 1024} KiB of locked memory, which InfiniBand needs: ulimit -l unlimited (LimitMEMLOCK of slurmd)"
        wrong.append(("problem", text))
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    if shared < ranks_here * 2**26:
        text = f"{shared / GIB:.2f} GiB free in /dev/shm: start the container with --ipc=host or --shm-size=16g"
        wrong.append(("problem", text))
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if room < GIB:
        wrong.append(("warning", f"{room / GIB:.2f} GiB free in {tempfile.gettempdir()}: set TMPDIR to another place"))
    cores = len(os.sched_getaffinity(0))
    if cores < ranks_here:
        text = f"{cores} cores for {ranks_here} ranks: give the job more (--cpus-per-task)"
        wrong.append(("warning", text))
    for state, text in wrong:
        yield Finding(state, "limits", text)
    if not wrong:
        unlimited = {resource.RLIM_INFINITY: "unlimited"}
        text = (
            f"open files {unlimited.get(files, files)}, locked memory "
            f"{unlimited.get(locked, f'{locked // 1024} KiB')}, /dev/shm {shared / GIB:.0f} GiB free, {cores} cores"
        )
        yield Finding("ok", "limits", text)


def places(config: Config | None) -> list[tuple[str, Path, int]]:
    """(what it is, directory, bytes that it will be asked for)."""
    if config is None:
        return [("disk", Path.cwd(), 0)]
    needs = (config.checkpoint.keep + 1) * checkpoint_bytes(config)
    found = [("dir", Path(config.dir), needs)]
    if Path(config.data.dir) != Path(config.dir):
        found.append(("data.dir", Path(config.data.dir), 0))
    return found


def checkpoint_bytes(config: Config) -> int:
    """Bytes of one checkpoint for any layout, as `lccp plan` counts them."""
    from megatron_lccp.model.resolved import resolve
    from megatron_lccp.planning.checkpoint_cost import checkpoint_costs
    from megatron_lccp.planning.plan import sizes_of, smallest_ranks

    model = resolve(config)
    sizes = sizes_of(config, model.of_vocabulary(model.vocab_size or config.data.tokenizer.vocab_size))
    value_bytes = 4 if config.training.precision == "fp32" else 2
    return checkpoint_costs(sizes, smallest_ranks(config), config.megatron.ddp, value_bytes)["any_layout"].bytes


def disk(about: str, directory: Path, needs_bytes: int, probe_bytes: int) -> Iterator[Finding]:
    """Speed of a file written and read back past the caches, as far as the system lets go of them, and room."""
    home = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not home.is_dir():
        yield Finding("problem", about, f"{directory}: {home} is no directory: name another place")
        return
    if not os.access(home, os.W_OK):
        yield Finding("problem", about, f"{directory}: {home} cannot be written: see its owner and how it is mounted")
        return
    usage, files = shutil.disk_usage(home), os.statvfs(home).f_favail
    room = f"{usage.free / GB:,.0f} GB free"
    if usage.free < max(needs_bytes, probe_bytes):
        needed = f"{max(needs_bytes, probe_bytes) / GB:,.1f} GB"
        remedy = "lower checkpoint.keep or take another place" if needs_bytes else "take another place"
        yield Finding("problem", about, f"{directory}: {room}, {needed} are needed: {remedy}")
        return
    write_s, read_s = _speed(home, probe_bytes)
    said = (
        f"{directory}: writes {probe_bytes / write_s / GB:.2f} GB/s, reads {probe_bytes / read_s / GB:.2f} GB/s, {room}"
    )
    if needs_bytes:
        said += f" of {needs_bytes / GB:,.1f} GB needed for checkpoints"
    if files < 10_000 and os.statvfs(home).f_files:
        yield Finding("warning", about, f"{said}, room for {files} more files only: remove some")
    elif min(probe_bytes / write_s, probe_bytes / read_s) < 0.1 * GB:
        yield Finding("warning", about, f"{said}: slow; take a parallel file system for checkpoints and data")
    elif usage.free < 10 * GB or usage.free < 1.2 * needs_bytes:
        yield Finding("warning", about, f"{said}: little room")
    else:
        yield Finding("ok", about, said)


def _speed(directory: Path, count: int) -> tuple[float, float]:
    """Seconds to write (and sync) and to read so many bytes."""
    block = os.urandom(4 * 2**20)
    path = directory / f".lccp-doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        with path.open("wb", buffering=0) as file:
            start = time.perf_counter()
            for _ in range(count // len(block)):
                file.write(block)
            os.fsync(file.fileno())
            write_s = time.perf_counter() - start
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with path.open("rb", buffering=0) as file:
            start = time.perf_counter()
            while file.read(len(block)):
                pass
            return write_s, time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
