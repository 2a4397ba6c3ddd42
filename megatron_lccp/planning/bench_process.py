"""Jobs on one GPU, each in a process of its own: ways of the bench (bench_way.py), and of the parity (parity.py).

    python -m megatron_lccp.planning.bench_process JOB OPTIONS     # as bench_rows.py starts it, OPTIONS being JSON

In: the name of a job and its options. Out: its rows (dicts of plain values), which it prints as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def main(job: str, options: dict[str, Any]) -> None:
    """What the process does."""
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()  # before what follows imports Megatron-Core
    from megatron_lccp.planning import bench_way, parity

    rows = {"bench": bench_way.measure_way, "parity": parity.measure}[job](argparse.Namespace(**options))
    for row in rows:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1], json.loads(sys.argv[2]))
    except KeyboardInterrupt:  # who started it says so
        sys.exit(130)
