"""Run a job of tests/distributed/jobs.py on several ranks: one start per layout, many checks inside it.

In: how many ranks, the name of a job, its arguments. Out: what the job returned on each rank. A failing rank ends the
others, and the test with its error.

A rank is a process of its own, forked off one that has done what every rank does first (warm.py): that costs a core 10
s, the fork nothing. The command line `lccp` and our tools are run in the same way. Where there is a GPU, it is a new
interpreter: CUDA does not survive a fork, and Transformer Engine starts it when it finds flash-attn at its import.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import pickle
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Callable

import pytest

ROOT = Path(__file__).parents[2]
GPU = Path("/dev/nvidiactl")
"""Where the driver of NVIDIA's GPUs is loaded."""


def free_port() -> int:
    """A port that nobody holds, below those that the system gives to connections: none takes it before its use."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def run_ranks(ranks: int, job: str, timeout_s: float = 240.0, fresh: bool = False, **arguments: Any) -> list[Any]:
    """Results of `job(**arguments)`, one for each rank; `module.job` is one of another module in this folder.

    `fresh` starts new interpreters, for what a process reads from its environment when it starts.
    """
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as scratch:
        processes = [
            _start(
                _rank, Path(scratch, f"result{rank}"), job, arguments, log=Path(scratch, f"log{rank}"), fresh=fresh,
                environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]  # fmt: skip
        try:
            _wait(processes, timeout_s, scratch)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads(Path(scratch, f"result{rank}").read_bytes()) for rank in range(ranks)]


def lccp(*arguments: str, timeout_s: float = 240.0, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """The command as on a shell, on one rank: its exit status and what it printed."""
    return _finished(_lccp, *arguments, timeout_s=timeout_s, cwd=cwd)


KEEPS_ALL = ("--checkpoint.every.steps=1", "--checkpoint.keep=20")
"""Of a short training: a checkpoint after every step, none of them dropped."""


def trained(config: Path, run: Path, *options: str) -> Path:
    """The run directory of a training on one rank, to its end."""
    found = lccp("train", str(config), f"--dir={run}", *options)
    assert found.returncode == 0, found.stderr
    return run


def tool(name: str, *arguments: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess:
    """`python tools/name ...` in the same way."""
    return _finished(_tool, name, *arguments, timeout_s=timeout_s)


def start_lccp(
    *arguments: str, out: Path, err: Path, cwd: Path = ROOT, environment: dict[str, str] | None = None
) -> BaseProcess:
    """The command, still running: on one rank unless the environment says otherwise."""
    environment = {"MASTER_PORT": str(free_port())} if environment is None else environment
    return _start(_lccp, *arguments, log=err, out=out, environment=environment, cwd=cwd)


def _finished(target: Callable, *arguments: str, timeout_s: float, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        environment = {"MASTER_PORT": str(free_port())}
        process = _start(target, *arguments, log=err, out=out, environment=environment, cwd=cwd)
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout_s, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    """The context whose processes are forked off one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # torch and numpy read it when they are imported
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # so does torch with this, which `lccp` sets
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not start CUDA before a fork
        patch.setenv("PYTHONPATH", str(ROOT))
        forkserver.ensure_running()
    return context


def _start(
    target: Callable, *arguments: Any, environment: dict[str, str], log: Path, out: Path | None = None,
    fresh: bool = False, cwd: Path = ROOT,
) -> BaseProcess:  # fmt: skip
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    on_gpu = GPU.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    context = multiprocessing.get_context("spawn") if fresh or on_gpu else _server()
    process = context.Process(target=_run, args=(target, arguments, own, cwd, str(out or log), str(log)))
    process.start()
    return process


def _run(target: Callable, arguments: tuple, environment: dict[str, str], cwd: Path, out: str, log: str) -> None:
    """What a process does first: the caller's environment and directory, and files for what it prints."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for name, path, number in (("stdout", out, 1), ("stderr", log, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        setattr(sys, name, io.TextIOWrapper(os.fdopen(number, "wb", closefd=False), line_buffering=True))
    target(*arguments)


def _rank(result: Path, job: str, arguments: dict[str, Any]) -> None:
    module, _, name = job.rpartition(".")
    found = getattr(importlib.import_module(f"tests.distributed.{module or 'jobs'}"), name)(**arguments)
    result.write_bytes(pickle.dumps(found))


def _lccp(*arguments: str) -> None:
    from megatron_lccp.cli import main

    sys.argv = ["lccp", *arguments]
    try:
        sys.exit(main())
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def _tool(name: str, *arguments: str) -> None:
    path = ROOT / "tools" / name
    sys.argv, sys.path[:0] = [str(path), *arguments], [str(path.parent)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _wait(processes: list[BaseProcess], timeout_s: float, scratch: str) -> None:
    end = time.monotonic() + timeout_s
    while any(process.exitcode is None for process in processes) and time.monotonic() < end:
        running = [process.sentinel for process in processes if process.exitcode is None]
        connection.wait(running, 0.1)
        if any(process.exitcode not in (None, 0) for process in processes):
            break
    codes = [process.exitcode for process in processes]
    if any(code != 0 for code in codes):
        worst = next((rank for rank, code in enumerate(codes) if code not in (None, 0)), 0)
        log = Path(scratch, f"log{worst}").read_text(errors="replace")
        raise AssertionError(
            f"exit codes {codes} (None: killed after {timeout_s} s); rank {worst} said:\n{log[-6000:]}"
        )
