"""`lccp doctor`: what it says where all is well, what where something is not, and its rehearsal of `--gpu`."""

from __future__ import annotations

import json
import re
import resource
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lccp.commands import doctor_here
from megatron_lccp.commands.doctor_here import PAIRS, Finding, checkpoint_bytes, disk, limits, look_here, versions
from megatron_lccp.config.load import parse_config
from megatron_lccp.config.tree import Config
from megatron_lccp.planning.parity import BF16, FP32, broken, compared
from megatron_lccp.planning.plan import make_plan
from tests.distributed.ranks import ROOT, lccp, run_ranks

MIB = 2**20


def states(found: list[Finding]) -> dict[str, str]:
    return {finding.about: finding.state for finding in found}


def test_one_line_each_and_an_exit_code(tiny_yaml: Path, tmp_path: Path) -> None:
    done = lccp("doctor", str(tiny_yaml), f"--dir={tmp_path / 'run'}")
    assert done.returncode == 0 and not done.stderr, done.stdout
    *lines, summary = done.stdout.splitlines()
    said = [re.split(r"  +", line)[:2] for line in lines]
    assert [about for _, about in said] == ["versions", "gpu", "engine", "limits", "dir", "data.dir", "nodes"]
    assert {state for state, about in said if "dir" not in about} == {"ok", "not run"}  # a disk may be slow here
    assert "srun" in lines[-1] and "torchrun" in lines[-1]
    assert summary.startswith("lccp doctor: 0 problems, ")
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".lccp*"))

    full = lccp("doctor", str(tiny_yaml), f"--dir={tmp_path / 'run'}", "--checkpoint.keep=100000000", "--json")
    told = json.loads(full.stdout)
    assert full.returncode == told["exit_code"] == 2
    (problem,) = [each for each in told["findings"] if each["state"] == "problem"]
    assert problem["about"] == "dir" and "lower checkpoint.keep" in problem["text"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu"], "no GPU is here"),
        (["--gpu", "--json"], "--gpu: takes neither"),
        (["--gpu", "--device=cpu", "--minutes=0"], "--minutes: should be above 0"),
        (["--dir=here"], "does not know --dir=here"),
        (["absent.yaml"], "absent.yaml"),
    ],
)
def test_what_it_refuses(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = lccp("doctor", *arguments)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_pairs_are_those_that_are_installed_and_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", passed.update)
    runpy.run_path(str(ROOT / "setup.py"))
    asked = " ".join(passed["extras_require"]["gpu"])
    set_up = (ROOT / "tools/setup_env.sh").read_text()
    for core, (torch, engine) in PAIRS.items():
        assert f"megatron-core=={core};" in asked and f"]=={engine};" in asked and f'torch="torch=={torch}"' in set_up


@pytest.mark.parametrize(
    ("torch", "core", "state"),
    [
        ("2.13.0+cpu", "0.16.1", "ok"), ("2.15.0", "0.19.2", "ok"), ("2.14.0", "0.16.1", "warning"),
        ("2.15.0", "0.18.0", "problem"), ("2.9.1", "0.16.1", "problem"), (None, None, "problem"),
    ],
)  # fmt: skip
def test_versions(torch: str | None, core: str | None, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_here, "_version", {"torch": torch, "megatron-core": core}.get)
    assert [finding.state for finding in versions()] == [state]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert states(list(limits(1))) == {"limits": "ok"}
    small = {resource.RLIMIT_NOFILE: 500, resource.RLIMIT_NPROC: 100, resource.RLIMIT_MEMLOCK: 64}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (small[which], small[which]))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**36, 0, 2**20))
    found = list(limits(64))
    assert {"problem", "warning"} == {finding.state for finding in found}
    said = " ".join(finding.text for finding in found)
    assert all(remedy in said for remedy in ("ulimit -n", "ulimit -u", "--shm-size", "TMPDIR", "--cpus-per-task"))


def test_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(directory: Path, needs: int = 0) -> Finding:
        (finding,) = disk("dir", directory, needs, 8 * MIB)
        return finding

    assert said(tmp_path / "deep" / "run").state in ("ok", "warning") and not list(tmp_path.iterdir())
    monkeypatch.setattr(doctor_here, "_speed", lambda *_: (0.001, 0.001))
    assert said(tmp_path / "deep" / "run").state == "ok"
    assert said(tmp_path, 10**18).state == "problem"
    (tmp_path / "file").touch()
    assert said(tmp_path / "file" / "run").text.endswith("is no directory: name another place")
    monkeypatch.setattr(doctor_here, "_speed", lambda *_: (1.0, 0.001))
    assert (said(tmp_path).state, "slow" in said(tmp_path).text) == ("warning", True)
    monkeypatch.setattr(doctor_here, "_speed", lambda *_: 1 / 0)
    found = look_here(None, 1, 8 * MIB)
    assert states(found)["disk"] == "problem" and "could not be checked: division by zero" in found[-1].text


def test_bytes_of_a_checkpoint_are_those_of_the_plan(tiny_yaml: Path) -> None:
    """Which tests/functional/test_resume.py compares with a real save."""
    for path, more in ((tiny_yaml, []), (ROOT / "examples/hunyuan_a13b_64k.yaml", ["--training.precision=fp32"])):
        config = parse_config(path, more)
        plan = make_plan(config, str(path), None, 0.3, None)
        assert checkpoint_bytes(config) == plan["checkpoints"]["any_layout"]["bytes"] > 0
    assert checkpoint_bytes(Config()) > 0


def test_between_two_nodes(tmp_path: Path) -> None:
    """One start: what the nodes say of themselves, sums, links, clocks and directories, well and not."""
    found = run_ranks(2, "doctor_jobs.two_nodes", shared=tmp_path)[0]
    assert [f.text for f in found["alike"]] == [
        "torch 2.13.0 (all 2 nodes)", "writes 2.5 GB/s (node0; alike: all 2 nodes)",
    ]  # fmt: skip
    assert [f.state for f in found["another torch"]] == ["ok", "ok", "problem", "ok"]
    assert "nodes differ" in found["another torch"][2].text
    assert states(found["well"]) == {"nodes": "ok", "links": "ok", "clocks": "ok", "dir": "ok"}
    assert "gloo, 2 ranks on 2 nodes" in found["well"][0].text
    assert [(f.state, "node1" in f.text) for f in found["5 s ahead"]] == [("warning", True)]
    assert found["an hour behind"][0].state == "problem" and "3600." in found["an hour behind"][0].text
    assert found["wrong sums"][0].state == "problem" and "sums are wrong" in found["wrong sums"][0].text
    assert found["blind"][0].state == "problem" and "node1 cannot see what node0 writes" in found["blind"][0].text
    assert not found["left"]


def test_a_rehearsal_without_a_gpu(tmp_path: Path) -> None:
    """The whole of `--gpu` at small sizes; what the time does not suffice for is said, and is no success."""
    done = lccp("doctor", "--gpu", "--device=cpu", f"--out={tmp_path / 'out'}", timeout_s=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/doctor-gpu.json").read_text())
    assert [row["way"] for row in found["parity"]] == ["portable-fp32", "portable"]
    assert not any(broken(row) for row in found["parity"])
    assert [(row["way"], row["length"]) for row in found["bench"]] == [("portable", 128), ("portable", 256)]
    assert all(row["step_s"] > 0 for row in found["bench"]) and found["bench"][1]["heads_over_forward"] is not None
    text = (tmp_path / "out/doctor-gpu.md").read_text()
    assert text in done.stdout and text.startswith("## On CPU (a rehearsal)") and text.count("| agrees |") == 2
    assert done.stderr.count("lccp doctor: ") == 4 and len(done.stderr.splitlines()) == 4, done.stderr

    late = lccp("doctor", "--gpu", "--device=cpu", f"--out={tmp_path / 'late'}", "--minutes=0.001")
    assert late.returncode == 2 and "its time was up" in late.stdout


def test_a_kernel_that_is_off_is_named() -> None:
    about = {"loss": 7.0, "gradient": np.ones(4), "alone_s": np.ones(3), "shared_s": np.ones(3), "parts": 0.0}
    right = {**about, "mass_sLN": np.full((3, 2, 4), 0.5)}

    def said(**other: Any) -> str:
        row = compared({**right, **other}, right) | {"way": "w", "bounds": vars(FP32)}
        return "; ".join(broken(row))

    assert said() == ""
    assert said(loss=7.1).startswith("loss") and said(parts=0.5).startswith("parts")
    assert said(gradient=np.array([1, 1, 1, 1.1])).startswith("gradient")
    assert said(alone_s=np.array([1, 1, 1.1]), shared_s=np.array([1, 1, 1.1])).startswith("answer_nat")
    assert said(shared_s=np.array([1, 1, np.nan])).startswith("sharing_nat nan")
    assert said(mass_sLN=np.full((3, 2, 4), 0.6)).startswith("mass")
    assert all(getattr(BF16, name) > value for name, value in vars(FP32).items())
