"""Kill a training again and again, start the same command again, and say whether anything is lost, altered or left.

    python tools/kill_loop.py [CONFIG] [--key=value ...] [--kills N] [--minutes M] [--record FILE]

In: a configuration (default: examples/tiny_moe.yaml, cut down to a training of a few seconds), which trains under
tools/torchrun.py. One run is left undisturbed. Others lose a rank, all ranks, the launcher, or all processes at once to
SIGKILL: in a save, in a window, at the start, or at any moment. The same command follows, until it is done. Out: a line
for each kill, and a record that adds up over calls. It counts

- differences: steps, rows and the tensors of the last checkpoint (model and optimizer), bit by bit, against the
  undisturbed run; and a command that refused or failed;
- leftovers: processes that are still there a minute after the kill, and files that are still there when the run is done
  (drafts, locks, folders of building).

Ctrl-C ends the loop; what it has counted is in the record. Exit codes: 0 nothing found, 1 something, 2 a bad argument.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from same_run import differences, rows_of, steps_of
from torch.distributed.checkpoint import TensorStorageMetadata

from megatron_lccp.files import write_whole
from megatron_lccp.parallel.compat import MEGATRON_VERSION
from megatron_lccp.records.store import RunStore
from megatron_lccp.weights.sharded import CheckpointError, ShardedReader, read_about, read_metadata

ROOT = Path(__file__).resolve().parents[1]
AIMS = ("save", "window", "start", "anywhere")
VICTIMS = ("rank 0", "another rank", "all ranks", "launcher", "a helper", "rank 0 and launcher", "everything")
"""A helper is whatever else a start has started: writers of saves beside the training, W&B's service."""
GONE_S = 60.0
"""What a kill leaves running has so long to end."""
LEFT = ("*.tmp", "*.partial", ".lock", "*.lock", ".building-*")
"""What a run that is done leaves nothing of."""
MARK = "LCCP_KILL_LOOP"
"""Variable that tells the processes of one start from all others, whoever started them."""
SOURCES = "megatron_lccp.data.sources"
MONITORS = "megatron_lccp.monitors"


def small(work: Path) -> list[str]:
    """What makes the example a training of a few seconds: 12 steps, 6 saves, windows at 0, 4, 8 and 12."""
    sizes = {
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
        "ffn_hidden_size": 64, "moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 64,
        "num_moe_experts": 4,
    }  # fmt: skip
    sources = {
        "code": {"class_path": f"{SOURCES}.PythonStdlib", "init_args": {"max_bytes": 300_000}},
        "people": {"class_path": f"{SOURCES}.Biographies", "init_args": {"count": 60, "people_per_document": 3}},
    }
    stage = {
        "tokens": 12 * 512, "context_tok": 128, "global_batch_tok": 512, "lr": 1e-3,
        "mixture": {"all": {"sources": {"code": 1.0, "people": 1.0}}},
    }  # fmt: skip
    heads = {"lengths_tok": [96, 128], "depths": [0.0, 0.5, 1.0], "samples": 2, "haystacks": ["code"]}
    monitors = [
        {"class_path": f"{MONITORS}.CorpusPPL", "init_args": {"length_tok": 64, "sequences": 4, "every": {"steps": 4}}},
        {"class_path": f"{MONITORS}.RetrievalHeads", "init_args": {**heads, "every": {"steps": 4}}},
    ]
    fields = {
        "model.init_from": None, "training.precision": "fp32", "megatron.transformer": sizes, "data.dir": str(work / "data"),
        "data.sources": sources, "stages": {"lccp": stage}, "monitors": monitors, "checkpoint.every": {"steps": 2},
        "checkpoint.keep": 2, "wandb.mode": "disabled",
    }  # fmt: skip
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in fields.items()]


@dataclass
class Record:
    """What all calls have counted."""

    path: Path
    kills: int = 0
    runs: int = 0
    """Those that were killed at least once, came to their end and were compared."""
    by_aim: dict[str, int] = field(default_factory=dict)
    by_victim: dict[str, int] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    slowest_end_s: float = 0.0
    """Longest time from a kill to the end of the last process of the start."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """When, with which versions, how many kills."""

    @classmethod
    def read(cls, path: Path) -> Record:
        return cls(path, **json.loads(path.read_text())) if path.exists() else cls(path)

    def save(self) -> None:
        content = {name: value for name, value in vars(self).items() if name != "path"}
        write_whole(self.path, lambda draft: draft.write_text(json.dumps(content, indent=1) + "\n"))

    def count(self, aim: str, victim: str) -> None:
        self.kills += 1
        self.calls[-1]["kills"] += 1
        for counts, name in ((self.by_aim, aim), (self.by_victim, victim)):
            counts[name] = counts.get(name, 0) + 1
        self.save()

    def __str__(self) -> str:
        ends = f"the slowest end took {self.slowest_end_s:.1f} s"
        return (
            f"{self.kills} kills in {self.runs} runs, {len(self.differences)} differences, {len(self.leftovers)} "
            f"leftovers; {ends}"
        )


class Start:
    """One start of the command, and all processes that come of it."""

    all: list[Start] = []

    def __init__(self, command: Sequence[str], run: Path, ranks: int):
        Start.all.append(self)
        self.mark, self.run = f"{os.getpid()}-{len(Start.all)}", run
        self.log = run.with_name(f"{run.name}.log")
        launcher = [sys.executable, str(ROOT / "tools/torchrun.py"), "--nproc-per-node", str(ranks)]
        environment = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with self.log.open("ab") as stream:
            self.said = stream.tell()
            self.began = time.monotonic()
            self.process = subprocess.Popen(
                [*launcher, "--master-port", str(free_port()), *command], stdout=stream, stderr=stream, cwd=ROOT,
                env=environment, start_new_session=True,
            )  # fmt: skip

    def processes(self) -> dict[int, str]:
        """Process id -> what it is: `launcher`, `rank N`, or its command line."""
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):  # it ends meanwhile, or is another user's
                environment = (folder / "environ").read_bytes().split(b"\0")
                if f"{MARK}={self.mark}".encode() not in environment:
                    continue
                if (folder / "stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X"):
                    continue
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                rank = next((v[5:].decode() for v in environment if v.startswith(b"RANK=")), None)
                mine = int(folder.name) == self.process.pid
                is_rank = rank is not None and "megatron_lccp.cli train" in command
                found[int(folder.name)] = "launcher" if mine else f"rank {rank}" if is_rank else command[:200]
        return found

    def new_text(self) -> str:
        with self.log.open("rb") as stream:
            stream.seek(self.said)
            return stream.read().decode(errors="replace")

    def drafts(self) -> set[str]:
        folder = self.run / "checkpoints"
        return {path.name for path in folder.glob("step-*.tmp")} if folder.is_dir() else set()

    def wait_for(self, aim: str, random_: random.Random, usual_start_s: float, usual_s: float) -> bool:
        """Wait for the moment that is aimed at; False if the command ended before it came."""
        if aim in ("start", "anywhere"):
            until = self.began + random_.uniform(0.0, usual_start_s if aim == "start" else usual_s)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0.0, until - time.monotonic()))
            return self.process.poll() is None
        left = random_.choice((1, 1, 2, 3))  # not always the first save or window of a start
        drafts, until = self.drafts(), self.began + limit_s(usual_s)  # those of a save before go when it resumes
        while self.process.poll() is None and time.monotonic() < until:
            if aim == "save":
                before, drafts = drafts, self.drafts()
                left -= len(drafts - before)
            if left <= 0 or (aim == "window" and self.new_text().count("measuring ") >= left):
                time.sleep(random_.choice((0.0, random_.uniform(0.0, 0.3))))
                return self.process.poll() is None
            time.sleep(0.003)
        return False

    def kill(self, victim: str) -> list[str]:
        """SIGKILL; returns what was there to be killed."""
        processes = self.processes()
        ranks = {pid: name for pid, name in processes.items() if name.startswith("rank ")}
        chosen = {
            "rank 0": [pid for pid, name in ranks.items() if name == "rank 0"],
            "another rank": [pid for pid, name in ranks.items() if name != "rank 0"][-1:],
            "all ranks": list(ranks),
            "launcher": [self.process.pid],
            "a helper": [pid for pid in processes if pid not in ranks and pid != self.process.pid][-1:],
            "rank 0 and launcher": [self.process.pid, *(pid for pid, name in ranks.items() if name == "rank 0")],
            "everything": list(processes),  # of this start, whatever it is
        }[victim]
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return [processes.get(pid, "launcher") for pid in chosen]

    def end(self, since: float) -> tuple[float, list[str]]:
        """Wait for the end of all processes: seconds since a moment, and what is left after GONE_S, which is killed."""
        while left := self.processes():
            if time.monotonic() - since > GONE_S:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                break
            self.process.poll()  # a zombie of ours is none of its own
            time.sleep(0.05)
        self.process.wait()
        return time.monotonic() - since, list(left.values())


def limit_s(usual_s: float) -> float:
    """After so long, a run that usually takes `usual_s` is taken for one that never ends."""
    return 300.0 + 20.0 * usual_s


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Loop:
    """Runs that are killed, and what they are compared with."""

    def __init__(self, args: argparse.Namespace, overrides: Sequence[str], record: Record):
        self.args, self.record, self.work = args, record, args.work.resolve()
        self.random = random.Random(args.seed)
        config = args.config or str(ROOT / "examples/tiny_moe.yaml")
        self.fields = [config, *(overrides if args.config else [*small(self.work), *overrides])]
        self.usual_start_s, self.usual_s = 10.0, 20.0
        self.found: list[str] = []
        self.until = time.monotonic() + 60 * args.minutes

    def command(self, run: Path) -> list[str]:
        return ["-m", "megatron_lccp.cli", "train", *self.fields, f"--dir={run}"]

    def say(self, text: str) -> None:
        print(f"kill_loop: {text}", flush=True)

    def finding(self, kind: list[str], text: str) -> None:
        kind.append(text)
        self.found.append(text)
        self.say(f"FOUND: {text}")
        self.record.save()

    def prepare(self) -> None:
        command = [sys.executable, "-m", "megatron_lccp.cli", "prepare", *self.fields]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr.strip() or done.stdout.strip())

    def undisturbed(self) -> Path:
        """The run that nothing befalls."""
        if self.args.undisturbed:
            return self.args.undisturbed
        run = self.work / "undisturbed"
        shutil.rmtree(run, ignore_errors=True)
        start = Start(self.command(run), run, self.args.ranks)
        first_s = None
        while start.process.poll() is None:
            if first_s is None and (run / "steps.jsonl").is_file():
                first_s = time.monotonic() - start.began
            time.sleep(0.05)
        if start.process.returncode:
            sys.exit(f"kill_loop: the undisturbed run failed, see {start.log}:\n{start.new_text()[-2000:]}")
        self.usual_s = time.monotonic() - start.began
        self.usual_start_s = first_s or self.usual_s
        self.say(f"undisturbed: {self.usual_s:.1f} s, the first step after {self.usual_start_s:.1f} s")
        return run

    def job(self, number: int, undisturbed: Path) -> None:
        """One run, killed `--kills-per-run` times, then let to its end and compared."""
        run = self.work / f"run-{number}"
        for path in (run, run.with_name(f"{run.name}.log")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        killed = 0
        before: threading.Thread | None = None  # watches the end of a start while the next one runs
        while True:
            start = Start(self.command(run), run, self.args.ranks)
            turn = self.record.calls[-1]["kills"]
            aim, victim = (names[turn % len(names)] for names in (self.args.aims, self.args.victims))
            last = killed >= self.args.kills_per_run or self.is_over()
            hit = not last and start.wait_for(aim, self.random, self.usual_start_s, self.usual_s)
            if not hit:
                break
            in_draft = aim == "save" and bool(start.drafts())
            while not (struck := start.kill(victim)):  # there may be no helper, and no rank at the very start
                victim = "another rank" if victim == "a helper" else "launcher"
            since = time.monotonic()
            if before:
                before.join()
                before = None
            killed += 1
            self.record.count(aim, victim)
            step = max((int(path.name[5:13]) for path in (run / "checkpoints").glob("step-*")), default=0)
            where = f"in the draft of a save near step {step}" if in_draft else f"aimed at: {aim}, after save {step}"
            self.say(f"kill {self.record.kills}, run {number}: {', '.join(struck)}; {where}")
            if "rank 0" in victim and self.random.random() < 0.5:
                # The next start comes at once, while others of this one still end.
                before = threading.Thread(target=self.ended, args=(start, since))
                before.start()
            else:
                self.ended(start, since)
        with contextlib.suppress(subprocess.TimeoutExpired):
            start.process.wait(limit_s(self.usual_s))
        code = start.process.poll()
        if before:
            before.join()
        self.ended(start, time.monotonic())
        self.record.runs += killed > 0
        self.compare(run, number, code, start, undisturbed)
        self.record.save()

    def is_over(self) -> bool:
        return self.record.calls[-1]["kills"] >= self.args.kills or time.monotonic() > self.until

    def ended(self, start: Start, since: float) -> None:
        seconds, left = start.end(since)
        if seconds > self.record.slowest_end_s:
            self.record.slowest_end_s = round(seconds, 1)
            self.say(f"{start.run.name}: its last process ended {seconds:.1f} s after the kill")
        for name in left:
            self.finding(self.record.leftovers, f"{start.run.name}: {GONE_S:.0f} s after the kill: {name}")

    def compare(self, run: Path, number: int, code: int | None, start: Start, undisturbed: Path) -> None:
        before = len(self.found)
        if code != 0:
            said = " | ".join(start.new_text().strip().splitlines()[-3:])
            how = "did not end" if code is None else f"ended with {code}"
            self.finding(self.record.differences, f"run {number}: the command {how}: {said[:500]}")
        else:
            for text in different(undisturbed, run):
                self.finding(self.record.differences, f"run {number}: {text}")
            for path in left_in(run, self.work / "data"):
                self.finding(self.record.leftovers, f"run {number}: {path}")
        if len(self.found) == before:
            shutil.rmtree(run)
            start.log.unlink()
            self.say(f"run {number}: the same as the undisturbed one; so far {self.record}")
        else:
            self.say(f"run {number}: kept in {run}")


def different(one: Path, other: Path) -> Iterator[str]:
    """What tells two runs apart: steps, rows, and the last checkpoint."""
    stores = RunStore(one), RunStore(other)
    for name, read in (("steps", steps_of), ("rows", rows_of)):
        yield from (f"{name}: {text}" for text in differences(read(stores[0]), read(stores[1])))
    if not (other / "report.html").is_file() and (one / "report.html").is_file():
        yield "no report"
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (one, other)]
    if names[0] != names[1]:
        yield f"checkpoints: {', '.join(names[0])} undisturbed, {', '.join(names[1])} here"
        return
    if not names[0]:
        return
    first, second = (run / "checkpoints" / names[0][-1] for run in (one, other))
    try:
        positions = [read_about(path)["position"] for path in (first, second)]
        tensors = [tensors_of(path) for path in (first, second)]
    except CheckpointError as error:
        yield str(error)
        return
    if positions[0] != positions[1]:
        yield f"position: {positions[0]} undisturbed, {positions[1]} here"
    if tensors[0].keys() != tensors[1].keys():
        yield f"tensors: {', '.join(sorted(tensors[0].keys() ^ tensors[1].keys()))} are in one alone"
    for name in sorted(tensors[0].keys() & tensors[1].keys()):
        if not torch.equal(as_bytes(tensors[0][name]), as_bytes(tensors[1][name])):
            yield f"{name} differs in the last checkpoint"


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, the optimizer's among them."""
    reader, described = ShardedReader(path), read_metadata(path).state_dict_metadata
    reader.tensors = {
        name: (tuple(of.size), of.properties.dtype)
        for name, of in described.items()
        if isinstance(of, TensorStorageMetadata)
    }
    reader.check_files(lambda done, total: None)
    return {name: reader.read(name) for name in reader.tensors}


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def left_in(*folders: Path) -> list[str]:
    """Files and folders that a run which is done should have left nothing of."""
    found = {path for folder in folders for pattern in LEFT for path in folder.rglob(pattern)}
    return sorted(str(path) for path in found)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="kill_loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file; its data are prepared where they are not"
    )
    parser.add_argument("--kills", type=int, default=10, help="kills of this call (default: 10)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no kill after so many minutes")
    parser.add_argument("--kills-per-run", type=int, default=5, help="so often, if it does not end before (default: 5)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the training (default: 2)")
    parser.add_argument("--aims", nargs="+", choices=AIMS, default=list(AIMS), help="when, in turns (default: all)")
    parser.add_argument(
        "--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS), help="whom, in turns (default: all)"
    )
    parser.add_argument("--seed", type=int, help="draw the same moments again")
    parser.add_argument("--work", type=Path, default=Path("runs/kill_loop"), help="folder (default: runs/kill_loop)")
    parser.add_argument("--record", type=Path, help="what is counted (default: record.json in --work)")
    parser.add_argument("--undisturbed", type=Path, help="a run of the same configuration to compare with")
    args, overrides = parser.parse_known_args(argv)
    if args.config and args.config.startswith("-"):
        parser.error(f"CONFIG: {args.config} is none")
    if odd := [text for text in overrides if not text.startswith("--") or "=" not in text]:
        parser.error(f"does not know {' '.join(odd)}")
    if args.kills < 1 or args.kills_per_run < 1 or args.ranks < 1:
        parser.error("--kills, --kills-per-run, --ranks: should be at least 1")
    return args, overrides


def main(argv: Sequence[str]) -> int:
    args, overrides = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    record = Record.read(args.record or args.work / "record.json")
    versions = {"python": sys.version.split()[0], "megatron-core": MEGATRON_VERSION}
    record.calls.append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **versions, "kills": 0})
    loop = Loop(args, overrides, record)
    try:
        loop.prepare()
        undisturbed = loop.undisturbed()
        number = 0
        while not loop.is_over():
            number += 1
            loop.job(number, undisturbed)
    except KeyboardInterrupt:
        loop.say("stopped")
    finally:
        for start in Start.all:
            start.kill("everything")
    record.save()
    loop.say(f"all calls: {record}; {dict(Counter(record.by_aim))}, {dict(Counter(record.by_victim))}")
    return 1 if loop.found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
