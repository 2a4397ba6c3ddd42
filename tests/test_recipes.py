"""The industrial recipes: each parses, is the published one, fits where it says, costs what it says, and would start.

And its Slurm launcher: what is called, and that a job that reaches its time saves and asks for its place again.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_lccp.cli import main
from megatron_lccp.config.load import parse_config
from megatron_lccp.data.stages import mixture_weights, stage_steps
from megatron_lccp.planning import dry_run
from megatron_lccp.planning.plan import GPUS, make_plan, reached
from megatron_lccp.planning.plan_table import GIB

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(
    path for path in (ROOT / "examples").glob("*.yaml") if "tiny" not in path.name and "attach" not in path.name
)
NAMES = [path.stem for path in RECIPES]
COMMAND = re.compile(r"`lccp plan (\S+) --ranks (\d+) --mfu ([\d.]+)`")
PREDICTED = re.compile(
    r"#   ([\d.]+) s a step, ([\d.]+) days, ([\d,]+) GPU-hours; ([\d.]+) of (\d+) GiB on the worst rank;\n"
    r"#   monitors ([\d.]+)% of the training's FLOPs"
)


def test_there_are_five() -> None:
    assert NAMES == [
        "hunyuan_a13b_256k", "hunyuan_a13b_64k", "prolong_llama3_8b_512k", "prolong_llama3_8b_64k", "qwen3_30b_a3b_64k"
    ]  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_header_says_what_plan_predicts_and_it_fits(path: Path) -> None:
    text = path.read_text()
    file, ranks, mfu = COMMAND.search(text).groups()
    assert file == f"examples/{path.name}" and f"Hardware: {ranks} H100 of 80 GB ({int(ranks) // 8} nodes" in text
    plan = make_plan(parse_config(path), file, int(ranks), float(mfu), "H100")
    took = list(plan["gpus"]["H100"]["stages"].values())[-1]
    worst = plan["worst_rank"]["total_bytes"] / GIB
    share = sum(m["share_of_training"] for m in plan["monitors"])
    says = (f"{took['step_s']:.1f}", f"{took['days']:.1f}", f"{took['gpu_hours']:,.0f}", f"{worst:.1f}", "79")
    assert PREDICTED.search(text).groups() == (*says, f"{100 * share:.2f}")
    assert took["step_s"] < plan["stop"]["within_s"]  # for a signal is heard between two steps
    assert worst < 0.75 * GPUS["H100"].memory_gib  # room for what the estimate leaves out
    assert 0 < share < 0.02 and len(plan["monitors"]) == 4


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_dry_run_finds_nothing_but_what_the_user_supplies(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From an empty directory: no data, no weights. One layer a chunk, the last rank alone; users run all of it."""
    ranks, p = int(COMMAND.search(path.read_text())[2]), parse_config(path).parallel
    depth = f"--megatron.transformer.num_layers={p.pipeline * (p.virtual_pipeline or 1)}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(dry_run, "ranks_to_run", lambda config, ranks: [ranks - 1])
    assert main(["train", str(path), "--dry-run", "--ranks", str(ranks), depth]) == 2
    said = capsys.readouterr()
    found = [line.removeprefix(f"lccp: {path}: ") for line in said.err.splitlines() if line.startswith("lccp: ")]
    assert len(found) == 2, said.err
    assert "manifest.json: is missing; run `lccp prepare CONFIG`" in found[0] and "model.init_from" in found[1]
    assert f"on {ranks} ranks" in said.out and "failed" not in said.out and not any(tmp_path.iterdir())


def test_the_papers_numbers() -> None:
    config = parse_config(ROOT / "examples/hunyuan_a13b_64k.yaml")
    (stage,) = config.stages.values()
    assert (stage.tokens, stage.global_batch_tok, stage.context_tok) == (200e9, 16 * 2**20, 65536)
    assert (stage.lr, stage.lr_schedule, stage.rope_base) == (1.2e-5, "constant", 2e6)
    weights = mixture_weights(stage)
    table_2 = {"common_crawl": 0.363, "books": 0.286, "arxiv": 0.240, "code": 0.108, "wikipedia": 0.003}
    assert weights == pytest.approx({"pretraining": 0.25, **{name: 0.75 * w for name, w in table_2.items()}})
    (grid,) = (monitor for monitor in config.monitors if monitor.name == "InterferenceGrid")
    cells = [(cell.before_tok, cell.after_tok) for cell in grid.spec().cells(0)]
    assert sum(after == 16384 for _, after in cells) > 5  # Figure 9: the distance is 16K
    assert max(before for before, _ in cells) > 56000 and max(after for _, after in cells) > 48000  # Figure 8
    assert max(map(sum, cells)) < stage.context_tok - 1024


def test_256k_starts_from_the_last_checkpoint_of_64k() -> None:
    first, second = (parse_config(ROOT / f"examples/hunyuan_a13b_{k}k.yaml") for k in (64, 256))
    (stage,) = first.stages.values()
    assert second.model.init_from == f"{first.dir}/checkpoints/step-{stage_steps(stage):08d}"
    assert second.model.family == first.model.family and second.data.tokenizer == first.data.tokenizer


def test_prolongs_numbers_and_one_run_on_two_layouts() -> None:
    first, second = (parse_config(ROOT / f"examples/prolong_llama3_8b_{k}k.yaml") for k in (64, 512))
    assert first.stages == second.stages and (first.dir, first.data, first.model) == (
        second.dir, second.data, second.model
    )  # fmt: skip
    assert first.parallel != second.parallel
    assert list(reached(first).stages) == ["64k"] and list(reached(second).stages) == ["64k", "512k"]
    assert [stage_steps(stage) for stage in first.stages.values()] == [5000, 2500]
    at = {
        name: (s.context_tok, s.rope_base, s.lr, s.min_lr / s.lr, s.lr_schedule, s.warmup_tokens / s.tokens)
        for name, s in first.stages.items()
    }
    assert at == {
        "64k": (65536, 8e6, 1e-5, pytest.approx(0.1), "cosine", 0.1),
        "512k": (524288, 1.28e8, 5e-6, pytest.approx(0.1), "cosine", 0.1),
    }
    short = dict(
        fineweb_edu=0.1, fineweb=0.1, stackexchange=0.04, wikipedia=0.04, tulu_v2=0.03, arxiv=0.03, openwebmath=0.03,
        textbooks=0.03,
    )  # fmt: skip
    assert mixture_weights(first.stages["64k"]) == pytest.approx({"repos_64k": 0.3, "books_64k": 0.3, **short})
    long = dict(repos_512k=0.15, repos_64k=0.15, books_512k=0.05, books_64k=0.25)
    assert mixture_weights(first.stages["512k"]) == pytest.approx({**long, **short})


class Slurm:
    """A batch job whose srun, scontrol and scancel write down how they are called; srun ends when it is told to."""

    def __init__(self, directory: Path, srun_ends_with: int):
        self.log, self.programs = directory / "calls", directory / "bin"
        self.programs.mkdir()
        self.log.touch()
        stop = directory / "stop"
        self._program("srun", f'while [[ ! -e "{stop}" ]]; do sleep 0.05; done; exit {srun_ends_with}')
        shown = 'hostnames) printf "%s\\n" node7 node8 ;; job) echo "JobState=RUNNING StartTime=2026-11-30T08:00:00" ;;'
        self._program("scontrol", f'case "${{*: -2:1}}" in {shown} esac')
        self._program("scancel", f'touch "{stop}"')
        self.stop = stop

    def _program(self, name: str, does: str) -> None:
        path = self.programs / name
        path.write_text(
            "#!/bin/bash\n"
            f'printf "%s|" {name} "$NNODES" "$MASTER_ADDR" "$MASTER_PORT" "$@" >>"{self.log}"\n'
            f'echo >>"{self.log}"\n{does}\n'
        )
        path.chmod(0o755)

    def start(self, script: Path, *arguments: str) -> subprocess.Popen:
        """As Slurm does: a copy of the script, from elsewhere."""
        copy = self.programs.parent / "slurm_script"
        copy.write_bytes(script.read_bytes())
        environment = {
            **os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "4321", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]",
        }  # fmt: skip
        for name in ("LCCP_REPO", "MASTER_PORT"):
            environment.pop(name, None)
        return subprocess.Popen(["bash", copy, *arguments], cwd=self.programs.parent, env=environment)

    def calls(self) -> list[list[str]]:
        return [line.split("|")[:-1] for line in self.log.read_text().splitlines()]

    def called(self, name: str) -> list[str]:
        """The first call of a program, once it was made."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if found := [call for call in self.calls() if call[0] == name]:
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"{name} was not called: {self.calls()}")


@pytest.mark.parametrize("name", NAMES)
def test_launcher_starts_its_recipe_on_its_nodes(name: str, tmp_path: Path) -> None:
    script, text = ROOT / f"examples/slurm/{name}.sbatch", (ROOT / f"examples/{name}.yaml").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == int(COMMAND.search(text)[2])
    assert options["requeue"] == "" and options["signal"].startswith("B:USR1@") and options["ntasks-per-node"] == "1"
    slurm = Slurm(tmp_path, srun_ends_with=0)
    job = slurm.start(script, "--training.steps=5")
    call = slurm.called("srun")
    slurm.stop.touch()
    assert job.wait(30) == 0
    assert call[1:4] == ["2", "node7", "24321"]
    assert call[-3:] == [str(ROOT / "examples/pretrain_lccp.sh"), f"examples/{name}.yaml", "--training.steps=5"]
    assert not [c for c in slurm.calls() if "requeue" in c]


@pytest.mark.parametrize(("srun_ends_with", "requeued"), [(143, True), (0, False)], ids=["stopped", "done"])
def test_a_job_whose_time_is_up_lets_the_ranks_save_and_asks_for_its_place(
    srun_ends_with: int, requeued: bool, tmp_path: Path
) -> None:
    """Ranks that saved and stopped end with 143 (training/signals.py); a run that came to its end meanwhile needs no other job."""
    slurm = Slurm(tmp_path, srun_ends_with)
    job = slurm.start(ROOT / "examples/slurm/hunyuan_a13b_64k.sbatch")
    slurm.called("srun")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == srun_ends_with
    assert slurm.called("scancel")[-2:] == ["--signal=TERM", "4321"]
    assert [c[-2:] for c in slurm.calls() if "requeue" in c] == [["requeue", "4321"]] * requeued
