"""One model, one batch, every layout: the same loss, gradients and monitor rows as on one rank, in FP32.

Tolerance: a gradient may differ by 2e-4 of its tensor's largest entry, a loss or row by 2e-5; what differs between
layouts is the order of sums.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint

from megatron_lccp.config.rules import silent_expert_defect
from megatron_lccp.config.tree import ParallelConfig
from megatron_lccp.model.vocabulary import VOCABULARY_TENSORS
from megatron_lccp.parallel.compat import MEGATRON_VERSION
from tests.distributed.ranks import run_ranks
from tests.suite import suite

GRADIENT_TOLERANCE = 2e-4
VALUE_TOLERANCE = 2e-5
LAYOUTS = {
    "one rank": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "EP2": (2, {"expert": 2}),
    "TP2xEP2": (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
    "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "CP4": (4, {"context": 4}),
    "TP2xCP2": (4, {"tensor": 2, "context": 2}),
    "CP2xPP2": (4, {"context": 2, "pipeline": 2}),
    "CP2xEP2": (2, {"context": 2, "expert": 2}),
    "TP2xEP2xETP2": (4, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "TP2xPP2xEP2": (4, {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1}),
}
WHOLE_EXPERTS = ParallelConfig(tensor=2, expert_tensor=1)
if not silent_expert_defect(WHOLE_EXPERTS, MEGATRON_VERSION):  # 0.16.1 would be wrong, and refuses (test_config.py)
    LAYOUTS["TP2xETP1"] = (2, {"tensor": 2, "expert_tensor": 1})
# Layouts whose losses come from some logits at a time, a number that does not divide a sequence.
IN_CHUNKS = ("one rank", "TP2", "TP2xCP2", "TP2xPP2xEP2")


@pytest.fixture(scope="module")
def batch() -> np.ndarray:
    return np.random.default_rng(0).integers(4, 700, size=(4, 65))


PACKS = ((21, 30, 37), (96,), (5, 2, 40, 33), (50, 17, 10))
"""Tokens of the documents of each of four sequences; padded to multiples of 8, which CP4 cuts, they are 96 each."""


def in_packs(documents: list[list[np.ndarray]]) -> list[dict]:
    """A step of one sequence per micro-batch, each of some documents with padding behind them."""
    labels = sum(len(document) - 1 for pack in documents for document in pack)
    packs = []
    for pack in documents:
        tokens, targets, weight, padding, bounds = [], [], [], [], [0]
        for document in pack:
            count, room = len(document), -(-len(document) // 8) * 8
            tokens += [*document, *[3] * (room - count)]
            targets += [*document[1:], *[3] * (room - count + 1)]
            weight += [len(documents) / labels] * (count - 1) + [0.0] * (room - count + 1)
            padding += [False] * count + [True] * (room - count)
            bounds.append(bounds[-1] + room)
        of: dict[str, Any] = {
            "tokens": tokens,
            "labels": targets,
            "loss_weight": np.array(weight, np.float32),
            "padding": padding,
        }
        packs.append({key: np.array([values]) for key, values in of.items()} | {"bounds": tuple(bounds)})
    return packs


def alone(documents: list[list[np.ndarray]]) -> list[dict]:
    """The same step, each document a micro-batch of its own, without padding and with nothing to be told of."""
    every = [document for pack in documents for document in pack]
    weight = len(every) / sum(len(document) - 1 for document in every)
    return [
        {"tokens": d[None, :-1], "labels": d[None, 1:], "loss_weight": np.full((1, len(d) - 1), weight, np.float32)}
        for d in every
    ]


@pytest.fixture(scope="module")
def documents() -> list[list[np.ndarray]]:
    rng = np.random.default_rng(1)
    return [[rng.integers(4, 700, size=count) for count in pack] for pack in PACKS]


@pytest.fixture(scope="module")
def reference(tiny_yaml: Path, base: str, batch: np.ndarray, documents: list) -> dict:
    """One rank, and a forward of its own for every sample and document: what shared prefills, and packed documents, on
    any layout must equal."""
    overrides = [base, suite(share=False)]
    return run_ranks(1, "layout", path=tiny_yaml, overrides=overrides, tokens=batch, packs=alone(documents))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(
    name: str, tiny_yaml: Path, base: str, batch: np.ndarray, documents: list, reference: dict
) -> None:
    ranks, sizes = LAYOUTS[name]
    overrides = [base, suite(), *(f"--parallel.{key}={value}" for key, value in sizes.items())]
    if name in IN_CHUNKS:
        overrides.append("--training.loss_chunk_tok=12")
    given: dict[str, Any] = {"path": tiny_yaml, "overrides": overrides, "tokens": batch, "packs": in_packs(documents)}
    for rank, found in enumerate(run_ranks(ranks, "layout", **given)):
        where = f"{name} rank {rank}"
        assert_shards_of(found["weights"], reference["weights"], 0.0, where)
        for packed in ("", "packed_"):
            loss, gradients = f"{packed}loss", f"{packed}gradients"
            assert abs(found[loss] - reference[loss]) < VALUE_TOLERANCE, (where, loss, found[loss], reference[loss])
            assert_shards_of(found[gradients], reference[gradients], GRADIENT_TOLERANCE, f"{where}, {gradients}")
        assert_rows_equal(found["rows"], reference["rows"], where)
        for (key, offset), gradient in found["gradients"].items():
            if key.endswith(VOCABULARY_TENSORS):  # 700 tokens, of which the batch has most, and 4 rows of padding
                assert not gradient[max(700 - offset[0], 0) :].any() and gradient[:700].any(), where


def test_interleaved_pipeline_equals_one_rank(tiny_yaml: Path, batch: np.ndarray, tmp_path: Path) -> None:
    """PP2 with two chunks a rank; it needs four layers."""
    base = str(tmp_path / "base.safetensors")
    overrides = ["--megatron.transformer.num_layers=4", f"--model.init_from={base}"]
    jobs = [
        ("save_base", {"path": tiny_yaml, "overrides": overrides[:1], "base": base}),
        ("layout", {"path": tiny_yaml, "overrides": [*overrides, suite(share=False)], "tokens": batch}),
    ]
    reference = run_ranks(1, "several", jobs=jobs)[0][1]
    overrides += [suite(), "--parallel.pipeline=2", "--parallel.virtual_pipeline=2"]
    for rank, found in enumerate(run_ranks(2, "layout", path=tiny_yaml, overrides=overrides, tokens=batch)):
        assert abs(found["loss"] - reference["loss"]) < VALUE_TOLERANCE
        assert_shards_of(found["gradients"], reference["gradients"], GRADIENT_TOLERANCE, f"PP2 VPP2 rank {rank}")
        assert_rows_equal(found["rows"], reference["rows"], f"PP2 VPP2 rank {rank}")


GLM = ["--model.family=tiny_glm45", "--megatron.transformer.num_layers=4", "--megatron.transformer.moe_router_topk=2"]
GLM_LAYOUTS = {
    "TP2xEP2": (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}),
    "CP2xPP2": (4, {"context": 2, "pipeline": 2}),
    "PP2, three layers in the first stage": (2, {"pipeline": 2}),
}


def test_unequal_layers_equal_one_rank(tiny_yaml: Path, batch: np.ndarray, tmp_path: Path) -> None:
    """A dense first layer, biases of queries, keys and values, half-turned heads, and router biases, which move."""
    base = str(tmp_path / "base.safetensors")
    overrides = [*GLM, f"--model.init_from={base}"]
    jobs = [
        ("save_base", {"path": tiny_yaml, "overrides": GLM, "base": base}),
        ("layout", {"path": tiny_yaml, "overrides": [*overrides, suite(share=False)], "tokens": batch}),
    ]
    reference = run_ranks(1, "several", jobs=jobs)[0][1]
    biases = [key for key, _ in reference["weights"] if key.endswith("router.expert_bias")]
    assert sorted(biases) == [f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (1, 2, 3)]
    for name, (ranks, sizes) in GLM_LAYOUTS.items():
        more = [suite(), *(f"--parallel.{key}={value}" for key, value in sizes.items())]
        if "three" in name:
            more.append("--megatron.transformer.num_layers_in_first_pipeline_stage=3")
        for rank, found in enumerate(
            run_ranks(ranks, "layout", path=tiny_yaml, overrides=overrides + more, tokens=batch)
        ):
            where = f"{name} rank {rank}"
            assert abs(found["loss"] - reference["loss"]) < VALUE_TOLERANCE, where
            assert_shards_of(found["weights"], reference["weights"], 0.0, where)
            assert_shards_of(found["gradients"], reference["gradients"], GRADIENT_TOLERANCE, where)
            assert_rows_equal(found["rows"], reference["rows"], where)
    moved = [abs(reference["gradients"][key, (0,)] - reference["weights"][key, (0,)]) for key in biases]
    assert np.allclose(moved, 1e-3, rtol=1e-3)  # Megatron-Core's moe_router_bias_update_rate


def test_padded_capacity_equals_one_rank(tiny_yaml: Path, base: str, batch: np.ndarray) -> None:
    """Experts on two ranks exchange as many tokens as capacity says, so lengths must be alike; nothing is dropped.

    And where every rank is sent all tokens, as many as it has itself.
    """
    factor = "--megatron.transformer.moe_expert_capacity_factor"
    capacity = [f"{factor}=2.0", base, suite()]  # experts / top-k: room for every token
    capacity += ["--megatron.transformer.moe_pad_expert_input_to_capacity=true"]
    dropping = [[f"{factor}=1.0", base, suite(share)] for share in (True, False)]
    jobs = [("layout", dict(path=tiny_yaml, overrides=o, tokens=batch)) for o in (capacity, *dropping)]
    ((one, drop, alone),) = run_ranks(1, "several", jobs=jobs)
    assert_rows_equal(drop["rows"], alone["rows"], "where tokens are dropped, nothing is shared")
    ways = {
        "capacity": capacity,
        "allgather": [base, suite(), "--megatron.transformer.moe_token_dispatcher_type=allgather"],
    }
    jobs = [
        ("layout", dict(path=tiny_yaml, overrides=[*o, "--parallel.expert=2"], tokens=batch)) for o in ways.values()
    ]
    for rank, found in enumerate(run_ranks(2, "several", jobs=jobs)):
        for way, result in zip(ways, found):
            assert_rows_equal(result["rows"], one["rows"], f"{way}, EP2 rank {rank}")


SELECTIVE = "--megatron.transformer.recompute_granularity=selective"
RECOMPUTED = {"moe": [["layernorm", "moe"], ["layernorm", "shared_experts"]], "dense": [["layernorm", "mlp"]]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_recomputation_changes_nothing(ranks: int, tiny_yaml: Path, base: str, batch: np.ndarray) -> None:
    """Nothing but the order of two sums: loss and gradients are those without it, on as many tensor-parallel ranks."""
    common = ["--monitors=[]", f"--parallel.tensor={ranks}"]
    models = {"moe": [base, *common], "dense": ["--model.family=tiny_qwen3", "--megatron.transformer={}", *common]}
    jobs, cases = [], []
    for name, overrides in models.items():
        for modules in [None, *RECOMPUTED[name]]:
            more = [SELECTIVE, f"--megatron.transformer.recompute_modules={modules}"] if modules else []
            jobs.append(("layout", {"path": tiny_yaml, "overrides": [*overrides, *more], "tokens": batch}))
            cases.append((name, modules))
    for rank, found in enumerate(run_ranks(ranks, "several", jobs=jobs)):
        without = {name: result for (name, modules), result in zip(cases, found) if modules is None}
        for (name, modules), result in zip(cases, found):
            where = f"{name}, rank {rank}, {modules}"
            assert result["loss"] == without[name]["loss"], where
            assert result["gradients"].keys() == without[name]["gradients"].keys(), where
            for place, expected in without[name]["gradients"].items():
                atol = 1e-5 * np.abs(expected).max()
                np.testing.assert_allclose(result["gradients"][place], expected, 0, atol, err_msg=f"{where}: {place}")


@pytest.mark.skipif(MEGATRON_VERSION.startswith("0.16."), reason="0.16.1 scales no logits")
def test_losses_in_chunks_are_of_the_scaled_logits(tiny_yaml: Path, batch: np.ndarray) -> None:
    mup = '--megatron.transformer={"use_mup": true, "mup_base_hidden_size": 32}'
    overrides = ["--model.family=tiny_qwen3", mup, "--monitors=[]"]
    jobs = [
        ("layout", {"path": tiny_yaml, "overrides": [*overrides, *more], "tokens": batch})
        for more in ([], ["--training.loss_chunk_tok=12"])
    ]
    ((whole, chunked),) = run_ranks(1, "several", jobs=jobs)
    assert abs(chunked["loss"] - whole["loss"]) < VALUE_TOLERANCE
    assert_shards_of(chunked["gradients"], whole["gradients"], GRADIENT_TOLERANCE, "in chunks")


def assert_shards_of(shards: dict, whole: dict, tolerance: float, where: str) -> None:
    """Every shard is the piece of the reference's tensor at its place; the reference holds one rank's shards."""
    full = assemble(whole)
    assert shards, where
    for (key, offset), shard in shards.items():
        reference = full[key]
        shape = (1,) * (reference.ndim - shard.ndim) + shard.shape
        piece = reference[tuple(slice(o, o + n) for o, n in zip(offset, shape))].reshape(shard.shape)
        worst, scale = np.abs(shard - piece).max(), np.abs(reference).max()
        assert worst <= tolerance * scale, f"{where}: {key} at {offset} differs by {worst:.3g} of {scale:.3g}"


def assemble(shards: dict) -> dict[str, np.ndarray]:
    """Name -> whole tensor, of the shards of a model that one rank holds."""
    shapes: dict[str, np.ndarray] = {}
    for (key, offset), shard in shards.items():
        shape = (1,) * (len(offset) - shard.ndim) + shard.shape
        end = np.array(offset) + shape
        shapes[key] = np.maximum(shapes.get(key, end), end)
    full = {key: np.full(shape, np.nan, dtype=np.float32) for key, shape in shapes.items()}
    for (key, offset), shard in shards.items():
        shape = (1,) * (len(offset) - shard.ndim) + shard.shape
        full[key][tuple(slice(o, o + n) for o, n in zip(offset, shape))] = shard.reshape(shape)
    assert not any(np.isnan(tensor).any() for tensor in full.values())
    return full


def assert_rows_equal(rows: list[dict], reference: list[dict], where: str) -> None:
    measured = [row for row in rows if row["metric"] != "window_time"]
    expected = [row for row in reference if row["metric"] != "window_time"]
    assert len(measured) == len(expected) > 100, where
    for row, other in zip(measured, expected):
        assert {**row, "value": 0} == {**other, "value": 0}, where
        scale = max(1.0, abs(other["value"]))
        assert abs(row["value"] - other["value"]) < VALUE_TOLERANCE * scale, f"{where}: {row} against {other['value']}"


def test_pipeline_stages_start_different_and_fail_together(tiny_yaml: Path, tmp_path: Path) -> None:
    """Stages seeded alike would give layer k of each the same weights.

    And a rank that alone cannot read its weights leaves no other rank waiting.
    """
    base, about = tmp_path / "base", {"sha256": {}, "format": 1}
    contents: dict[str, dict] = {"whole": {}, "trained": {"position": {}}}
    for name, more in contents.items():
        checkpoint.save({"x": torch.ones(2)}, checkpoint_id=base / name)
        (base / name / "checkpoint.json").write_text(json.dumps({"about": {}, **about, **more}))
    (base / "checkpoint.json").write_text(json.dumps({"about": {}, **about}))
    save_file({"x": torch.ones(2)}, f"{base}.safetensors")
    sizes = ["--parallel.pipeline=2", "--megatron.transformer.num_layers=4"]
    common = {"path": tiny_yaml, "overrides": sizes}
    jobs = [("initial_weights", common), ("unreadable_on_one_rank", {**common, "base": str(base)})]
    (first, said), (second, by_other) = run_ranks(2, "several", jobs=jobs)
    routers: dict = {}
    for shards in (first, second):
        routers |= {place[1][0]: shard.tobytes() for place, shard in shards.items() if "router" in place[0]}
    assert len(routers) == len(set(routers.values())) == 4
    assert said == by_other and all(".absent: " in text for _, text in said), said
    assert [kind for kind, _ in said] == ["ValueError", "ValueError", "DamagedCheckpoint", "DamagedCheckpoint"]


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [(2, ["--parallel.expert=2"]), (4, ["--parallel.tensor=2", "--parallel.expert=2", "--parallel.expert_tensor=1"])],
)
def test_replicas_start_identical(ranks: int, sizes: list[str], tiny_yaml: Path) -> None:
    """Where two ranks hold the same shard, they drew the same numbers, and different experts drew different ones."""
    held: dict = {}
    experts = set()
    for rank, shards in enumerate(run_ranks(ranks, "initial_weights", path=tiny_yaml, overrides=sizes)):
        for place, shard in shards.items():
            if place in held:
                np.testing.assert_array_equal(
                    shard, held[place][1], err_msg=f"ranks {held[place][0]} and {rank}: {place}"
                )
            held[place] = (rank, shard)
            if "experts.experts.linear_fc2" in place[0]:
                experts.add(shard.tobytes())
    assert len(experts) == len([place for place in held if "experts.experts.linear_fc2" in place[0]])
