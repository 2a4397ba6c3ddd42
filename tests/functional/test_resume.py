"""A run cut off between any two things it does: after the same command again, its record is as if it was not."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from megatron_lccp.config.load import parse_config
from megatron_lccp.lock import sole_user
from megatron_lccp.planning.plan import make_plan
from megatron_lccp.weights.checkpoint import checkpoints_in, discard_drafts, drop_old, require_same_run
from megatron_lccp.weights.sharded import CheckpointError
from tests.distributed.jobs import tensor_bytes
from tests.distributed.ranks import KEEPS_ALL, ROOT, lccp, trained
from tests.functional.test_main_job import health, losses, rows

OFTEN = [
    *KEEPS_ALL, "--monitors.0.init_args.every={tokens: 1500}", "--monitors.1.init_args.every={steps: 4}",
    "--megatron.transformer.hidden_dropout=0.1",  # so that the steps draw at random
    # of the second stage, whose windows of packing are 7, 8, 9 and 10
    "--stages.lccp.pack={how: best_fit, align_tok: 4, window_steps: 3}", "--stages.lccp.masks=documents",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_yaml, tmp_path_factory.mktemp("whole") / "run", *OFTEN)


@pytest.mark.parametrize("step", [3, 6, 10])
def test_cut_off_between_checkpoint_and_window(step: int, tiny_yaml: Path, whole: Path, tmp_path: Path) -> None:
    """At a window due by tokens, at the boundary of stages, and before the last window."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for path in (run / "rows").glob("step-*"):
        if int(path.stem.removeprefix("step-")) >= step:
            path.unlink()
    # what a save that was cut off leaves: a draft, even one that looks complete
    draft = run / "checkpoints" / f"step-{step + 1:08d}.0123abcd-17-4711.tmp"
    draft.mkdir()
    (draft / "checkpoint.json").write_text("{")
    found = lccp("train", str(tiny_yaml), f"--dir={run}", *OFTEN)
    assert found.returncode == 0, found.stderr
    assert losses(run) == losses(whole)
    ours, theirs = rows(run), rows(whole)
    pd.testing.assert_frame_equal(ours.drop(columns="value"), theirs.drop(columns="value"))
    np.testing.assert_array_equal(ours.value, theirs.value)
    pd.testing.assert_frame_equal(health(run), health(whole))
    assert not draft.exists()


def test_a_finished_run_stays_as_it_is(tiny_yaml: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")}
    found = lccp("train", str(tiny_yaml), f"--dir={whole}", *OFTEN)
    assert found.returncode == 0 and "10 steps" in found.stdout
    assert {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")} == before


def test_another_job_in_the_same_directory_is_refused(tiny_yaml: Path, whole: Path) -> None:
    with sole_user(whole / ".lock", str(whole)):
        found = lccp("train", str(tiny_yaml), f"--dir={whole}", *OFTEN)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert f"{whole}: another job on {socket.gethostname()} (pid {os.getpid()}, since 20" in found.stderr
    assert not (whole / ".lock").exists()


def test_the_kill_loop_sees_a_bit_that_differs_and_a_file_that_is_left(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    kill_loop = importlib.import_module("kill_loop")
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert list(kill_loop.different(whole, run)) == [] and kill_loop.left_in(run) == []
    last = checkpoints_in(run / "checkpoints")[-1]
    name, tensor = next(
        (n, t) for n, t in kill_loop.tensors_of(last).items() if n.startswith("optimizer.state.exp_avg.")
    )
    file = next(f for f in last.glob("*.distcp") if tensor.numpy().tobytes() in f.read_bytes())
    data, at = bytearray(file.read_bytes()), file.read_bytes().index(tensor.numpy().tobytes())
    data[at] ^= 1
    file.write_bytes(data)
    assert any("altered" in text for text in kill_loop.different(whole, run))
    content = json.loads((last / "checkpoint.json").read_text())
    content["sha256"][file.name] = hashlib.sha256(data).hexdigest()
    (last / "checkpoint.json").write_text(json.dumps(content))
    assert list(kill_loop.different(whole, run)) == [f"{name} differs in the last checkpoint"]
    for left in ("rows/step-00000004.parquet.0123abcd-1-2.tmp", ".lock"):
        (run / left).touch()
    assert len(kill_loop.left_in(run)) == 2
    shutil.rmtree(last)
    assert any(text.startswith("checkpoints: ") for text in kill_loop.different(whole, run))


def test_other_data_sizes_are_refused_on_a_resume(tiny_yaml: Path, whole: Path) -> None:
    function = ["layernorm_epsilon=0.01", "moe_router_pre_softmax=true"]
    changed = ["--stages.lccp.global_batch_tok=1024", *(f"--megatron.transformer.{field}" for field in function)]
    found = lccp("train", str(tiny_yaml), f"--dir={whole}", *OFTEN, *changed)
    (line,) = found.stderr.strip().splitlines()
    assert (
        found.returncode == 1
        and (
            "step-00000010: is of another run: stages.lccp.global_batch_tok: 512 -> 1024; "
            "megatron.transformer.layernorm_epsilon: 1e-05 -> 0.01; megatron.transformer.moe_router_pre_softmax: False -> "
            "True; set the values that were, or take another run directory"
        )
        in line
    )
    more = ["--stages.lccp.global_batch_tok=1024", "--monitors=[]"]
    dry = lccp("train", str(tiny_yaml), f"--dir={whole}", *OFTEN, *more, "--dry-run")
    assert dry.returncode == 2 and "is of another run: stages.lccp.global_batch_tok: 512 -> 1024; set" in dry.stderr
    assert "1 finding" in dry.stdout


def test_a_stage_may_be_added_to_a_finished_run(tiny_yaml: Path, whole: Path, tmp_path: Path) -> None:
    """It trains as if the stage had been there from the start; none may be put before what was trained."""
    stages = yaml.safe_load(tiny_yaml.read_text())["stages"]
    longer = {**stages["lccp"], "tokens": 2 * 512, "context_tok": 256, "rope_base": 2e5}
    longer |= {"pack": {"align_tok": 4}, "masks": "documents"}  # whose documents are those that are left
    options = [f"--stages={json.dumps({**stages, 'longer': longer})}", *OFTEN, "--monitors=[]"]
    shutil.copytree(whole, tmp_path / "more")
    for run in ("more", "at once"):
        found = lccp("train", str(tiny_yaml), f"--dir={tmp_path / run}", *options)
        assert found.returncode == 0, found.stderr
    assert losses(tmp_path / "more") == losses(tmp_path / "at once") and len(losses(tmp_path / "more")) == 12
    before = f"--stages={json.dumps({'longer': longer, **stages})}"
    found = lccp("train", str(tiny_yaml), f"--dir={whole}", *OFTEN, "--monitors=[]", before)
    assert found.returncode == 1 and "another run: stages: base, lccp -> longer, base; set" in found.stderr


@pytest.mark.parametrize("position", [None, "here", {"stage": "lccp"}, {"where": 3}])
def test_a_position_that_is_none_is_named(position: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint.json: position cannot be read"):
        require_same_run(tmp_path, {"about": {}, "position": position}, {})


def test_an_old_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its removal is cut off."""
    for step in (1, 2, 3):
        (tmp_path / f"step-0000000{step}").mkdir()
        for name in ("checkpoint.json", "__0_0.distcp"):
            (tmp_path / f"step-0000000{step}" / name).touch()

    def cut_off(path: Path, **_: object) -> None:
        (path / "__0_0.distcp").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", cut_off)
        drop_old(tmp_path, 2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000002", "step-00000003"]
    assert all((path / "__0_0.distcp").exists() for path in checkpoints_in(tmp_path))
    discard_drafts(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_results_without_a_checkpoint_are_set_aside(tiny_yaml: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("checkpoints"))
    found = lccp("train", str(tiny_yaml), f"--dir={run}", *OFTEN, "--training.steps=1")
    assert found.returncode == 0 and "earlier-1" in found.stdout
    assert sorted(losses(run)) == [1]
    kept = [json.loads(line)["step"] for line in (run / "earlier-1" / "steps.jsonl").read_text().splitlines()]
    assert kept == list(range(1, 11)) and list((run / "earlier-1" / "rows").iterdir())


def test_a_rule_of_the_users_ends_the_run(tiny_yaml: Path, tmp_path: Path) -> None:
    """At the first window after which it holds: saved, measured as at the end, reported. A resume goes on only without
    the rule."""
    run = tmp_path / "run"
    # so short a run has no other state
    rule = "--stop_when=[{states: {corpus_nll: undecided}, at_least_tokens: 4000}]"
    rarely = "--monitors.0.init_args.every={steps: 1}"  # the others: every 3 steps
    found = lccp("train", str(tiny_yaml), f"--dir={run}", rule, rarely)
    assert found.returncode == 0, found.stderr
    why = "ended by stop_when.0 holds at 4,096 tokens: corpus_nll is undecided, after at least 4,000 tokens; report: "
    assert f"8 steps, 4,096 tokens; {why}" in found.stdout and sorted(losses(run)) == list(range(1, 9))
    assert checkpoints_in(run / "checkpoints")[-1].name == "step-00000008"
    assert {*rows(run).query("step == 8").monitor} == {"CorpusPPL", "NeedleGrid", "RetrievalHeads"}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["step"]) for event in events] == [("stop_when", 8)]
    before = {path: path.stat().st_mtime_ns for path in (run / "rows").iterdir()}
    found = lccp("train", str(tiny_yaml), f"--dir={run}", rule, rarely)
    assert found.returncode == 0 and why in found.stdout
    assert {path: path.stat().st_mtime_ns for path in (run / "rows").iterdir()} == before
    found = lccp("train", str(tiny_yaml), f"--dir={run}", rarely)
    assert found.returncode == 0 and "10 steps" in found.stdout and "ended by" not in found.stdout
    assert sorted(losses(run)) == list(range(1, 11))


def test_a_damaged_checkpoint_is_set_aside_where_asked(tiny_yaml: Path, whole: Path, tmp_path: Path) -> None:
    """And the training goes on from the one before it, if there is one; what else changed is said leaf by leaf."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) not in (5, 7):
            shutil.rmtree(path)
    shard = next((run / "checkpoints" / "step-00000007").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    fall_back = ["--checkpoint.fall_back=true", "--training.max_bad_steps=4", "--monitors.0.init_args.sequences=2"]
    found = lccp("train", str(tiny_yaml), f"--dir={run}", *OFTEN, *fall_back)
    assert found.returncode == 0 and "step-00000007: missing or altered" in found.stdout, found.stderr
    changed = "changed since: training.max_bad_steps: 5 -> 4; monitors.0.init_args.sequences: 3 -> 2"
    assert f"resumed after step 5; {changed}\n" in found.stdout
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["kind"] == "checkpoint_set_aside"]
    assert event["step"] == 5 and "set aside as step-00000007.damaged, going on from the one before" in event["text"]
    assert (run / "checkpoints" / "step-00000007.damaged" / shard.name).is_file()
    assert losses(run) == losses(whole)


def test_a_plan_says_the_bytes_of_a_checkpoint(tiny_yaml: Path, whole: Path) -> None:
    plan = make_plan(parse_config(tiny_yaml, ["--training.steps=10"]), "tiny", 1, 0.3, None, storage_gbps=2.0)
    checkpoint = whole / "checkpoints" / "step-00000010"
    cost = plan["checkpoints"]["any_layout"]
    assert cost["bytes"] == tensor_bytes(checkpoint) == plan["checkpoints"]["same_layout"]["bytes"]
    assert cost["bytes"] < sum(file.stat().st_size for file in checkpoint.iterdir())
    assert cost["save_s"] == cost["bytes"] / 2e9 and cost["read_bytes"] == 2 * cost["bytes"]
