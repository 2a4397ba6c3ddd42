"""Transformer Engine's layers beside portable ones: the same model under the same names, in the same place.

Without a GPU they are built, counted, saved and loaded; what needs one to run says so and is skipped.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.test_layouts import GRADIENT_TOLERANCE, VALUE_TOLERANCE, assert_rows_equal, assert_shards_of
from tests.suite import suite

ROOT = Path(__file__).resolve().parents[2]
HUNYUAN = ROOT / "examples/hunyuan_a13b_64k.yaml"
PLAIN = ("--megatron={}", "--model.init_from=null", "--parallel.virtual_pipeline=null", "--parallel.context=1")


def _has_te() -> bool:
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    import torch  # noqa: F401  (loads NCCL, which Transformer Engine 2.20 looks for)

    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, RuntimeError, OSError, AssertionError):  # parts of it, or the CUDA libraries it loads
        return False
    return True


needs_te = pytest.mark.skipif(not _has_te(), reason="Transformer Engine is not installed")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


needs_gpu = pytest.mark.skipif(not _has_gpu(), reason="no GPU is here")

ALONE = tuple(f"--parallel.{name}=1" for name in ("tensor", "pipeline", "expert"))
CASES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "Hunyuan-A13B": ((*PLAIN, *ALONE), 1, 0),
    "TP4 PP8 EP8, first stage": (PLAIN, 256, 1),
    "TP4 PP8 EP8, last stage": (PLAIN, 256, 255),
    "TP2 PP2 VPP2 EP4 CP2 ETP1": (
        (*PLAIN, "--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.virtual_pipeline=2",
         "--parallel.expert=4", "--parallel.context=2", "--parallel.expert_tensor=1"), 64, 33,
    ),
    "Qwen3-30B-A3B TP2 PP4 EP8": (
        (*PLAIN, "--model.family=qwen3_30b_a3b", "--parallel.tensor=2", "--parallel.pipeline=4", "--parallel.expert=8"),
        64, 9,
    ),
    "Qwen3 TP2": ((*PLAIN, *ALONE, "--model.family=tiny_qwen3", "--parallel.tensor=2"), 2, 1),
    "Llama 3.1 PP2": ((*PLAIN, *ALONE, "--model.family=tiny_llama31", "--parallel.pipeline=2"), 2, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, Any]]:
    return run_ranks(1, "te_jobs.built", timeout_s=500, path=HUNYUAN, cases=CASES)[0]


@needs_te
@pytest.mark.parametrize("name", CASES)
def test_both_kinds_of_layers_keep_the_same(name: str, built: dict) -> None:
    """Every tensor and object of a checkpoint has one name, shape and place, and is on the same rank."""
    portable, te = built[name]["portable"], built[name]["transformer_engine"]
    assert te["kept"] == portable["kept"] and len(te["kept"]) > 10
    assert te["count"] == portable["count"]
    assert te["bytes"] == portable["bytes"]  # which `lccp plan` predicts
    assert sum(np.prod(shape) for _, shape in te["names"]) == sum(np.prod(shape) for _, shape in portable["names"])
    if name == "Hunyuan-A13B":
        padding = (128256 - 128167) * 4096
        assert te["count"] == (80_393_183_232 + padding, 12_747_448_320 + padding)


@needs_te
@pytest.mark.parametrize("name", CASES)
def test_layers_are_transformer_engines(name: str, built: dict) -> None:
    te, portable = built[name]["transformer_engine"], built[name]["portable"]
    moe = any("router" in parameter for parameter, _ in te["names"])
    linear = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
    assert linear | ({"TEGroupedMLP"} if moe else set()) <= te["parts"]
    assert not {"ColumnParallelLinear", "RowParallelLinear", "RMSNorm", "PortableAttention", "SequentialMLP"} & (
        te["parts"] - {"ColumnParallelLinear"}  # the output layer
    )
    assert not any(part.startswith("TE") for part in portable["parts"])
    after_rope = "Hunyuan" in name or name.startswith("TP")
    assert (te["attention"] == "NormAfterRope") is after_rope
    # one gradient sum each: experts over their own ranks, norms over tensor-parallel ranks
    experts = {parameter for parameter, _ in te["names"] if ".experts." in parameter}
    assert te["expert"] in (experts, set()) and bool(te["expert"]) is bool(portable["expert"])
    if "TP" in name:
        norms = {parameter for parameter, _ in te["names"] if "norm" in parameter}
        assert norms <= te["parallel"]


T = "--megatron.transformer."
CONTEXT: dict[str, tuple[str, ...]] = {
    **{kind: (f"{T}cp_comm_type={kind}",) for kind in ("p2p", "all_gather", "a2a")},
    "a2a+p2p": (f"{T}cp_comm_type=a2a+p2p", "--parallel.context_levels=[2, 2]"),
    "by layer": (f"{T}cp_comm_type=[p2p, a2a, all_gather, p2p]",),
    "by default": (),
}


@pytest.mark.parametrize("attention", ["portable", pytest.param("transformer_engine", marks=needs_te)])
def test_each_layer_is_told_how_context_is_parallel(attention: str, tiny_yaml: Path) -> None:
    """On the third rank of the second of two stages, whose layers are the third and fourth of the model."""
    layers, its = [f"{T}num_layers=4", f"{T}num_query_groups=4"], attention == "transformer_engine"
    cases = {name: [*layers, *more] for name, more in CONTEXT.items() if its or name != "a2a+p2p"}  # wants einops
    found = run_ranks(1, "te_jobs.context_parallel", path=tiny_yaml, cases=cases, attention=attention)[0]
    for name in cases:
        told = {layer: here["kind"] for layer, here in found[name].items()}
        default = "p2p" if its else None
        expected = {"by layer": {2: "all_gather", 3: "p2p"}, "by default": {2: default, 3: default}}
        assert told == expected.get(name, {2: name, 3: name}), name
        for here in found[name].values() if its else ():
            groups = [[6, 7], [4, 6]] if name == "a2a+p2p" else [[4, 5, 6, 7]]
            assert (here["groups"], here["ranks"], here["stream"]) == (groups, [4, 5, 6, 7], True), name
            assert here["te"] == "TEDotProductAttention"


@needs_te
@pytest.mark.parametrize("family", ["tiny_moe", "tiny_qwen3_moe", "tiny_llama3"])
def test_weights_land_where_they_belong(family: str, tiny_yaml: Path, tmp_path: Path) -> None:
    overrides = [f"--model.family={family}", "--megatron={}"]
    found = run_ranks(1, "te_jobs.carried", path=tiny_yaml, overrides=overrides, directory=tmp_path)[0]
    for route in ("file to te", "checkpoint to te", "checkpoint to portable"):
        assert found[route].keys() == found["drawn"].keys()
        for key, value in found["drawn"].items():
            assert np.array_equal(found[route][key], value), (route, key)
    te, portable = found["te"], found["portable"]
    layer = "decoder.layers.1."
    pairs = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
    }
    if family == "tiny_llama3":
        pairs |= {"mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}
        pairs |= {name: name for name in ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")}
    else:
        inside = "core_attention." if family == "tiny_moe" else ""
        for name in ("q_layernorm", "k_layernorm"):
            pairs[f"self_attention.{inside}{name}.weight"] = f"self_attention.{inside}{name}.weight"
        pairs |= {"pre_mlp_layernorm.weight": "pre_mlp_layernorm.weight", "mlp.router.weight": "mlp.router.weight"}
        for expert in range(8):
            for fc in ("linear_fc1", "linear_fc2"):
                pairs[f"mlp.experts.{fc}.weight{expert}"] = f"mlp.experts.local_experts.{expert}.{fc}.weight"
    for ours, theirs in pairs.items():
        assert np.array_equal(te[layer + ours], portable[layer + theirs]), ours
        assert te[layer + ours].std() > 0


@needs_te
def test_a_window_leaves_delayed_scaling_as_it_was() -> None:
    found = run_ranks(1, "te_jobs.scales_around_a_window")[0]
    for name, asked in (("bf16", None), ("fp8", "hybrid")):
        history, scale, saved, _ = found[name]["before"]
        assert history[0] == [3.0] * 3 and scale == [7.0] * 3 and saved
        assert found[name]["asked"] == asked and found[name]["config"] == "hybrid"
        assert found[name]["after"] == found[name]["before"]
        assert found[name]["without"] != found[name]["before"]  # so it takes something to hold them
        assert found[name]["resumed"] == found[name]["before"]


@needs_te
def test_scales_of_delayed_scaling_go_through_a_checkpoint(tiny_yaml: Path, tmp_path: Path) -> None:
    found = run_ranks(1, "te_jobs.scales_through_a_checkpoint", path=tiny_yaml, directory=tmp_path)[0]
    assert found["none yet"] and found["before"].keys() == found["after"].keys()
    experts = [name for name in found["before"] if "experts.linear_fc" in name]
    assert len(experts) == 2 * 2 * 2 * 2 * 2  # layers; shared or not; fc1, fc2; forward, backward; scale, history
    for name, expected in found["before"].items():
        assert np.array_equal(found["after"][name], expected), name


@needs_te
@pytest.mark.skipif(_has_gpu(), reason="there it is Transformer Engine's optimizer")
def test_training_and_resuming_on_a_cpu_do_without(tiny_yaml: Path, tmp_path: Path) -> None:
    """Its Adam, norms of gradients and clipping are kernels of a GPU; so a cluster's image trains on its login node."""
    stop, on = (["--monitors=[]", f"--dir={tmp_path}", f"--training.steps={steps}"] for steps in (2, 4))
    jobs = [
        ("train", {"path": tiny_yaml, "overrides": stop}),
        ("train", {"path": tiny_yaml, "overrides": on, "resume": True}),
    ]
    first, second = run_ranks(1, "several", jobs=jobs)[0]
    assert first["error"] is None and second["error"] is None
    assert (first["step"], second["start"], second["step"]) == (2, 2, 4)
    assert np.isfinite([*first["losses"], *second["losses"]]).all()


@needs_te
@pytest.mark.skipif(_has_gpu(), reason="there the GPU tests say it")
@pytest.mark.parametrize("tensor", [1, 2])
def test_its_attention_is_ours_on_a_cpu_too(tensor: int, tiny_yaml: Path, tmp_path: Path) -> None:
    """Its core attention, in FP32 plain PyTorch, in the same model: loss, gradients, monitors, taps, zeroed heads."""
    base, tokens = str(tmp_path / "base.safetensors"), np.random.default_rng(0).integers(4, 700, size=(4, 65))
    run_ranks(1, "save_base", path=tiny_yaml, overrides=[], base=base)
    overrides = [f"--model.init_from={base}", suite(share=False), f"--parallel.tensor={tensor}"]
    for rank, found in enumerate(
        run_ranks(tensor, "te_jobs.attentions", path=tiny_yaml, overrides=overrides, tokens=tokens)
    ):
        ours, its = found["portable"], found["transformer_engine"]
        assert its["kernels"] == {"UnfusedDotProductAttention"} and not ours["kernels"]
        assert its["loss"] == pytest.approx(ours["loss"], abs=VALUE_TOLERANCE)
        for place, expected in ours["gradients"].items():
            atol = GRADIENT_TOLERANCE * np.abs(expected).max()
            np.testing.assert_allclose(its["gradients"][place], expected, 0, atol, err_msg=str(place))
        assert_rows_equal(its["rows"], ours["rows"], f"rank {rank}")
        for layer, (query, key, scale) in ours["seen"].items():
            assert query.shape == (64, 4, 4 // tensor, 16) and scale == 0.25
            np.testing.assert_allclose(its["seen"][layer][0], query, atol=1e-5)
            np.testing.assert_allclose(its["seen"][layer][1], key, atol=1e-5)
        np.testing.assert_allclose(its["logits"], ours["logits"], atol=1e-4)
        np.testing.assert_allclose(its["without"], ours["without"], atol=1e-4)
        assert np.abs(its["without"] - its["logits"]).max() > 1e-2


LEVELS = "--parallel.context_levels=[2, 2]"
P2P, GATHER, A2A = (f"AttnFuncWithCPAnd{name}" for name in ("KVP2P", "KVAllGather", "QKVOA2A"))
GROUPS = f"{T}num_query_groups=4"
COMM: dict[str, tuple[int, bool, set[str], tuple[str, ...]]] = {
    "by default": (2, False, {P2P}, ()),
    "all_gather": (2, True, {GATHER}, (f"{T}cp_comm_type=all_gather",)),
    "a2a": (2, False, {A2A}, (f"{T}cp_comm_type=a2a",)),
    "by layer, TP2": (4, True, {A2A, P2P}, (f"{T}cp_comm_type=[a2a, p2p]", GROUPS, "--parallel.tensor=2")),
    "a2a+p2p": (4, False, {P2P}, (f"{T}cp_comm_type=a2a+p2p", LEVELS, "--parallel.context=4")),
}
"""By name: ranks, whether prefills are shared, which exchanges run, overrides."""


@needs_te
@pytest.mark.skipif(_has_gpu(), reason="its kernels are FlashAttention's own there")
@pytest.mark.parametrize("name", COMM)
def test_its_context_parallelism_is_ours(name: str, tiny_yaml: Path, tmp_path: Path) -> None:
    """Every cp_comm_type, forward and backward, and monitors through the same tap, against one rank.

    Exchange, order of chunks, corrections and backward are Transformer Engine's; the kernel between is
    flash_on_cpu.py's.
    """
    ranks, share, exchanges, more = COMM[name]
    base, tokens = str(tmp_path / "base.safetensors"), np.random.default_rng(0).integers(4, 700, size=(4, 65))
    model = [GROUPS] if GROUPS in more else []
    alone = [f"--model.init_from={base}", suite(share=False), *model]
    jobs = [
        ("save_base", {"path": tiny_yaml, "overrides": model, "base": base}),
        ("layout", {"path": tiny_yaml, "overrides": alone, "tokens": tokens}),
    ]
    _, reference = run_ranks(1, "several", jobs=jobs)[0]
    overrides = [*alone, suite(share), "--parallel.context=2", *more]
    for rank, found in enumerate(
        run_ranks(ranks, "te_jobs.context_attention", path=tiny_yaml, overrides=overrides, tokens=tokens)
    ):
        assert found["kernels"] == {"FlashAttention"} and found["exchanges"] == exchanges
        assert abs(found["loss"] - reference["loss"]) < VALUE_TOLERANCE
        assert_shards_of(found["gradients"], reference["gradients"], GRADIENT_TOLERANCE, f"{name} rank {rank}")
        assert_rows_equal(found["rows"], reference["rows"], f"{name} rank {rank}")


@needs_te
@needs_gpu
@pytest.mark.gpu
def test_on_a_gpu_both_kinds_of_layers_and_every_recipe_agree(tiny_yaml: Path, tmp_path: Path) -> None:
    """Loss, gradients and monitor rows of one batch from one set of weights.

    BF16 keeps 8 bits: losses agree to 1 %, the gradient as a whole to 10 %, in FP8 (3 or 4 bits) to 3 % and 40 %; in
    the second pass, for in its first one delayed scaling has no scales, and gradients as small as these are lost. What
    monitors say of a model that trains in FP8 is measured in BF16, so it is what they say of the BF16 one.
    """
    base = str(tmp_path / "base.safetensors")
    common = ["--megatron={}", "--training.precision=bf16", suite()]
    tokens = np.random.default_rng(0).integers(4, 700, size=(4, 65))

    def layout(*more: str) -> tuple[str, dict]:
        return "layout", {
            "path": tiny_yaml, "tokens": tokens, "passes": 2,
            "overrides": [*common, f"--model.init_from={base}", *more],
        }  # fmt: skip

    te, recipes = "--model.layers=transformer_engine", ("delayed", "tensorwise", "blockwise")
    jobs = [
        ("save_base", {"path": tiny_yaml, "overrides": [*common, "--model.layers=portable"], "base": base}),
        layout("--model.layers=portable"), layout(te), *(layout(te, f"--training.fp8={fp8}") for fp8 in recipes),
    ]  # fmt: skip
    _, portable, bf16, *fp8s = run_ranks(1, "several", timeout_s=500, jobs=jobs)[0]

    def gradient(found: dict) -> np.ndarray:
        return np.concatenate([found["gradients"][key].ravel() for key in sorted(portable["gradients"])])

    for name, found, loss, share in (("te", bf16, 0.01, 0.1), *((r, f, 0.03, 0.4) for r, f in zip(recipes, fp8s))):
        assert found["loss"] == pytest.approx(portable["loss"], rel=loss), name
        difference = np.linalg.norm(gradient(found) - gradient(portable)) / np.linalg.norm(gradient(portable))
        assert difference < share, (name, difference)
        assert len(found["rows"]) == len(portable["rows"]), name
    for name, found in zip(recipes, fp8s):
        assert gradient(found).tolist() != gradient(bf16).tolist(), name  # so it did run in FP8
        for row, expected in zip(found["rows"], bf16["rows"]):
            if row["metric"] in ("nll", "answer_nll"):
                assert row["value"] == pytest.approx(expected["value"], rel=1e-3), (name, row)


@needs_te
@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("measure_in", ["bf16", "fp8"])
def test_on_a_gpu_steps_under_delayed_scaling_do_not_notice_windows(
    measure_in: str, tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    fp8 = [
        "--megatron={}",
        "--training.precision=bf16",
        "--training.fp8=delayed",
        f"--training.measure_in={measure_in}",
    ]
    jobs = [
        ("train", {"path": tiny_yaml, "overrides": [*fp8, f"--dir={tmp_path / str(on)}"], "monitors": on})
        for on in (True, False)
    ]
    watched, alone = run_ranks(1, "several", timeout_s=500, jobs=jobs)[0]
    assert watched["error"] is None and alone["error"] is None
    assert watched["losses"] == alone["losses"] and watched["digest"] == alone["digest"]
    assert watched["rows"] and not alone["rows"]


@needs_te
def test_a_dry_run_does_without(tiny_yaml: Path) -> None:
    """In a new process, as a user starts it: what of Transformer Engine wants a GPU is not touched."""
    command = [sys.executable, "-m", "megatron_lccp.cli", "train", str(tiny_yaml), "--dry-run", "--monitors=[]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0 and "no findings" in done.stdout, done.stderr


@needs_te
def test_extra_state_is_read_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine unpickles its own extra state, out of a tensor; in a checkpoint it can run nothing.

    From 2.20 on it wants to be told; `data_only` tells it, and no longer does when it is closed.
    """
    import torch
    import transformer_engine.pytorch as te

    from megatron_lccp.parallel.unpickle import data_only
    from tests.parallel.test_unpickle import Touch

    trap, module = tmp_path / "sprung", te.Linear.__new__(te.Linear)  # its state is read before the module is looked at
    evil = torch.frombuffer(bytearray(pickle.dumps(Touch(trap))), dtype=torch.uint8)
    with pytest.raises(ValueError, match="a file there is more than data"), data_only(tmp_path):
        module.set_extra_state(evil)
    assert not trap.exists() and "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE" not in os.environ
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    with contextlib.suppress(AttributeError, TypeError):  # what it made is no state
        module.set_extra_state(evil)
    assert trap.exists()
