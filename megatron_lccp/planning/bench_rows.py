"""Jobs on one GPU as whoever starts them sees it: rows, from a process of its own for each (bench_process.py).

In: the name of a job and its options. Out: its rows as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

PROCESS = "megatron_lccp.planning.bench_process"


def run_way(way: str, o: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one way as they come, measured in a process of its own; at `o.until_s` (of time.time) that is ended."""
    options = {**vars(o), "point": way}
    yield from rows_of("bench", options, {"way": way})


def rows_of(job: str, options: Mapping[str, Any], about: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a job as they come; `device: cpu` hides GPUs from it.

    If it fails, the last row is `about` with `failed`, which says how; what it printed besides is on stderr.
    """
    environment = dict(os.environ) | ({"CUDA_VISIBLE_DEVICES": ""} if options["device"] == "cpu" else {})
    late, until_s = threading.Event(), options.get("until_s")
    command = [sys.executable, "-m", PROCESS, job, json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(max(0.0, until_s - time.time()) if until_s else 0.0, end)
        if until_s:
            timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        except BaseException:  # Ctrl-C: none is left behind
            process.kill()
            raise
        finally:
            timer.cancel()
    if process.returncode:
        why = "its time was up" if late.is_set() else f"ended with {process.returncode}; see above"
        yield {**about, "failed": why}
