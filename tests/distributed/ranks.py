"""Run a job of tests/distributed/jobs.py on several ranks: one start per layout, many checks inside it.

In: how many ranks, the name of a job, its arguments. Out: what the job returned on each rank. A failing rank ends the
others, and the test with its error.
"""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(ranks: int, job: str, timeout_s: float = 240.0, **arguments: Any) -> list[Any]:
    """Results of `job(**arguments)`, one for each rank; `module.job` is one of another module in this folder."""
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch, "request")
        request.write_bytes(pickle.dumps((job, arguments)))
        environment = {
            **os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        processes = []
        for rank in range(ranks):
            log = Path(scratch, f"log{rank}").open("wb")
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.distributed.ranks", scratch],
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )  # fmt: skip
            )
        try:
            _wait(processes, timeout_s, scratch)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [pickle.loads(Path(scratch, f"result{rank}").read_bytes()) for rank in range(ranks)]


def _wait(processes: list[subprocess.Popen], timeout_s: float, scratch: str) -> None:
    end = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > end:
            break
        time.sleep(0.1)
    codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        worst = next((rank for rank, code in enumerate(codes) if code not in (None, 0)), 0)
        log = Path(scratch, f"log{worst}").read_text(errors="replace")
        raise AssertionError(
            f"exit codes {codes} (None: killed after {timeout_s} s); rank {worst} said:\n{log[-6000:]}"
        )


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    name, kwargs = pickle.loads((directory / "request").read_bytes())
    module, _, name = name.rpartition(".")
    result = getattr(importlib.import_module(f"tests.distributed.{module or 'jobs'}"), name)(**kwargs)
    (directory / f"result{os.environ['RANK']}").write_bytes(pickle.dumps(result))
