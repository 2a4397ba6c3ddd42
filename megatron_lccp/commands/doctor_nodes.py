"""What `lccp doctor` finds out between ranks and nodes: all-reduce, links, clocks, directories that all nodes see.

In: the ranks of torchrun's or srun's job, joined, and what each node found out about itself. Out: findings of the whole
job, the same on all ranks. Every rank calls everything here; where only one rank of a node acts, the others wait.
"""

from __future__ import annotations

import os
import re
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lccp.commands.doctor_here import GB, Finding
from megatron_lccp.text import count_text

PINGS = 9
CLOCK_WARNING_S, CLOCK_PROBLEM_S = 1.0, 60.0
SEEN_WITHIN_S = 10.0
"""A network file system may know for so long that there was no such file."""
SLOW_LINK = 0.5
"""A link is slow that is below this share of the median."""
SLOW_NCCL = 5 * GB
"""An all-reduce between nodes below this speed goes over sockets, not over the fabric (bytes a second)."""


def ranks_from_slurm() -> None:
    """Where srun started this rank and torchrun did not: the variables that torchrun would have set.

    Raises ValueError if node 0 is not known.
    """
    given = os.environ
    if "RANK" in given or "SLURM_PROCID" not in given or int(given.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    if "MASTER_ADDR" not in given:
        nodes = given.get("SLURM_STEP_NODELIST", given.get("SLURM_JOB_NODELIST", ""))
        try:
            done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            given["MASTER_ADDR"] = done.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            raise ValueError("MASTER_ADDR: scontrol does not say which node is the first; set it") from error
    given.setdefault("MASTER_PORT", str(20000 + int(given.get("SLURM_JOB_ID", "0")) % 10000))
    given["RANK"], given["WORLD_SIZE"] = given["SLURM_PROCID"], given["SLURM_STEP_NUM_TASKS"]
    seen = torch.cuda.device_count()  # srun may show each task its own GPU alone
    given["LOCAL_RANK"] = "0" if seen == 1 else given["SLURM_LOCALID"]


class Nodes:
    """The nodes of the job, by the host names of the ranks."""

    def __init__(self) -> None:
        self.host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(hosts, self.host)
        self.leaders = {host: hosts.index(host) for host in dict.fromkeys(hosts)}
        """Host -> its first rank."""
        self.ranks_here = hosts.count(self.host)
        self.leads = self.leaders[self.host] == dist.get_rank()
        """True on the first rank of each host."""
        self.gloo = dist.new_group(backend="gloo")


def together(nodes: Nodes, here: Sequence[Finding]) -> list[Finding]:
    """What the nodes found out about themselves, once where they agree, else by host."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, list(here) if nodes.leads else None)
    hosts = {host: told[rank] for host, rank in nodes.leaders.items()}
    alike: dict[tuple[str, str, str], list[tuple[str, Finding]]] = {}
    for host, findings in hosts.items():
        for finding in findings:  # numbers, such as speeds, differ from node to node
            key = finding.state, finding.about, re.sub(r"[\d.,]+", "#", finding.text)
            alike.setdefault(key, []).append((host, finding))
    found = []
    for where in alike.values():
        host, finding = where[0]
        same = len({f.text for _, f in where}) == 1
        on = f"all {len(hosts)} nodes" if len(where) == len(hosts) else _some([host for host, _ in where])
        said = "" if len(hosts) == 1 else f" ({on})" if same else f" ({host}; alike: {on})"
        found.append(Finding(finding.state, finding.about, finding.text + said))
    for about in ("versions", "gpu", "engine"):
        texts = {f.text for findings in hosts.values() for f in findings if f.about == about}
        if len(texts) > 1:
            found.append(Finding("problem", about, "nodes differ, see above: give all of them one environment"))
    return sorted(found, key=lambda finding: [f.about for f in here].index(finding.about) if here else 0)


def _some(hosts: Sequence[str]) -> str:
    return ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")


def all_reduce(nodes: Nodes, device: torch.device, count: int) -> Iterator[Finding]:
    """Whether a sum over all ranks is right, and its bus bandwidth: 2 (n - 1) / n of the bytes over the time."""
    ranks, on_gpu = dist.get_world_size(), device.type == "cuda"
    backend = "NCCL" if on_gpu else "gloo"
    values = torch.full((count // 4,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(values)
    right = torch.tensor([float((values == ranks * (ranks + 1) / 2).all())], device=device)
    dist.all_reduce(right, dist.ReduceOp.MIN)
    values.zero_()
    times = [_timed(lambda: dist.all_reduce(values), device) for _ in range(6)]
    took = torch.tensor([statistics.median(times[1:])], device=device, dtype=torch.float32)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    speed = 2 * (ranks - 1) / ranks * count / took.item()
    on = f"{backend}, {count_text(ranks, 'rank')} on {count_text(len(nodes.leaders), 'node')}"
    said = f"{on}: all-reduce of {count / 2**20:.0f} MiB at {speed / GB:.2f} GB/s"
    if not right.item():
        yield Finding(
            "problem", "nodes", f"{said}, and its sums are wrong: look at NCCL_DEBUG=INFO and the GPUs' errors"
        )
    elif on_gpu and len(nodes.leaders) > 1 and speed < SLOW_NCCL:
        remedy = "NCCL_DEBUG=INFO says which network it takes; NCCL_IB_HCA and NCCL_SOCKET_IFNAME choose it"
        yield Finding("warning", "nodes", f"{said}, as over sockets: {remedy}")
    else:
        yield Finding("ok", "nodes", said)


def links(nodes: Nodes, device: torch.device, count: int) -> Iterator[Finding]:
    """Speed from each node to the next, all at once; the slowest is named if it is slow. Nothing on one node."""
    leaders = list(nodes.leaders.values())
    if len(leaders) < 2:
        return
    group = dist.new_group(leaders)
    took = 0.0
    if nodes.leads:
        place = leaders.index(dist.get_rank())
        to, source = leaders[(place + 1) % len(leaders)], leaders[place - 1]
        mine, theirs = (torch.zeros(count // 4, device=device) for _ in range(2))

        def exchange() -> None:
            both = [dist.P2POp(dist.isend, mine, to, group), dist.P2POp(dist.irecv, theirs, source, group)]
            for request in dist.batch_isend_irecv(both):
                request.wait()

        took = statistics.median([_timed(exchange, device, group) for _ in range(4)][1:])
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, took)
    speeds = {host: count / told[rank] for host, rank in nodes.leaders.items()}
    median, slowest = statistics.median(speeds.values()), min(speeds, key=lambda host: speeds[host])
    said = f"from node to node {median / GB:.2f} GB/s"
    if speeds[slowest] < SLOW_LINK * median:
        before = list(speeds)[list(speeds).index(slowest) - 1]
        text = f"{said}, but {before} to {slowest} {speeds[slowest] / GB:.2f}: leave one of them out (--exclude) and look at it"
        yield Finding("warning", "links", text)
    else:
        yield Finding("ok", "links", f"{said}, the slowest {speeds[slowest] / GB:.2f} ({slowest})")


def clocks(nodes: Nodes) -> Iterator[Finding]:
    """How far the clock of each node is from that of the first, by messages back and forth."""
    leaders, rank = list(nodes.leaders.values()), dist.get_rank()
    offsets = dict.fromkeys(nodes.leaders, 0.0)
    value = torch.zeros(1, dtype=torch.float64)
    for host, other in nodes.leaders.items():
        if other == leaders[0] or rank not in (leaders[0], other):
            continue
        best = float("inf")
        for _ in range(PINGS):
            if rank == other:
                dist.recv(value, leaders[0], nodes.gloo)
                value[0] = time.time()
                dist.send(value, leaders[0], nodes.gloo)
                continue
            start = time.time()
            dist.send(value, other, nodes.gloo)
            dist.recv(value, other, nodes.gloo)
            if (took := time.time() - start) < best:
                best, offsets[host] = took, value.item() - (start + took / 2)
    told: list[Any] = [offsets]
    dist.broadcast_object_list(told, src=leaders[0])
    worst, off = max(told[0].items(), key=lambda item: abs(item[1]))
    if len(leaders) < 2:
        return
    said = f"of {len(leaders)} nodes at most {abs(off):.3f} s apart"
    if abs(off) > CLOCK_WARNING_S:
        state = "problem" if abs(off) > CLOCK_PROBLEM_S else "warning"
        text = f"{said} ({worst}): let chrony or ntpd set them; locks, make and munge go by them"
        yield Finding(state, "clocks", text)  # type: ignore[arg-type]  # mypy widens the literal
    else:
        yield Finding("ok", "clocks", said)


def same_directory(nodes: Nodes, about: str, directory: Path) -> Iterator[Finding]:
    """Whether the other nodes see what the first one writes there. Nothing on one node."""
    if len(nodes.leaders) < 2:
        return
    home = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    mark: list[Any] = [None]
    first = list(nodes.leaders.values())[0]
    if dist.get_rank() == first:
        path = home / f".lccp-doctor-{nodes.host}-{os.getpid()}-seen"
        try:
            path.write_text(nodes.host)
            mark = [str(path)]
        except OSError:
            pass  # the disk's own line says so
    dist.broadcast_object_list(mark, src=first)
    if mark[0] is None:
        return
    end, seen = time.monotonic() + SEEN_WITHIN_S, False
    while nodes.leads and not seen and time.monotonic() < end:
        seen = Path(mark[0]).name in os.listdir(Path(mark[0]).parent) if Path(mark[0]).parent.is_dir() else False
        time.sleep(0 if seen else 0.2)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, seen)
    if dist.get_rank() == first:
        Path(mark[0]).unlink(missing_ok=True)
    if blind := [host for host, rank in nodes.leaders.items() if not told[rank]]:
        text = f"{directory}: {_some(blind)} cannot see what {next(iter(nodes.leaders))} writes there"
        yield Finding("problem", about, f"{text}: it should lie on a file system that all nodes share")
    else:
        yield Finding("ok", about, f"{directory}: all {len(nodes.leaders)} nodes see it")


def _timed(run: Callable[[], object], device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """Seconds of a call that all ranks (of the group) start together."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(group)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
