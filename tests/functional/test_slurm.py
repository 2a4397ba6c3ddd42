"""examples/slurm/pretrain_lccp.sbatch in a real Slurm of two nodes (tests/functional/slurm.py), where that is asked for.

Every job is the launcher itself on one CPU rank a node. It trains on and on, until the test has seen enough and lowers
training.steps in its YAML: what Slurm starts again reads that.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_lccp.weights.checkpoint import checkpoints_in
from tests.commands.test_wandb_sink import history
from tests.distributed.ranks import ROOT
from tests.functional.slurm import Slurm, why_not

pytestmark = [
    pytest.mark.once, pytest.mark.skipif(why_not() is not None, reason=f"no Slurm: {why_not()}"),
]  # fmt: skip
ENOUGH = 4
"""Steps that a start should have made before it is ended."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as directory:
        with Slurm(Path(directory)) as slurm:
            yield slurm
        assert not slurm.processes()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The launcher as cloned, with the environment of these tests; the sbatch file less the GPUs that no node has."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("examples/slurm/pretrain_lccp.sbatch", "examples/pretrain_lccp.sh", "tools/torchrun.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        lines = (ROOT / name).read_text().splitlines(keepends=True)
        (root / name).write_text("".join(line for line in lines if "gpus-per-node" not in line))
    (root / "tools/setup_env.sh").write_text(f'export LCCP_PYTHON="{sys.executable}" PYTHONPATH="{ROOT}"\n')
    (root / "array.sbatch").write_text(
        '#!/bin/bash\nexec bash "$LCCP_REPO/examples/slurm/pretrain_lccp.sbatch" "$RUNS/$SLURM_ARRAY_TASK_ID.yaml"\n'
    )
    return root


class Training:
    """A run: its YAML, which names its directory, and what is there by now."""

    def __init__(self, tiny_yaml: Path, directory: Path, name: str, **parallel: int) -> None:
        self.yaml, self.dir, self.log = directory / f"{name}.yaml", directory / name, directory / f"{name}.log"
        self.tree = yaml.safe_load(tiny_yaml.read_text())
        self.tree |= {"dir": str(self.dir), "monitors": [], "wandb": {"mode": "offline"}, "parallel": parallel}
        self.tree["checkpoint"] = {"every": {"steps": 100}, "keep": 1}
        self.tree["stages"]["base"]["tokens"] = 512 * 1_000_000
        self.yaml.write_text(yaml.safe_dump(self.tree))

    def end_after(self, step: int) -> None:
        self.tree["training"]["steps"] = step
        self.yaml.write_text(yaml.safe_dump(self.tree))

    @property
    def losses(self) -> dict[int, float]:
        path = self.dir / "steps.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert len(lines) == len({line["step"] for line in lines}), "a step is on record twice"
        return {line["step"]: line["loss"] for line in lines}

    @property
    def last(self) -> int:
        return max(self.losses, default=0)

    def check(self) -> None:
        """Every step is there once, on disk and in W&B, and nobody has printed a trace."""
        steps = list(range(1, self.last + 1))
        assert sorted(self.losses) == steps
        assert [path.name for path in checkpoints_in(self.dir / "checkpoints")] == [f"step-{self.last:08d}"]
        folders = (self.dir / "wandb").glob("offline-run-*")
        logged = [line for folder in folders for line in history(folder)[0] if "train/step" in line]
        assert sorted(line["train/step"] for line in logged) == steps
        assert "Traceback" not in self.log.read_text(), self.log.read_text()


def environment(repository: Path, runs: Path) -> dict[str, str]:
    return {
        "LCCP_REPO": str(repository), "RUNS": str(runs), "GPUS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def test_doctor_looks_at_both_nodes(slurm: Slurm, repository: Path, tmp_path: Path) -> None:
    """Started by srun alone; and so it says whether this Slurm is one of two nodes."""
    command = ["--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "megatron_lccp.cli", "doctor", "--json"]
    more = environment(repository, tmp_path) | {"PYTHONPATH": str(ROOT)}
    told = json.loads(slurm.call("srun", *command, timeout_s=240, **more))
    said = {finding["about"]: finding["text"] for finding in told["findings"]}
    assert "gloo, 2 ranks on 2 nodes" in said["nodes"] and "of 2 nodes at most" in said["clocks"] and "links" in said


def test_time_up_requeue_and_preemption_of_an_array(
    slurm: Slurm, repository: Path, tiny_yaml: Path, tmp_path: Path
) -> None:
    """Two jobs of an array: the time of one is up, the other is preempted; both save, come back, and go on as one."""
    tasks = {name: Training(tiny_yaml, tmp_path, name) for name in ("0", "1")}
    options = [
        "--array=0-1", "--nodes=1", "--ntasks-per-node=1", "--requeue", "--signal=B:USR1@600", "--time=30",
        f"--output={tmp_path}/%a.log", "--open-mode=append",
    ]  # fmt: skip
    array = slurm.submit(repository / "array.sbatch", options=options, **environment(repository, tmp_path))
    slurm.until(lambda: all(task.last >= ENOUGH for task in tasks.values()), "both train")
    jobs = {name: slurm.job(f"{array}_{name}") for name in tasks}
    # The one that has the number of the array, which a scancel or requeue by SLURM_JOB_ID would take for all of it.
    up = next(name for name, job in jobs.items() if job["JobId"] == array)
    other = next(name for name in tasks if name != up)

    slurm.call("scontrol", "update", f"JobId={array}_{up}", "TimeLimit=10")
    slurm.until(lambda: slurm.job(f"{array}_{up}")["Restarts"] == "1", "the time of one is up, and it is requeued")
    assert slurm.job(f"{array}_{other}")["JobState"] == "RUNNING" and "SIGTERM" not in tasks[other].log.read_text()
    slurm.call("scontrol", "update", f"JobId={array}_{up}", "TimeLimit=60")
    saved = {up: tasks[up].last}
    tasks[up].end_after(saved[up] + ENOUGH)

    urgent = repository / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 1\n")
    more = ["--partition=urgent", f"--nodelist={jobs[other]['NodeList']}", "--exclusive", "--output=/dev/null"]
    slurm.submit(urgent, options=more)
    slurm.until(lambda: slurm.job(f"{array}_{other}")["Restarts"] == "1", "the other is preempted, and it is requeued")
    saved[other] = tasks[other].last
    tasks[other].end_after(saved[other] + ENOUGH)
    slurm.until(lambda: all(slurm.job(f"{array}_{n}")["JobState"] == "COMPLETED" for n in tasks), "both are done")
    for name, task in tasks.items():
        assert f"resumed after step {saved[name]}" in task.log.read_text()
        assert task.last == saved[name] + ENOUGH
        task.check()
    common = sorted(tasks["0"].losses.keys() & tasks["1"].losses.keys())
    assert [tasks["0"].losses[step] for step in common] == [tasks["1"].losses[step] for step in common]


def test_the_loss_of_a_node_and_scancel(slurm: Slurm, repository: Path, tiny_yaml: Path, tmp_path: Path) -> None:
    """Two nodes: one is lost, the job comes back with it and goes on; then the user cancels it, and it saves."""
    run = Training(tiny_yaml, tmp_path, "two", expert=2)
    run.tree["checkpoint"] = {"every": {"steps": 2}, "keep": 1}
    run.yaml.write_text(yaml.safe_dump(run.tree))
    script = repository / "examples/slurm/pretrain_lccp.sbatch"
    options = ["--nodes=2", "--time=60", f"--output={run.log}"]
    job = slurm.submit(script, str(run.yaml), options=options, **environment(repository, tmp_path))
    slurm.until(lambda: run.last >= ENOUGH, "two nodes train")
    slurm.lose_node("n2")
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", "the job is requeued without the node")
    slurm.start_node("n2")
    slurm.until(lambda: "resumed after step" in run.log.read_text(), "it comes back")
    after = int(re.findall(r"resumed after step (\d+)", run.log.read_text())[-1])
    slurm.until(lambda: run.last >= after + ENOUGH, "it goes on")
    run.log.write_text("")  # what a rank says whose peer is gone is another test's
    slurm.call("scancel", job)
    slurm.until(lambda: slurm.job(job)["JobState"] == "CANCELLED", "it is cancelled")
    assert f"the same command resumes after step {run.last}" in run.log.read_text(), run.log.read_text()
    run.check()
