"""`lccp plan`: what it predicts from sizes is what Megatron-Core builds, byte for byte; its FLOPs are the known ones.

Parameters, buffers and optimizer are compared on fake ranks with meta tensors; activations, whose peak only a GPU could
measure, by what layers save for their backward on CPU ranks.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_lccp.cli import OPTIONS, main
from megatron_lccp.config.load import ConfigError, parse_config
from megatron_lccp.config.tree import Config
from megatron_lccp.measuring.flops import forward_flops
from megatron_lccp.model.resolved import resolve
from megatron_lccp.planning import plan_table
from megatron_lccp.planning.memory import (
    Sizes,
    chunk_parameters,
    fp8_copies_bytes,
    layer_activation_bytes,
    stage_buffers,
    total_parameters,
)
from megatron_lccp.planning.plan import DEFAULT_MFU, GPUS, make_plan, rank_memory, time_of
from megatron_lccp.planning.plan import sizes_of as sizes_as_laid_out
from tests.distributed.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
HUNYUAN, TINY = ROOT / "examples/hunyuan_a13b_64k.yaml", ROOT / "examples/tiny_moe.yaml"
VOCABULARY = 2048
PLAIN = {"virtual_pipeline": None, "context": 1}
"""The recipe's TP4 PP8 EP8 without chunks and context parallelism."""
FULL = "--megatron.transformer={recompute_granularity: full, recompute_method: uniform, recompute_num_layers: 1}"

# name -> configuration, ranks, layout, more overrides; the 80B ones first
LAYOUTS: dict[str, tuple[Path, int, dict[str, int | None], tuple[str, ...]]] = {
    "80B TP4 PP8 EP8": (HUNYUAN, 256, PLAIN, ()),
    "80B TP4 PP8 EP8 CP2 ETP1": (HUNYUAN, 256, {**PLAIN, "context": 2}, ("--megatron.ddp={}",)),
    "80B TP4 PP8 VPP4 CP2 EP8, the recipe's": (HUNYUAN, 256, {}, ()),
    "80B TP8 PP4 CP4 EP16": (
        HUNYUAN, 128, {**PLAIN, "tensor": 8, "pipeline": 4, "context": 4, "expert": 16},
        ("--megatron.ddp.grad_reduce_in_fp32=false",),
    ),
    "80B TP2 PP16 VPP2 CP3 DP4 EP8 ETP3": (
        HUNYUAN, 384,
        {"tensor": 2, "pipeline": 16, "virtual_pipeline": 2, "context": 3, "expert": 8, "expert_tensor": 3},
        ("--stages.lccp.context_tok=65532", "--stages.lccp.global_batch_tok=16776192"),
    ),
    "tiny DP3": (TINY, 3, {"expert": 1}, ("--stages.lccp.global_batch_tok=24576",)),
    "tiny TP4, more than key/value heads": (TINY, 4, {"tensor": 4, "expert": 2, "expert_tensor": 1}, ()),
    "tiny TP2 PP2 VPP2 EP4": (
        TINY, 16, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 4},
        ("--megatron.transformer.num_layers=8", "--megatron.ddp.overlap_grad_reduce=true",
         "--stages.lccp.micro_batch=1", "--megatron.ddp.bucket_size=50000"),
    ),
    "dense, untied, norms before RoPE": (
        TINY, 8, {"tensor": 2, "pipeline": 2, "expert": 1}, ("--model.family=tiny_qwen3", "--model.init_from=null"),
    ),
    "Qwen3-30B-A3B TP2 PP4 EP8": (
        HUNYUAN, 64, {**PLAIN, "tensor": 2, "pipeline": 4, "expert": 8}, ("--model.family=qwen3_30b_a3b",),
    ),
    "Qwen3-30B-A3B CP2 DP64 EP8": (
        HUNYUAN, 128, {**PLAIN, "tensor": 1, "pipeline": 1, "context": 2, "expert": 8},
        ("--model.family=qwen3_30b_a3b",),
    ),
    "GLM-4.5-Air TP2 PP4 EP8, 11 layers in the first stage and 11 in the last": (
        HUNYUAN, 64, {**PLAIN, "tensor": 2, "pipeline": 4, "expert": 8},
        ("--model.family=glm45_air", "--megatron.transformer={num_layers_in_first_pipeline_stage: 11, "
         "num_layers_in_last_pipeline_stage: 11}"),
    ),
    "GLM-4.5 TP4 PP4 EP16": (
        HUNYUAN, 64, {**PLAIN, "tensor": 4, "pipeline": 4, "expert": 16, "expert_tensor": 1},
        ("--model.family=glm45",),
    ),
    "Hy3 TP4 PP8 VPP2 EP8": (
        HUNYUAN, 64, {**PLAIN, "tensor": 4, "pipeline": 8, "virtual_pipeline": 2, "expert": 8},
        ("--model.family=hy3",),
    ),
    "tiny, a list of dense and routed layers, PP2 VPP2, 6 layers in the first stage": (
        TINY, 4, {"tensor": 1, "pipeline": 2, "virtual_pipeline": 2, "expert": 2},
        ("--megatron.transformer={num_layers: 8, moe_layer_freq: [0, 1, 1, 0, 0, 1, 1, 0], "
         "num_layers_in_first_pipeline_stage: 6}", "--stages.lccp.micro_batch=1"),
    ),
    "tiny FP32, high bus bandwidth": (
        TINY, 4, {"pipeline": 2, "expert": 2},
        ("--training.precision=fp32", "--megatron.ddp.pad_buckets_for_high_nccl_busbw=true"),
    ),
}  # fmt: skip


def _overrides(layout: dict[str, int | None], more: tuple[str, ...]) -> list[str]:
    return [*(f"--parallel.{name}={'null' if size is None else size}" for name, size in layout.items()), *more]


def sizes_of(config: Config, vocab_size: int) -> Sizes:
    return sizes_as_laid_out(config, resolve(config).of_vocabulary(vocab_size))


def _some_of_each_stage(ranks: int, stages: int) -> list[int]:
    """First, third and last rank of the first, second and last stage; all ranks of a small job."""
    if ranks <= 4:
        return list(range(ranks))
    per_stage = ranks // stages
    first = (stage * per_stage for stage in {0, min(1, stages - 1), stages - 1})
    return sorted({rank + r for rank in first for r in (0, per_stage // 3, per_stage - 1)})


@pytest.fixture(scope="module")
def built() -> dict[str, dict[int, dict[str, Any]]]:
    """What Megatron-Core builds on some ranks of every layout, all in one process."""
    layouts = {}
    for name, (path, ranks, layout, more) in LAYOUTS.items():
        overrides = _overrides(layout, more)
        stages = parse_config(path, overrides).parallel.pipeline
        layouts[name] = (path, overrides, ranks, _some_of_each_stage(ranks, stages))
    return run_ranks(1, "plan_jobs.built_ranks", layouts=layouts, vocab_size=VOCABULARY)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_predicted_bytes_are_what_megatron_core_allocates(name: str, built: dict[str, Any]) -> None:
    path, ranks, layout, more = LAYOUTS[name]
    config = parse_config(path, _overrides(layout, more))
    make_plan(dataclasses.replace(config, monitors=[]), name, ranks, 0.3, None)  # refuses what cannot run
    sizes = sizes_of(config, VOCABULARY)
    predicted = rank_memory(config, sizes, ranks)
    for rank, there in built[name].items():
        expected = predicted[rank]
        assert (rank, there["pp_rank"], there["device"]) == (expected.rank, expected.stage, {"meta"})
        parameters = [chunk_parameters(sizes, expected.stage, chunk) for chunk in range(sizes.chunks)]
        assert there["named"] == [[dataclasses.astuple(p) for p in chunk] for chunk in parameters]
        buffers = stage_buffers(sizes, expected.stage, ranks, config.megatron.ddp)
        assert there["buckets"] == [list(buffer.buckets) for buffer, _ in buffers]
        assert expected.parameters == sum(numel for chunk in there["named"] for _, numel, *_ in chunk)
        for kind in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
            assert getattr(expected, kind) == there[kind], (rank, kind)


def test_optimizer_shards_of_all_replicas_make_the_whole() -> None:
    config = parse_config(HUNYUAN)
    memory = rank_memory(config, sizes_of(config, 0), 256)
    total = make_plan(config, "plan", 256, 0.3, None)["parameters_total"]
    # TP4 ranks hold norms and routers each, and the embedding is there twice: a little over 12 bytes a parameter
    assert 12 * total < sum(m.optimizer_bytes for m in memory) < 12.2 * total


def test_fp8_keeps_copies_of_matrices_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Two bytes of all that a middle stage holds but its norms (4096 and 128 wide) and routers (64 x 4096)."""

    def totals(*overrides: str) -> list[tuple[int, int]]:
        config = parse_config(HUNYUAN, overrides)
        return [(m.parameters, m.total_bytes) for m in rank_memory(config, sizes_of(config, 0), 256)]

    plain, copies = totals(), totals("--training.fp8=tensorwise")
    parameters, total = plain[40]
    assert copies[40] == (parameters, total + 2 * (parameters - 4 * (2 * 4096 + 2 * 128 + 64 * 4096)))
    embedding = 128256 // 4 * 4096
    assert copies[0][1] - plain[0][1] == copies[40][1] - total and plain[0][0] == parameters + embedding
    for field in ("fp8_param", "disable_parameter_transpose_cache"):
        assert totals("--training.fp8=tensorwise", f"--megatron.transformer.{field}=true") == plain
    for fp8, said in (("blockwise", "GiB of the worst rank for FP8 copies"), ("none", "")):
        assert main(["plan", str(HUNYUAN), "--gpu", "H200", f"--training.fp8={fp8}"]) == 0
        out = capsys.readouterr().out
        assert said in out and ("FP8" in out) is bool(said)


def test_flops_and_time_of_the_paper_are_the_known_ones() -> None:
    plan = make_plan(parse_config(HUNYUAN), "plan", 256, 0.32, None)
    work = plan["stages"]["lccp"]
    assert (plan["parameters_total"], plan["parameters_active"]) == (80_393_183_232, 12_747_448_320)
    assert work["flops_per_token"] == pytest.approx(1.28e11, rel=0.01)
    assert work["flops_per_step"] == pytest.approx(2.15e18, rel=0.01)
    assert (work["steps"], work["attention_share"]) == (11_921, pytest.approx(0.403, abs=0.005))
    time = time_of(work, 256, 320)
    assert time["step_s"] == pytest.approx(26.2, abs=0.2)
    assert time["gpu_hours"] == pytest.approx(22_200, rel=0.01)


def test_parameters_of_unlike_layers_are_counted_one_by_one() -> None:
    """GLM-4.5-Air: a dense layer, then 45 with 128 experts of which a token takes 8, and biases of q, k and v."""
    shape = resolve(parse_config(HUNYUAN, ["--model.family=glm45_air", "--megatron={}"])).shape
    attention = 4096 * 128 * (2 * 96 + 2 * 8) + 128 * (96 + 2 * 8) + 2 * 4096
    mlp, expert, router, ends = 3 * 4096 * 10944, 3 * 4096 * 1408, 128 * 4096, 4096 + 2 * 151552 * 4096
    total, active = (46 * attention + mlp + 45 * (router + (1 + k) * expert) + ends for k in (128, 8))
    assert total_parameters(shape, 151552) == (total, active) == (106_852_245_504, 13_424_123_904)
    vectors = 46 * (128 * (96 + 2 * 8) + 2 * 4096)
    assert forward_flops(shape, 10, 0, 0, 151552) == 2 * 10 * (active - ends - vectors)


def test_the_worst_rank_is_the_one_that_needs_most() -> None:
    config = parse_config(HUNYUAN, ["--monitors=[]"])
    plan = make_plan(config, "plan", 256, 0.3, None)
    worst = max(rank_memory(config, sizes_of(config, 0), 256), key=lambda m: m.total_bytes)
    assert plan["worst_rank"] == {**dataclasses.asdict(worst), "total_bytes": worst.total_bytes}
    assert worst.stage == 7  # logits of 64K tokens


def test_recomputation_and_shorter_parts_of_a_sequence_need_less() -> None:
    def activations(*overrides: str) -> int:
        plain = [*_overrides(PLAIN, ()), "--monitors=[]"]
        return make_plan(parse_config(HUNYUAN, [*plain, *overrides]), "plan", 256, 0.3, None)["worst_of_stage"][0][
            "activations_bytes"
        ]

    keep = "--megatron.transformer={}"
    selective = "--megatron.transformer={recompute_granularity: selective, recompute_modules: [layernorm, moe]}"
    assert activations(FULL) < activations(selective) < activations(keep)
    assert activations() == activations(selective)  # the recipe's
    assert activations(keep, "--parallel.context=4") == pytest.approx(activations(keep) / 4, rel=0.01)


SAVING: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("tiny_moe", {}, {}),
    ("tiny_moe", {}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    ("tiny_moe", {}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
    ("tiny_qwen3", {}, {}),
    ("tiny_llama3", {}, {}),
    ("tiny_llama3", {}, {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
    ("tiny_glm45", {}, {}),
    ("tiny_glm45_air", {}, {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    ("tiny_hy3", {}, {}),
    ("tiny_moe", {"tensor": 2}, {}),
    ("tiny_moe", {"tensor": 2, "expert": 2, "expert_tensor": 1}, {}),
]
LAYERS, LENGTH = 4, 2048


def _saving(family: str, layout: dict[str, int], fields: dict[str, Any]) -> list[str]:
    overrides = [f"--model.family={family}", f"--megatron.transformer={json.dumps({'num_layers': LAYERS, **fields})}"]
    return overrides + _overrides({"expert": 1, **layout}, ())


@pytest.fixture(scope="module")
def saved() -> list[float]:
    """Bytes that the layers of each of SAVING keep, mean over its ranks; one group of ranks for each size."""
    found = [0.0] * len(SAVING)
    for ranks in (1, 2):
        numbers = [k for k, (_, layout, _) in enumerate(SAVING) if layout.get("tensor", 1) == ranks]
        cases = [(TINY, _saving(*SAVING[k])) for k in numbers]
        by_rank = run_ranks(ranks, "plan_jobs.saved_by_layers", cases=cases, vocab_size=VOCABULARY, length_tok=LENGTH)
        for k, of_ranks in zip(numbers, zip(*by_rank)):
            found[k] = sum(of_ranks) / ranks
    return found


@pytest.mark.parametrize("number", range(len(SAVING)), ids=lambda k: f"{SAVING[k][0]} {SAVING[k][1:]}")
def test_layers_keep_as_much_on_cpu_as_the_formula_says(number: int, saved: list[float]) -> None:
    """The formula's terms are what Megatron-Core's layers save, within 5 %; what a GPU's kernels add is not seen."""
    fields = SAVING[number][2]
    sizes = sizes_of(parse_config(TINY, _saving(*SAVING[number])), VOCABULARY)
    recomputed = fields.get("recompute_modules", ())
    predicted = sum(layer_activation_bytes(sizes, layer, LENGTH, 2, recomputed) for layer in range(LAYERS))
    if fields.get("recompute_granularity") == "full":
        predicted = LAYERS * LENGTH * sizes.shape.hidden * 2
    print(f"{SAVING[number]}: {saved[number]:,.0f} bytes measured, {predicted:,.0f} predicted")
    assert predicted == pytest.approx(saved[number], rel=0.05)


def test_fp8_copies_are_of_the_layers_in_fp8() -> None:
    """8 layers on PP2 with two chunks of two: stage 0 has 1, 2, 5, 6 and stage 1 has 3, 4, 7, 8."""
    layout = ["--parallel.pipeline=2", "--parallel.virtual_pipeline=2", "--megatron.transformer.num_layers=8"]
    edges = {"first_last_layers_bf16": "true", "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 1}
    in_bf16 = [f"--megatron.transformer.{name}={value}" for name, value in edges.items()]

    def of_stages(*overrides: str) -> list[int]:
        sizes = sizes_of(parse_config(TINY, [*layout, *overrides]), VOCABULARY)
        return [fp8_copies_bytes(sizes, stage) for stage in range(2)]

    f = sizes_of(parse_config(TINY, layout), VOCABULARY).fields
    hidden, width, expert = f["hidden_size"], f["kv_channels"], f["moe_ffn_hidden_size"]
    attention = hidden * width * (2 * f["num_attention_heads"] + 2 * f["num_query_groups"])
    mlps = 3 * hidden * (f["moe_shared_expert_intermediate_size"] + f["num_moe_experts"] // 2 * expert)  # EP2
    one = 2 * (attention + mlps)
    assert of_stages() == [4 * one, 4 * one]
    assert of_stages(*in_bf16) == [2 * one, 3 * one]
    assert of_stages(*in_bf16, "--megatron.transformer.first_last_layers_bf16=false") == [4 * one, 4 * one]
    assert of_stages(*in_bf16, "--megatron.transformer.fp8_param=true") == [0, 0]


def test_a_layout_that_cannot_run_is_refused_by_field() -> None:
    for override, text in {
        "--parallel.pipeline=5": "parallel.pipeline: 20 does not divide the layers (32)",
        "--parallel.expert_tensor=5": "parallel.expert_tensor: 5 does not divide moe_ffn_hidden_size",
        "--megatron.transformer.nonsense=1": "megatron.transformer.nonsense: is not a field",
        "--megatron.optimizer.optimizer=sgd": "megatron.optimizer.optimizer: 'sgd' cannot be trained here",
        "--megatron.transformer.moe_shared_expert_gate=true": "megatron.transformer.moe_shared_expert_gate: True is "
        "not counted by a plan",
    }.items():
        config = parse_config(HUNYUAN, [override])
        with pytest.raises(ConfigError) as error:
            make_plan(config, "a.yaml", 2560 if "expert_tensor" in override else None, 0.3, None)
        assert any(line.startswith(f"a.yaml: {text}") for line in str(error.value).splitlines()), str(error.value)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(HUNYUAN), "--ranks", "256", "--gpu=H200", "--mfu=0.3"]) == 0
    table = capsys.readouterr().out
    assert OPTIONS["plan"]["--gpu"]["choices"] == list(GPUS) and str(DEFAULT_MFU) in OPTIONS["plan"]["--mfu"]["help"]
    assert "<- worst" in table and "H200" in table and "B200" not in table
    assert main(["plan", str(HUNYUAN), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["ranks"], plan["ranks_given"], sorted(plan["gpus"])) == (64, False, ["B200", "H100", "H200"])
    assert main(["plan", str(HUNYUAN), "--ranks", "100"]) == 2
    assert "tensor x pipeline x context = 64 does not divide 100 ranks" in capsys.readouterr().err
    assert main(["plan", str(HUNYUAN), "--mfu=30"]) == 2
    assert "--mfu: should be above 0 and at most 1" in capsys.readouterr().err


def test_the_table_of_a_small_model_has_no_zeros(capsys: pytest.CaptureFixture[str]) -> None:
    """What is small is in a smaller unit, with the same numbers as the plan."""
    fp8 = ["--training.fp8=tensorwise", "--training.precision=bf16"]
    for options in ([], fp8):
        assert main(["plan", str(TINY), "--gpu=H100", "--json", *options]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert main(["plan", str(TINY), "--gpu=H100", *options]) == 0
        table = capsys.readouterr().out
        worst, took = plan["worst_rank"], plan["gpus"]["H100"]["stages"]["lccp"]
        assert not re.search(r"\s0(\.0+)?(%| |$)", table.partition("Memory")[2].replace("      0      0 ", ""), re.M)
        assert "stage, MiB\n" in table and f"{worst['total_bytes'] / 2**20:.2f} <- worst" in table
        assert f"{took['step_s'] * 1e3:.2f} ms" in table and f"{took['days'] * 86400e3:.1f} ms" in table
        assert f"{worst['total_bytes'] / 2**30 / 79:.1%} of 79 GiB" in table
    assert f"{worst['fp8_bytes'] / 2**20:.2f} MiB of the worst rank for FP8" in table


def test_a_stop_is_held_against_the_launchers_times() -> None:
    """What a step and a save take by the plan, and what the examples leave before a job is killed."""
    fields = ["--training.stop_within_s=20"]
    plan = make_plan(parse_config(HUNYUAN, fields), "h", 256, 0.32, "H100", storage_gbps=2.5)
    text = plan_table.as_table(plan)
    assert "! A step of lccp takes 27 s on H100, and a signal is heard after it: raise training.stop_within_s" in text
    save_s = max(cost["save_s"] for cost in plan["checkpoints"].values())
    assert f"A stop and its save take up to 20 + {save_s:.0f} s" in text
    assert f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={20 + save_s:.0f}." in text and 280 < save_s < 580
    calm = make_plan(parse_config(HUNYUAN), "h", 256, 0.32, "H100", storage_gbps=10)
    assert "A stop and its save" in plan_table.as_table(calm) and "! " not in plan_table.as_table(calm)


def test_attention_that_ends_at_documents_is_counted_so(tiny_yaml: Path, tmp_path: Path) -> None:
    fields = ["--stages.lccp.masks=documents", "--stages.lccp.pack={align_tok: 4}"]
    whole, plan, unprepared = (
        make_plan(parse_config(tiny_yaml, more), "t", 2, 0.32, "H100")
        for more in ([], fields, [*fields, f"--data.dir={tmp_path}", "--model.config=null"])
    )
    before, of = whole["stages"]["lccp"], plan["stages"]["lccp"]
    layers = before["flops_per_step"] * (1 - before["attention_share"])
    attention = before["flops_per_step"] * before["attention_share"] * of["documents"]["share"]
    assert of["documents"]["share"] < 0.99 and of["flops_per_step"] == pytest.approx(layers + attention, rel=1e-6)
    assert "attention ends at documents, which is 0." in plan_table.as_table(plan)
    assert unprepared["stages"]["lccp"]["flops_per_step"] == before["flops_per_step"]
    assert "counted in whole sequences, for the documents are not prepared" in plan_table.as_table(unprepared)
