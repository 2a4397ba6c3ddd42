"""What two ranks do for tests/functional/test_doctor.py: they pass for two nodes, and one of them is not well."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_lccp.commands import doctor_nodes as between
from megatron_lccp.commands.doctor_here import Finding
from megatron_lccp.parallel.groups import start_ranks, stop_ranks


def two_nodes(shared: Path) -> dict[str, list[Finding]]:
    """Findings by what is wrong on the second node; the first rank's."""
    os.environ["SLURMD_NODENAME"] = f"node{os.environ['RANK']}"
    device = start_ranks(timeout_s=120)
    nodes, second, now = between.Nodes(), dist.get_rank() == 1, time.time
    found = {}

    def here(version: str, speed: str) -> list[Finding]:
        return [Finding("ok", "versions", f"torch {version}"), Finding("ok", "disk", f"writes {speed} GB/s")]

    found["alike"] = between.together(nodes, here("2.13.0", "1.5" if second else "2.5"))
    found["another torch"] = between.together(nodes, here("2.13.0" if second else "2.13.0+cpu", "2.5"))
    found["well"] = [
        *between.all_reduce(nodes, device, 2**20), *between.links(nodes, device, 2**20), *between.clocks(nodes),
        *between.same_directory(nodes, "dir", shared / "of a run"),
    ]  # fmt: skip
    for name, off_s in (("5 s ahead", 5.0), ("an hour behind", -3600.0)):
        with mock.patch.object(time, "time", lambda off_s=off_s: now() + (off_s if second else 0.0)):
            found[name] = list(between.clocks(nodes))

    real = dist.all_reduce

    def wrong(tensor: torch.Tensor, *more, **settings):
        done = real(tensor, *more, **settings)
        if second and tensor.numel() > 1:
            tensor[7] += 1
        return done

    with mock.patch.object(dist, "all_reduce", wrong):
        found["wrong sums"] = list(between.all_reduce(nodes, device, 2**20))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(between, "SEEN_WITHIN_S", 0.5))
        if second:
            stack.enter_context(mock.patch.object(os, "listdir", lambda path: []))
        found["blind"] = list(between.same_directory(nodes, "dir", shared))
    found["left"] = [Finding("problem", "left", path.name) for path in shared.iterdir()]
    stop_ranks()
    return found
