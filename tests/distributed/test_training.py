"""Training as the command does it: windows leave no trace, a resume loses nothing, a bad step changes nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_lccp.config.load import parse_config
from megatron_lccp.model.vocabulary import VOCABULARY_TENSORS
from megatron_lccp.planning.plan import make_plan
from megatron_lccp.weights.checkpoint import checkpoints_in
from megatron_lccp.weights.sharded import read_about
from tests.distributed.jobs import tensor_bytes
from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import assert_shards_of

EP2 = ["--parallel.expert=2"]
STEPS = 10  # tests/tiny.py: 6 in the first stage, 4 in the second
VOCABULARY = 700


@pytest.fixture(scope="module")
def whole(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """An uninterrupted run with and without monitors, and the first part of one that stops after 5 steps."""
    directory = tmp_path_factory.mktemp("runs")
    jobs = []
    for name, more, monitors in (("watched", [], True), ("alone", [], False), ("part", ["--training.steps=5"], True)):
        overrides = [*EP2, f"--dir={directory / name}", *more]
        jobs.append(("train", {"path": tiny_yaml, "overrides": overrides, "monitors": monitors}))
    ranks = run_ranks(2, "several", jobs=jobs)
    return {
        "directory": directory,
        **{name: [r[k] for r in ranks] for k, name in enumerate(("watched", "alone", "part"))},
    }


def test_steps_after_a_window_are_bitwise_those_without(whole: dict) -> None:
    for watched, alone in zip(whole["watched"], whole["alone"]):
        assert watched["losses"] == alone["losses"] and len(watched["losses"]) == STEPS
        assert watched["digest"] == alone["digest"]
        assert watched["rows"] and not alone["rows"] and not watched["events"]


def test_windows_are_at_the_start_when_due_and_at_the_end(whole: dict) -> None:
    rows = [row for row in whole["watched"][0]["rows"] if row["monitor"] == "CorpusPPL" and row["metric"] == "nll"]
    assert sorted({(row["step"], row["stage"]) for row in rows}) == [
        (0, "base"), (3, "base"), (6, "lccp"), (9, "lccp"), (10, "lccp")
    ]  # fmt: skip


def test_a_corpus_is_the_mean_of_its_sequences(whole: dict) -> None:
    """The same ones at every window, so that checkpoints are paired."""
    rows = [row for row in whole["watched"][0]["rows"] if row["monitor"] == "CorpusPPL"]
    parts: dict[tuple, list[float]] = {}
    for row in rows:
        if row["metric"] == "sequence_nll":
            parts.setdefault((row["step"], row["corpus"]), []).append(row["value"])
    for row in rows:
        if row["metric"] == "nll":
            part = parts.pop((row["step"], row["corpus"]))
            assert len(set(part)) == 3 and row["value"] == pytest.approx(sum(part) / 3, rel=1e-6)
    assert not parts
    sets = {(row["corpus"], row["sample_set"]) for row in rows if row["metric"] == "sequence_nll"}
    assert len(sets) == len({corpus for corpus, _ in sets})


@pytest.mark.parametrize(
    ("name", "ranks", "layout", "bitwise"),
    [
        ("EP2", 2, EP2, True),
        ("one rank", 1, ["--model.vocab_multiple=256"], False),
        ("TP2", 2, ["--parallel.tensor=2", "--model.vocab_multiple=1536"], False),  # no token on the second rank
        ("PP2", 2, ["--parallel.pipeline=2"], False),
        ("CP2", 2, ["--parallel.context=2"], False),
        (
            "TP2xPP2xEP2",
            4,
            ["--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.expert=2", "--parallel.expert_tensor=1"],
            False,
        ),
    ],
)
def test_resumed_on_any_layout_equals_uninterrupted(
    name: str, ranks: int, layout: list[str], bitwise: bool, whole: dict, tiny_yaml: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole["directory"] / "part", run)
    overrides = [*layout, f"--dir={run}"]
    resumed = run_ranks(
        ranks, "train", path=tiny_yaml, overrides=overrides, monitors=False, resume=True, one_sees=name == "EP2"
    )
    straight = whole["watched"][0]
    for rank, found in enumerate(resumed):
        assert found["start"] == 5 and found["step"] == STEPS
        if bitwise:
            assert found["losses"] == straight["losses"][5:]
            assert found["digest"] == whole["watched"][rank]["digest"]
        else:
            np.testing.assert_allclose(found["losses"], straight["losses"][5:], rtol=2e-5, err_msg=name)
    everyone = without_padding({**whole["watched"][0]["weights"], **whole["watched"][1]["weights"]})
    for rank, found in enumerate(resumed):
        assert_shards_of(without_padding(found["weights"]), everyone, 2e-3, f"{name} rank {rank}")


def without_padding(shards: dict) -> dict:
    """The same without rows of the vocabulary that are no tokens, of which some ranks have nothing else."""
    found = {}
    for (key, offset), shard in shards.items():
        real = max(VOCABULARY - offset[0], 0) if key.endswith(VOCABULARY_TENSORS) else len(shard)
        if real > 0:
            found[key, offset] = shard[:real]
    return found


def test_resumed_from_one_rank_to_expert_parallel(tiny_yaml: Path, tmp_path: Path) -> None:
    """EP = 1 to EP = 2: Megatron-Core keeps one optimizer in the first and two in the second."""
    here = [f"--dir={tmp_path / 'run'}"]
    straight, _, said = run_ranks(
        1, "several",
        jobs=[
            ("train", {"path": tiny_yaml, "overrides": [f"--dir={tmp_path / 'whole'}"], "monitors": False}),
            ("train", {"path": tiny_yaml, "overrides": [*here, "--training.steps=5"], "monitors": False}),
            ("refused_weights", {"path": tiny_yaml, "overrides": ["--seed=9"], "directory": tmp_path}),
        ],
    )[0]  # fmt: skip
    assert_refused(said)
    for found in run_ranks(2, "train", path=tiny_yaml, overrides=[*here, *EP2], monitors=False, resume=True):
        np.testing.assert_allclose(found["losses"], straight["losses"][5:], rtol=2e-5)


def assert_refused(said: dict[str, str]) -> None:
    """A NaN is named by its tensor, layer and expert, however it is loaded; what lacks or is too much, in one line."""
    nan = "decoder.layers.mlp.experts.experts.linear_fc2.weight[1, 3] has 1 of 4,096 values that are NaN or infinite"
    assert all(nan in said[way] for way in ("file", "weights", "checkpoint")), said
    assert (
        "set: lacks 1 tensor (decoder.final_layernorm.weight), has 1 tensor (x) too much; it belongs to another model"
    ) in said["set"]
    assert "lacks " in said["optimizer"] and "(optimizer.state.exp_avg.decoder" in said["optimizer"]
    assert not any("\n" in text for text in said.values())


BEHIND = ["--checkpoint.asynchronous=true", "--checkpoint.every.steps=2", "--checkpoint.keep=9"]
PLAIN = {
    "EP2": [*EP2], "TP2": ["--parallel.tensor=2"], "PP2": ["--parallel.pipeline=2"],
    "DP2 in BF16 with padded buckets": [
        "--training.precision=bf16", "--megatron.optimizer.overlap_param_gather=true",
        *(f"--megatron.ddp.overlap_{what}=true" for what in ("param_gather", "grad_reduce")),
        "--megatron.ddp.bucket_size=5000",
    ],
}  # fmt: skip


def test_saved_behind_the_training_and_for_its_layout_alone(tiny_yaml: Path, tmp_path: Path, whole: dict) -> None:
    """Resumed bit by bit, on one layout after another: from the second checkpoint, of its layout, and from the first, of
    any. Both hold what was when they were asked for, though the training went on for as long as they were written.

    The last one of a run is of any layout again, and what is of one is refused on another.
    """
    jobs = []
    for number, layout in enumerate(PLAIN.values()):
        overrides = [*layout, f"--dir={tmp_path / str(number)}", *BEHIND, "--checkpoint.any_layout_every=9"]
        here = {"path": tiny_yaml, "overrides": overrides, "monitors": False, "writers": "late"}
        jobs += [("train", {**here, "resume": bool(gone), "without": gone}) for gone in ((), (6, 8, 10), (4, 6, 8, 10))]
    other = {"path": tiny_yaml, "overrides": [f"--dir={tmp_path / '0'}", "--parallel.tensor=2"], "without": [10]}
    ranks = run_ranks(2, "several", jobs=[*jobs, ("refused_resume", other)], timeout_s=900)
    for rank, (*results, refused) in enumerate(ranks):
        for name, (first, same, any_layout) in zip(PLAIN, zip(*[iter(results)] * 3)):
            where = f"{name} rank {rank}"
            assert not first["events"] + same["events"] + any_layout["events"], where
            assert (first["step"], same["start"], any_layout["start"]) == (STEPS, 4, 2), where
            for found in (same, any_layout):
                assert found["losses"] == first["losses"][found["start"] :], where
                assert found["digest"] == first["digest"], where
        assert results[0]["losses"] == whole["alone"][rank]["losses"]  # of EP2, which saved in the usual way
        assert results[0]["digest"] == whole["alone"][rank]["digest"]
        assert "step-00000008: was saved for its layout alone (TP 1 x PP 1 x CP 1, EP 2 x ETP 1 on 2 ranks" in refused
        assert refused.endswith("or move it away: step-00000004 fits any layout"), refused
    for number, (name, layout) in enumerate(PLAIN.items()):
        directory = tmp_path / str(number) / "checkpoints"
        kinds = ["layout" in read_about(path) for path in checkpoints_in(directory)]
        assert kinds == [False, False, True, True, *([False] if number else [])], (
            name
        )  # steps 2; of a start 4, 6, 8, 10
        plan = make_plan(parse_config(tiny_yaml, layout), "tiny", 2, 0.3, None)["checkpoints"]
        for kind, step in (("any_layout", 4), ("same_layout", 8)):
            assert tensor_bytes(directory / f"step-{step:08d}") == plan[kind]["bytes"], (name, kind)


def test_a_writer_that_dies_leaves_no_checkpoint(tiny_yaml: Path, tmp_path: Path) -> None:
    """Said once, on all ranks; the training goes on, and later ones are whole."""
    overrides = [*EP2, f"--dir={tmp_path / 'run'}", *BEHIND]
    for found in run_ranks(2, "train", path=tiny_yaml, overrides=overrides, monitors=False, writers="killed"):
        assert [kind for kind, _ in found["events"]] == ["checkpoint_error"] and found["error"] is None
        assert "step-00000002: not saved" in found["events"][0][1] and found["step"] == STEPS
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (4, 6, 8, 10)]


@pytest.mark.parametrize("behind", [[], ["--checkpoint.asynchronous=true"]])
def test_on_a_full_disk_the_oldest_goes_first(behind: list[str], tiny_yaml: Path, tmp_path: Path, whole: dict) -> None:
    """Two are to be kept, and there is room for two, though not for a third before the oldest goes."""
    one = sum(file.stat().st_size for file in checkpoints_in(whole["directory"] / "part/checkpoints")[-1].iterdir())
    overrides = [f"--dir={tmp_path / 'run'}", *behind]
    (found,) = run_ranks(1, "small_disk", path=tiny_yaml, overrides=overrides, bytes_=5 * one // 2)
    if found is None:
        pytest.skip("this machine lets nobody mount a small disk")
    assert [kind for kind, _ in found["events"]] == ["checkpoint_dropped"] * 2 and found["error"] is None
    assert "step-00000003: removed" in found["events"][0][1] and found["kept"] == ["step-00000009", "step-00000010"]


def test_overlapped_parameter_gather_is_saved_whole(tiny_yaml: Path, tmp_path: Path) -> None:
    """BF16 with communication overlapped: the last update must be in the weights that are saved, and the state of each
    parameter must be its own though several buckets, padded at their ends, hold them.

    Without monitors: a window gathers parameters too.
    """
    overlap = [f"--megatron.ddp.overlap_{what}=true" for what in ("param_gather", "grad_reduce")]
    overlap.append("--megatron.ddp.bucket_size=5000")
    common = ["--training.precision=bf16", "--megatron.optimizer.overlap_param_gather=true", *overlap]
    jobs = [
        ("train", {"path": tiny_yaml, "overrides": [*common, f"--dir={tmp_path / name}", *more], "monitors": False})
        for name, more in {"whole": [], "part": ["--training.steps=5"]}.items()
    ]
    straight = [results[0] for results in run_ranks(2, "several", jobs=jobs)]
    overrides = [*common, f"--dir={tmp_path / 'part'}"]
    resumed = run_ranks(2, "train", path=tiny_yaml, overrides=overrides, monitors=False, resume=True)
    for rank, found in enumerate(resumed):
        assert found["losses"] == straight[rank]["losses"][5:] and found["digest"] == straight[rank]["digest"]


def test_directory_that_cannot_be_written_is_one_line(tiny_yaml: Path, tmp_path: Path) -> None:
    """Only rank 0 meets it; the others must not wait."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where the directory should be")
    overrides = [*EP2, f"--dir={tmp_path / 'run'}", "--training.steps=3"]
    for found in run_ranks(2, "train", path=tiny_yaml, overrides=overrides, monitors=False, timeout_s=60):
        assert found["step"] == 3 and "not saved" in found["error"]


def test_weights_move_as_adamw_says(tiny_yaml: Path, tmp_path: Path) -> None:
    """Over both stages: gradients clipped by their whole norm, decay on matrices alone, the stage's learning rate, and
    its rotary base."""
    more = ["--optimizer.clip_grad=2.0", "--optimizer.weight_decay=0.3", "--optimizer.beta1=0.8"]
    overrides = [f"--dir={tmp_path / 'run'}", *more, "--stages.lccp.lr_schedule=linear", "--stages.lccp.min_lr=1e-4"]
    (found,) = run_ranks(1, "updates", path=tiny_yaml, overrides=overrides)
    rates = [5e-4, *[1e-3] * 5, 4e-4, 3e-4, 2e-4, 1e-4]
    assert [step["lr"] for step in found["steps"]] == pytest.approx(rates)
    w = {name: value.astype(np.float64) for name, value in found["before"].items()}
    m, v = ({name: np.zeros_like(value) for name, value in w.items()} for _ in range(2))
    norms = []
    for step, (gradients, rate) in enumerate(zip(found["gradients"], rates), 1):
        norms.append(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values())))
        for name, g in gradients.items():
            g = g * min(1.0, 2.0 / norms[-1])
            m[name], v[name] = 0.8 * m[name] + 0.2 * g, 0.95 * v[name] + 0.05 * g**2
            w[name] -= rate * (0.3 * w[name] if g.ndim > 1 else 0.0)
            w[name] -= rate * m[name] / (1 - 0.8**step) / (np.sqrt(v[name] / (1 - 0.95**step)) + 1e-8)
    assert [step["grad_norm"] for step in found["steps"]] == pytest.approx(norms, rel=1e-5)
    assert min(norms) < 2 < max(norms)  # some are clipped and some are not
    for name, value in found["after"].items():
        np.testing.assert_allclose(value, w[name], atol=2e-6, err_msg=name)
    for base, step in zip([10000.0] * 6 + [50000.0] * 4, found["angles"], strict=True):
        angle = np.outer(np.arange(16), base ** -(np.arange(0, 16, 2) / 16))
        np.testing.assert_allclose(step[:, 0, 0], np.concatenate([angle, angle], axis=1), rtol=1e-5)


def test_bad_step_is_skipped_on_all_ranks_and_recorded(tiny_yaml: Path, tmp_path: Path, whole: dict) -> None:
    overrides = [*EP2, f"--dir={tmp_path / 'skip'}"]
    jobs = [
        ("train", {"path": tiny_yaml, "overrides": overrides, "monitors": False, "break_step": 2}),
        ("train", {
            "path": tiny_yaml, "overrides": [*EP2, f"--dir={tmp_path / 'stop'}", "--training.max_bad_steps=1"],
            "monitors": False, "break_step": 2,
        }),
    ]  # fmt: skip
    router = ["score_function=sigmoid", "enable_expert_bias=true"]
    biased = [*EP2, *(f"--megatron.transformer.moe_router_{field}" for field in router)]
    for steps, broken in ((3, 2), (2, None)):
        more = [f"--dir={tmp_path / f'biased{steps}'}", f"--training.steps={steps}"]
        jobs.append(("train", dict(path=tiny_yaml, overrides=[*biased, *more], monitors=False, break_step=broken)))
    for rank, (skipping, stopping, three, two) in enumerate(run_ranks(2, "several", jobs=jobs)):
        assert skipping["skipped"] == [step == 2 for step in range(STEPS)]
        assert [kind for kind, _ in skipping["events"]] == ["skipped_step"] and skipping["error"] is None
        assert np.isfinite(skipping["losses"]).all()
        # up to the bad step as ever
        assert skipping["losses"][:3] == whole["alone"][rank]["losses"][:3]
        assert stopping["step"] == 3 and "max_bad_steps" in stopping["error"]
        assert three["skipped"] == [False, False, True] and any("expert_bias" in name for name, _ in two["weights"])
        for place, weight in two["weights"].items():
            np.testing.assert_array_equal(three["weights"][place], weight, err_msg=f"rank {rank}: {place}")


def test_full_disk_is_one_line_and_loses_nothing(tiny_yaml: Path, tmp_path: Path, whole: dict) -> None:
    """A checkpoint that cannot be written is reported, the training goes on, and the earlier checkpoint stays whole."""
    run = tmp_path / "run"
    overrides = [*EP2, f"--dir={run}"]
    first = ("train", {"path": tiny_yaml, "overrides": [*overrides, "--training.steps=3"], "monitors": False})
    then = ("file_limit", {
        "bytes_": 200_000, "path": tiny_yaml, "overrides": overrides, "monitors": False, "resume": True,
    })  # fmt: skip
    for _, found in run_ranks(2, "several", jobs=[first, then]):
        assert found["start"] == 3 and found["losses"] == whole["alone"][0]["losses"][3:]
        assert {kind for kind, _ in found["events"]} == {"checkpoint_error"}
        assert all("\n" not in text and "not saved" in text for _, text in found["events"])
        assert "not saved" in found["error"]  # the last one is an error
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    for found in run_ranks(2, "train", path=tiny_yaml, overrides=overrides, monitors=False, resume=True):
        assert found["start"] == 3 and found["error"] is None


def test_a_signal_inside_a_window_is_heard_between_its_pieces(tiny_yaml: Path, tmp_path: Path) -> None:
    """It comes to one rank alone. The steps so far are saved, nothing of the window is kept, and the resume measures it.

    And a rule of the user's, which one rank alone sees, ends the run on all of them after a window. And a rank that
    the others wait for is named, with the line of code that it is in.
    """
    stopped = f"--dir={tmp_path / 'stopped'}"
    common = [*EP2, "--training.steps=4", "--monitors.0.init_args.sequences=64"]
    every = ["--monitors.0.init_args.every={steps: 4}", "--monitors.1.init_args.every={steps: 6}"]
    jobs = [
        ("stopped_in_window", {"path": tiny_yaml, "overrides": [*common, stopped], "pieces": 3}),
        ("train", {"path": tiny_yaml, "overrides": [*common, stopped], "resume": True}),
        ("train", {"path": tiny_yaml, "overrides": [*common, f"--dir={tmp_path / 'whole'}"]}),
        ("ended_by_rule", {"path": tiny_yaml, "overrides": [*EP2, f"--dir={tmp_path / 'rule'}", *every, RULE]}),
        ("late_rank", {"path": tiny_yaml, "overrides": ["--training.stall_s=4"], "told": tmp_path / "told"}),
    ]
    said: list[list] = []
    for cut, resumed, straight, ruled, late in run_ranks(2, "several", jobs=jobs):
        assert cut["code"] == 143 and cut["line"] == "stopped after step 3; the same command resumes after step 3"
        first, *pieces = cut["said"]
        assert first == "CorpusPPL"
        assert [text.partition(",")[0] for text in pieces] == ["CorpusPPL code 25%", "CorpusPPL code 50%"]
        assert cut["windows"] == [0] and cut["step"] == 3 and cut["training"]
        assert resumed["start"] == 3 and resumed["losses"] == straight["losses"][3:]
        ours, theirs = (_values(found["rows"], from_step=3) for found in (resumed, straight))
        assert ours == theirs and {step for step, *_ in ours} == {3, 4}
        assert ruled["step"] == ruled["saved"] == 4 and ruled["ended"] == "the rule"
        assert ruled["events"] == [("stop_when", "the rule")]
        assert ruled["last"] == ["CorpusPPL", "NeedleGrid", "RetrievalHeads"]  # CorpusPPL alone was due
        said.append(late)
    assert {kind for kind, _ in said[0]} == {"stall"} and not said[1]
    text = said[0][0][1]
    assert re.match(r"step 1: nothing has moved for \d+ s; rank 1 \(.+, pid \d+\) has not arrived, in step 1 at ", text)
    assert "(late_rank)" in text


RULE = "--stop_when=[{states: {nll: saturated}}]"


def _values(rows: list[dict], from_step: int) -> list[tuple]:
    """What was measured from a step on, but for how long it took."""
    kept = [row for row in rows if row["step"] >= from_step and row["metric"] != "window_time"]
    return [(row["step"], row["monitor"], row["metric"], row["sample"], row["head"], row["value"]) for row in kept]


def test_a_run_directory_that_is_removed_in_a_save_is_one_line(tiny_yaml: Path, tmp_path: Path) -> None:
    """One rank alone meets it, while the other waits for it in the middle of Megatron-Core's save."""
    overrides = [*EP2, f"--dir={tmp_path / 'run'}", "--training.steps=1"]
    first, other = run_ranks(2, "removed_in_save", path=tiny_yaml, overrides=overrides, timeout_s=60)
    assert first.startswith("RanksApart") and "not saved" in first and "\n" not in first
    assert "another rank ended" in other and "\n" not in other
