"""A branch of a run: the same stage goes on as the run did, bit by bit; what cannot branch is said in one line.

In: a run that kept all its checkpoints. Out: run directories that branch from it, trained and not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lccp.analysis.report.compare import compare
from megatron_lccp.analysis.report.report import write_report
from megatron_lccp.cli import main
from megatron_lccp.config.load import as_tree, parse_config
from megatron_lccp.records.store import RunStore
from tests.distributed.ranks import KEEPS_ALL, lccp, trained
from tests.functional.test_main_job import losses, rows

OFTEN = [*KEEPS_ALL, "--monitors.2.init_args.scores=[retrieval_score, wu2024]"]
AT, TOKENS = 8, 8 * 512
"""The second of the four steps of stage lccp."""


@pytest.fixture(scope="module")
def whole(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_yaml, tmp_path_factory.mktemp("whole") / "run", *OFTEN)


def stage_file(tmp_path: Path, stages: Mapping[str, Any] | str) -> Path:
    path = tmp_path / "stage.yaml"
    path.write_text(stages if isinstance(stages, str) else yaml.safe_dump({"stages": dict(stages)}))
    return path


def test_the_same_stage_gives_the_same_losses(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}  # of which a branch changes nothing
    branch = tmp_path / "again"
    given = stage_file(tmp_path, {"again": {"tokens": 2 * 512}})
    assert main(["branch", str(whole), "--at", str(AT), str(given), "--dir", str(branch)]) == 0
    said = capsys.readouterr().out
    assert "2 steps to train" in said and "goes on in the order of samples of lccp" in said
    assert "learning rate" not in said and f"lccp train {branch}/config.yaml" in said
    # what was trained up to there is in it, and it has begun nothing
    assert losses(branch) == {step: loss for step, loss in losses(whole).items() if step <= AT}
    assert set(rows(branch)["run"]) == {"tiny-again"} and max(RunStore(branch).windows()) == 6
    kept = whole / "checkpoints" / f"step-{AT:08d}"
    linked = branch / "checkpoints" / kept.name
    assert all(os.path.samefile(path, linked / path.name) for path in kept.iterdir())
    found = lccp("train", f"{branch}/config.yaml")
    assert found.returncode == 0, found.stderr
    assert f"resumed after step {AT}" in found.stdout
    assert losses(branch) == losses(whole)
    end, theirs = (
        run[run["step"] == 10].drop(columns=["run", "config_hash", "stage"]) for run in (rows(branch), rows(whole))
    )
    assert end.reset_index(drop=True).equals(theirs.reset_index(drop=True))
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    _side_by_side(whole, branch, tmp_path)


def _side_by_side(whole: Path, branch: Path, tmp_path: Path) -> None:
    """The report has both, and says where one branches; compared, they are the same to the last digit."""
    page = write_report([whole, branch], tmp_path / "both.html").read_text()
    assert "tiny, from 4.1K tokens" in page and page.count('<section class="verdict') == 2
    found = compare(whole, branch)
    assert (found.a, found.b, found.shared_tokens) == ("tiny", "tiny-again", TOKENS)
    by_tokens, by_hours = found.places
    assert by_tokens.at == 10 * 512 and len(by_tokens.differences) > 3
    assert all(each.gain == 0 and each.better in ("neither", "unknown") for each in by_tokens.differences)
    assert by_hours.at and by_hours.at > 0 and by_hours.differences
    assert "one training up to 4.1K tokens" in found.text()


def test_a_score_that_no_sample_passes_is_said(whole: Path, capsys: pytest.CaptureFixture) -> None:
    """A model of ten steps writes no needle, so wu2024 is defined for no sample."""
    said = (
        "RetrievalHeads.wu2024 gave no rows at all 5 windows: defined for none of 6 samples; what the model would write "
        "should have more than half of the needle's tokens"
    )
    main(["verdict", str(whole)])
    assert f"NOT MEASURED {said}." in capsys.readouterr().out
    assert f"<li>{escape(said)}</li>" in write_report(whole).read_text()


def test_the_stage_that_the_checkpoint_stands_in_goes_on_changed(whole: Path, tmp_path: Path) -> None:
    """Its schedule and its place in the data go on; nothing given changes nothing."""
    planned = as_tree(parse_config(whole / "config.yaml"))
    for name, fields in (("as-it-was", None), ("hotter", {"lr": 1e-3})):
        branch = tmp_path / name
        given = stage_file(tmp_path, {"lccp": fields})
        assert main(["branch", str(whole), "--at", str(AT), str(given), "--dir", str(branch), "--name", name]) == 0
        made = as_tree(parse_config(branch / "config.yaml"))
        assert made["stages"]["lccp"] == {**planned["stages"]["lccp"], **(fields or {})}
        same = {key for key in planned if made[key] == planned[key]}
        assert {*planned} - same <= {"name", "dir", "stages"} and made["name"] == name


def test_another_mixture_draws_its_own_order(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = stage_file(
        tmp_path, {"books": {"tokens": 1024, "lr": 1e-4, "mixture": {"all": {"sources": {"people": 1}}}}}
    )
    assert main(["branch", str(whole), "--at", "6", str(given), "--dir", str(tmp_path / "books")]) == 0
    said = capsys.readouterr().out
    assert "books draws an order of samples of its own" in said
    assert "the learning rate goes from 0.001 at the checkpoint to 0.0001" in said
    made = parse_config(tmp_path / "books" / "config.yaml")
    assert list(made.stages) == ["base", "books"] and made.stages["books"].goes_on_from is None
    assert made.stages["base"].tokens == 6 * 512 and made.stages["books"].context_tok == 64


@pytest.mark.parametrize(
    ("step", "stages", "problem"),
    [
        (11, {"more": {"tokens": 512}}, "--at: {run} keeps no checkpoint of step 11; there are 1, 2, 3, 4, 5, 6, 7, 8, 9, 10"),
        (8, {"more": {}}, "stages.more.tokens: is missing; say how many this stage trains"),
        (8, {"more": {"tokens": 512, "lrr": 1}}, "stages.more.lrr: "),
        (8, {"more": {"tokens": "many"}}, "stages.more.tokens: "),
        (8, {"more": {"tokens": 512, "min_lr": 1}}, "stages.more.min_lr: 1.0 should be between 0 and lr"),
        (8, {"base": {}}, "stages.base: is over at this step; give the new stage another name"),
        (8, {"lccp": {"context_tok": 64}}, "context_tok: its steps so far were counted in 128; name a new stage for it"),
        (8, {"lccp": {"tokens": 1024}}, "tokens: 1,024 are trained already; give more"),
        (8, {"more": {"tokens": 512, "goes_on_from": "base"}}, "stages.more.goes_on_from: stages.base has another mixture and context_tok; leave"),
        (8, "training: {steps: 3}", "training: is not read here; the file should hold `stages:` alone"),
        (8, "stages: []", "stages: should name the new stage"),
    ],
)  # fmt: skip
def test_what_cannot_branch_is_one_line(
    step: int, stages: Mapping[str, Any] | str, problem: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    code = main(["branch", str(whole), "--at", str(step), str(stage_file(tmp_path, stages)), "--dir", str(out)])
    error = capsys.readouterr().err
    assert code == 2 and problem.format(run=whole) in error and len(error.splitlines()) == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["stage.yaml"]


def test_a_branch_replaces_nothing(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given, out = stage_file(tmp_path, {"more": {"tokens": 512}}), tmp_path / "out"
    out.mkdir()
    assert main(["branch", str(whole), "--at", "8", str(given), "--dir", str(out)]) == 2
    assert "out: is there already" in capsys.readouterr().err
    (tmp_path / "no run").mkdir()
    assert main(["branch", str(tmp_path / "no run"), "--at", "8", str(given)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err


def test_events_after_the_checkpoint_and_what_ends_the_run_stay_behind(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(whole, run)
    store = RunStore(run)
    for step in (3, 9):
        store.append_event("skipped_step", f"at {step}", step=step)
    store.append_event("stop_when", "the rule", step=8)
    config = store.config_path.read_text()
    rule = "stop_when:\n- states: {verdict: saturated}\n"
    store.config_path.write_text(re.sub(r"^stop_when:.*\n", rule, config, flags=re.MULTILINE))
    assert parse_config(store.config_path).stop_when
    given = stage_file(tmp_path, {"more": {"tokens": 512}})
    assert main(["branch", str(run), "--at", "8", str(given), "--dir", str(out)]) == 0
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert {event["step"] for event in events if event["kind"] == "no_rows"} == {0, 3, 6}
    events = [event for event in events if event["kind"] != "no_rows"]
    assert [(event["kind"], event["step"]) for event in events] == [("skipped_step", 3), ("branch", 8)]
    assert events[-1]["text"] == "from tiny at step 8, 4096 tokens"
    assert not parse_config(out / "config.yaml").stop_when and "stop_when is left out" in capsys.readouterr().out
