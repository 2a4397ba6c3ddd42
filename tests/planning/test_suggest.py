"""`lccp plan --suggest`: what it names can run and fits, by the plan's own numbers; its speed is that of a known series."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_lccp.cli import GPU_KINDS, main
from megatron_lccp.config.load import ConfigError, parse_config
from megatron_lccp.config.tree import ParallelConfig, StageConfig
from megatron_lccp.measuring.flops import step_flops
from megatron_lccp.model.hf_config import describe
from megatron_lccp.model.resolved import resolve
from megatron_lccp.planning import suggest as suggesting
from megatron_lccp.planning.gpus import GPUS
from megatron_lccp.planning.memory import Sizes
from megatron_lccp.planning.plan import make_plan
from megatron_lccp.planning.speed import step_time

ROOT = Path(__file__).resolve().parents[2]
HUNYUAN, TINY = ROOT / "examples/hunyuan_a13b_64k.yaml", ROOT / "examples/tiny_moe.yaml"

QWEN3_235B = dict(
    architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=94, hidden_size=4096, num_attention_heads=64,
    num_key_value_heads=4, head_dim=128, intermediate_size=12288, moe_intermediate_size=1536, num_experts=128,
    num_experts_per_tok=8, norm_topk_prob=True, rms_norm_eps=1e-6, vocab_size=151936,
)  # fmt: skip
SERIES = {16384: (1, 237), 32768: (2, 277), 65536: (4, 320), 131072: (8, 357)}
"""Context -> (CP, TFLOP/s a GPU) of Qwen3-235B-A22B on 256 H100 (Megatron-MoE-ModelZoo, natural routing)."""


def test_speed_is_that_of_the_published_series() -> None:
    model = describe(QWEN3_235B)
    fields = model.fields({"recompute_granularity": "selective", "recompute_modules": ["layernorm", "moe"]})
    for context, (ranks, measured) in SERIES.items():
        layout = ParallelConfig(4, 8, 4, 8, 1, ranks)
        stage = StageConfig(context_tok=context, global_batch_tok=256 * context)
        sizes = Sizes(model.shape, fields, layout, 151936)
        found = step_time(sizes, stage, 256, GPUS["H100"], {"overlap_grad_reduce": True}, (10**9, 10**9))
        tflops = step_flops(model.shape, context, 256 * context, 151936) / 256 / found.total_s / 1e12
        assert tflops == pytest.approx(measured, rel=0.02), context


def test_what_costs_time_is_counted() -> None:
    """Each part of a step against the same layout without what causes it."""
    model, gpu = describe(QWEN3_235B), GPUS["H100"]
    stage = StageConfig(context_tok=32768, global_batch_tok=256 * 32768)

    def of(again: dict | None = None, ddp: dict | None = None, kind: str = "H100", **layout: int):
        sizes = Sizes(model.shape, model.fields(again), ParallelConfig(**{"expert_tensor": 1, **layout}), 151936)
        return step_time(sizes, stage, 256, GPUS[kind], ddp or {}, (10**9, 10**9))

    alone = of()
    assert (
        alone.bubble_s == alone.tensor_s == alone.expert_s == alone.context_s == alone.recompute_s == 0 < alone.data_s
    )
    assert of(ddp={"overlap_grad_reduce": True}).data_s < alone.data_s
    assert 0 < of(tensor=2).tensor_s < of(tensor=4).tensor_s < of(tensor=4, kind="H800").tensor_s
    assert 0 < of(expert=8).expert_s < of(expert=16).expert_s / 4  # beyond a node
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    some = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    assert 0 < of(some).recompute_s < of(full).recompute_s < alone.compute_s / 2
    assert 0 < of(pipeline=4, virtual_pipeline=2).bubble_s < of(pipeline=4).bubble_s
    assert of(kind="H20").compute_s > 6 * alone.compute_s and gpu.memory_gib == 79


def test_layouts_of_the_recipe_fit_and_can_run() -> None:
    """Of Hunyuan-A13B on 64 H800: each is taken by the plan, which finds the same memory; the search's own is within 1 %."""
    config = parse_config(HUNYUAN)
    found = suggesting.suggest(config, "a.yaml", 64, "H800")
    assert len(found) == suggesting.SHOWN and [one.days for one in found] == sorted(one.days for one in found)
    assert len({tuple(dataclasses.asdict(one.config.parallel).values()) for one in found}) == len(found)
    for one in found[:2]:
        plan = make_plan(parse_config(HUNYUAN, one.overrides()), "a.yaml", 64, 0.3, "H800")
        worst = plan["worst_rank"]["total_bytes"]
        assert worst == one.memory_bytes <= 1.01 * suggesting.ROOM * 79 * 2**30
        model = resolve(config)
        sizes = Sizes(model.shape, {**model.fields, **one.config.megatron.transformer}, one.config.parallel, 128256)
        stages = range(one.config.parallel.pipeline)
        quick = max(suggesting._bytes(one.config, sizes, n, 64, suggesting._parameters(sizes, n)) for n in stages)
        assert quick == pytest.approx(worst, rel=0.01)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(TINY), "--suggest", "--ranks", "4", "--gpu=B200"]) == 0
    table = capsys.readouterr().out
    assert "tiny_moe on 4 B200, layouts that fit" in table and "--parallel.tensor=" in table
    assert main(["plan", str(TINY), "--suggest", "--ranks", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    first = told["layouts"][0]
    assert (told["gpu"], told["ranks"]) == ("H100", 4) and first["memory_bytes"] > 0 and first["overrides"]
    assert main(["plan", str(TINY), "--ranks", "4", *first["overrides"]]) == 0
    capsys.readouterr()
    assert main(["plan", str(TINY), "--suggest"]) == 2
    assert "--suggest: needs --ranks" in capsys.readouterr().err
    assert list(GPUS) == list(GPU_KINDS)


def test_what_fits_nowhere_is_said() -> None:
    config = parse_config(HUNYUAN, ["--training.precision=fp32"])
    with pytest.raises(ConfigError, match="--suggest: no layout fits 2 H100 of 79 GiB; raise --ranks"):
        suggesting.print_suggestions(config, "a.yaml", 2, None, False)
