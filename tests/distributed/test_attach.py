"""The monitors in a loop that is not ours: the same rows on TP2 x PP2 as on one rank, and the loop none the wiser."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import free_port, run_ranks
from tests.distributed.test_layouts import assert_rows_equal

ROOT = Path(__file__).parents[2]
TEXT = ["bundled/stdlib"]
TOKENIZER = ROOT / "examples/tiny_moe/tokenizer.model"


@pytest.fixture(scope="module")
def monitors(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Monitors with and without shared prefills, as YAML files (JSON is YAML)."""
    grid = {"lengths_tok": [100, 131], "depths": [0.0, 0.5, 1.0], "samples": 1, "haystacks": TEXT}
    paths = {}
    for share in (True, False):
        parts = {
            "CorpusPPL": {"corpora": TEXT, "length_tok": 65, "sequences": 2},
            "NeedleGrid": {**grid, "share": share},
            "RetrievalHeads": {**grid, "lengths_tok": [131], "share": share},
        }
        tree = {"monitors": [{"class_path": f"megatron_lccp.monitors.{k}", "init_args": v} for k, v in parts.items()]}
        paths[share] = str(tmp_path_factory.mktemp("monitors") / "monitors.yaml")
        Path(paths[share]).write_text(json.dumps(tree))
    return paths


def test_rows_on_tp2_pp2_equal_one_rank_and_training_is_untouched(monitors: dict[bool, str], tmp_path: Path) -> None:
    """On one rank every sample has a forward of its own, through Megatron-Core's own attention."""
    base = str(tmp_path / "base.safetensors")
    (one,) = run_ranks(1, "attach_jobs.foreign", base=base, monitors=monitors[False])
    layout = {"base": base, "monitors": monitors[True], "tensor": 2, "pipeline": 2, "further": True}
    for rank, found in enumerate(run_ranks(4, "attach_jobs.foreign", **layout)):
        assert_rows_equal(found["rows"], one["rows"], f"rank {rank}")
        assert_rows_equal(found["further"], found["tied"], f"rank {rank}, with multi-token prediction")
    pairs = {"base": base, "monitors": monitors[True], "tensor": 2, "steps": 3}
    watched = run_ranks(2, "attach_jobs.foreign", **pairs)
    alone = run_ranks(2, "attach_jobs.foreign", watch=False, **pairs)
    assert [w["digest"] for w in watched] == [a["digest"] for a in alone]
    assert len({row["step"] for row in watched[0]["rows"]}) == 4
    assert {row["step"]: row["tokens"] for row in watched[0]["rows"]} == {0: 0, 1: 100, 2: 200, 3: 300}
    # in the end rank 1 alone cannot read its text: nobody waits for it, nor measures without it
    names = ("CorpusPPL", "NeedleGrid", "RetrievalHeads")
    errors = [f"monitor_error: {name}: ValueError: bundled/stdlib: gone" for name in names]
    assert [found["lost"] for found in watched] == [[0, *errors]] * 2
    reason = "ValueError: heads cannot be scored: some of its layers have no core attention"
    assert [found["blind"] for found in watched] == [[0, f"monitor_error: RetrievalHeads: {reason}"]] * 2


def test_a_model_is_given_back_as_it_was(tmp_path: Path) -> None:
    """Whether a monitor ends well, fails in the middle of a forward or stops the run; and what is due is measured."""
    texts = {"mine": [k % 700 for k in range(500)]}
    (found,) = run_ranks(1, "attach_jobs.undisturbed", tokenizer=str(TOKENIZER), texts=texts)
    assert found["measured"] == ["Draws", "NeedleGrid"] and found["due"] == [[], ["Draws"], []]
    middle = "RuntimeError: in the middle of a forward"
    errors = [f"RetrievalHeads: {middle}", f"HeadAblation: {middle}", "Draws: RuntimeError: on purpose"]
    assert found["errors"] == errors and found["stopped"] == errors[-1]
    assert found["same"] > 100 and not found["changed"] and not found["new"], found["changed"]
    assert found["share"] == [True, False]  # a later chunk may have layers without core attention


@pytest.mark.parametrize("bf16", [False, True])
def test_chunks_as_a_training_wraps_them(bf16: bool, monitors: dict[bool, str], tmp_path: Path) -> None:
    """In a hook called as Megatron-LM calls it: DDP that gathers parameters, Float16Module, two chunks a rank, CP."""
    layout = {"pipeline": 2, "virtual": 2, **({"tensor": 2} if bf16 else {"context": 2})}
    common = {"base": str(tmp_path / "base.safetensors"), "bf16": bf16}
    (one,) = run_ranks(1, "attach_jobs.wrapped", monitors=monitors[False], wrap=False, **common)
    for rank, found in enumerate(run_ranks(4, "attach_jobs.wrapped", monitors=monitors[True], **layout, **common)):
        assert found["wraps"] == ["DistributedDataParallel", *["Float16Module"] * bf16, "GPTModel"]
        if not bf16:
            assert_rows_equal(found["rows"], one["rows"], f"rank {rank}")
            continue
        for row, other in zip(found["rows"], one["rows"], strict=True):
            assert {**row, "value": 0} == {**other, "value": 0}
            if row["unit"] == "nat" or row["metric"] == "needle_mass":  # what is largest may differ in BF16
                assert abs(row["value"] - other["value"]) < 0.02, (row, other)  # 0.005 nat were found


def test_another_tokenizer_and_groups_handed_over(monitors: dict[bool, str], tmp_path: Path) -> None:
    """Hugging Face's tokenizer, and process groups that are not Megatron-Core's global ones, on PP2."""
    common = {"base": str(tmp_path / "base.safetensors"), "tokenizer": "hf"}
    (one,) = run_ranks(1, "attach_jobs.foreign", monitors=monitors[False], **common)
    assert {row["metric"] for row in one["rows"]} >= {"nll", "answer_nll", "exact", "retrieval_score"}
    layout = {"monitors": monitors[True], "pipeline": 2, "explicit": True}
    for rank, found in enumerate(run_ranks(2, "attach_jobs.foreign", **layout, **common)):
        assert_rows_equal(found["rows"], one["rows"], f"rank {rank}")


def test_what_does_not_fit_is_said_in_one_line(tmp_path: Path) -> None:
    (said,) = run_ranks(1, "attach_jobs.wrong", base=str(tmp_path / "base"))
    fields = ["monitors.0 (NeedleGrid): its longest sample has 97 tokens, the model has learned positions for 96; ask"]
    fields += [
        "model: its positions have several axes",
        "model:",
        "absent.yaml:",
        "tokenizer:",
        "texts.mine:",
        "texts.mine: has ids 1 to 2048",
        "texts.mine:",
    ]
    fields += ["texts: 'a\\u202eb' has a character that cannot be seen", "run: 'a\\x1bb' has a character"]
    fields += ["monitors.0 (HeadAblation): top: 99 is no number", "monitors.1 (CopyBack): longest_tok: 1048576 is more"]
    for text, field in zip(said, [*fields, "process_groups:"], strict=True):
        assert text.startswith(field) and "\n" not in text


def test_the_example_runs_as_its_header_says(tmp_path: Path) -> None:
    """With torchrun on two ranks; a report can be drawn from what it leaves."""
    directory = tmp_path / "attached"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        "examples/attach_plain_mcore.py", "--tensor", "2", "--steps", "2", "--every", "2", "--dir", str(directory),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 0: answer NLL" in done.stdout and "step 2: answer NLL" in done.stdout
    report = [sys.executable, "-m", "megatron_lccp.cli", "report", str(directory)]
    assert subprocess.run(report, cwd=ROOT, capture_output=True, text=True).returncode == 0
    assert '<figure class="chart" id="needle-cells">' in (directory / "report.html").read_text()
