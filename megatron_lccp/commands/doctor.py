"""`lccp doctor`: what would end or slow a run, before it is started.

In: a configuration or none, on one process, or on every rank of torchrun's or srun's job. Out: a line for each finding;
exit code 2 if one of them is a problem, else 0.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from megatron_lccp.commands.doctor_here import Finding, look_here, places
from megatron_lccp.config.tree import Config
from megatron_lccp.text import count_text

ALONE = (
    "one process; on all nodes start it as srun --ntasks-per-node=8 .venv/bin/lccp doctor, or as "
    "torchrun --nnodes=N --nproc-per-node=8 --node-rank=K --master-addr=HOST -m megatron_lccp.cli doctor"
)
REDUCED_BYTES = {"cuda": 256 * 2**20, "cpu": 16 * 2**20}
LINK_BYTES = {"cuda": 64 * 2**20, "cpu": 8 * 2**20}


def doctor(config: Config | None, as_json: bool) -> int:
    """Print what was found, from one rank; returns the exit code, the same on all ranks."""
    from megatron_lccp.commands.doctor_nodes import ranks_from_slurm

    ranks_from_slurm()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        found, tells = [*look_here(config, 1), Finding("not run", "nodes", ALONE)], True
    else:
        found, tells = _between_ranks(config)
    problems, warnings = (sum(f.state == state for f in found) for state in ("problem", "warning"))
    code = 2 if problems else 0
    if tells and as_json:
        told: dict[str, Any] = {"findings": [dataclasses.asdict(f) for f in found], "exit_code": code}
        print(json.dumps(told, indent=1), flush=True)
    elif tells:
        for finding in found:
            print(finding)
        print(f"lccp doctor: {count_text(problems, 'problem')}, {count_text(warnings, 'warning')}", flush=True)
    return code


def _between_ranks(config: Config | None) -> tuple[list[Finding], bool]:
    """(findings of the whole job, whether this rank is to print them)."""
    from megatron_lccp.commands import doctor_nodes as between
    from megatron_lccp.parallel.groups import start_ranks, stop_ranks

    device = start_ranks(timeout_s=180)
    import torch.distributed as dist

    nodes = between.Nodes()
    found = between.together(nodes, look_here(config, nodes.ranks_here) if nodes.leads else [])
    found += between.all_reduce(nodes, device, REDUCED_BYTES[device.type])
    found += between.links(nodes, device, LINK_BYTES[device.type])
    found += between.clocks(nodes)
    for about, directory, _ in places(config) if config is not None else []:
        found += between.same_directory(nodes, about, Path(directory))
    told: list[Any] = [found]  # some of them are known to one rank alone
    dist.broadcast_object_list(told, src=0)
    tells = dist.get_rank() == 0
    stop_ranks()
    return told[0], tells
