"""`lccp plan`: what a configuration takes on a number of ranks, from its sizes alone.

In: a configuration, how many ranks, the share of peak FLOPs that is hoped for. Out: parameters, memory of the worst
rank, FLOPs and GPU-hours, as a table (plan_table.py) or as JSON. Needs no ranks, no data, no GPU and no memory for the
model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_lccp.config.load import ConfigError
from megatron_lccp.config.rules import layout_problems
from megatron_lccp.config.tree import Config
from megatron_lccp.data.packed import attention_work
from megatron_lccp.data.stages import stage_steps
from megatron_lccp.data.tokenizers.load import configured_tokenizer
from megatron_lccp.measuring.beforehand import monitor_problems, place, planning_window
from megatron_lccp.measuring.flops import causal_pairs, forward_flops, step_flops
from megatron_lccp.measuring.prefill_attention import why_not_exact
from megatron_lccp.model.build import passthrough_problems, refused_by_megatron, transformer_config
from megatron_lccp.model.resolved import ResolvedModel, resolve
from megatron_lccp.model.shape import Shape
from megatron_lccp.parallel.compat import MEGATRON_VERSION
from megatron_lccp.planning.checkpoint_cost import checkpoint_costs
from megatron_lccp.planning.effective_time import of_plan
from megatron_lccp.planning.gpus import GPUS, USUAL
from megatron_lccp.planning.memory import (
    Sizes,
    activation_bytes,
    fp8_copies_bytes,
    place_of,
    router_state_bytes,
    stage_buffers,
    total_parameters,
    uncounted,
)
from megatron_lccp.planning.monitor_cost import training_flops, window_cost, windows_in
from megatron_lccp.planning.plan_table import as_table
from megatron_lccp.schema import Every
from megatron_lccp.training.launchers import KILL_S, NOTICE_S

DEFAULT_MFU = 0.32
"""What Qwen3-235B-A22B, a mixture of experts, reaches at 64K on 256 H100 with natural routing, 320 TFLOP/s a GPU
(Megatron-MoE-ModelZoo, best_practice/qwen3/readme.md at e865051)."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at its peak."""

    rank: int
    stage: int
    parameters: int
    """Parameters it holds."""
    weights_bytes: int
    """The buffer its parameters lie in, padding included, and what routers keep beside it."""
    gradients_bytes: int
    """The buffer their gradients are summed in."""
    optimizer_bytes: int
    """Its part of the distributed optimizer: FP32 master weights (where weights are BF16) and two moments."""
    fp8_bytes: int
    """FP8 copies of its matrices, an estimate too; 0 without FP8."""
    activations_bytes: int
    """An estimate that no GPU has confirmed."""

    @property
    def total_bytes(self) -> int:
        kept = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.fp8_bytes
        return kept + self.activations_bytes


def reached(config: Config) -> Config:
    """The configuration without the stages that `training.steps` ends the run before."""
    left, stages = config.training.steps, {}
    for name, stage in config.stages.items():
        if left is not None and left <= 0:
            break
        steps = stage_steps(stage) if left is None else min(left, stage_steps(stage))
        stages[name] = dataclasses.replace(stage, tokens=min(stage.tokens, steps * stage.global_batch_tok))
        left = None if left is None else left - steps
    return dataclasses.replace(config, stages=stages)


def smallest_ranks(config: Config) -> int:
    """The fewest ranks that the layout allows."""
    p = config.parallel
    return math.lcm(p.tensor * p.pipeline * p.context, (p.expert_tensor or p.tensor) * p.expert * p.pipeline)


def sizes_of(config: Config, resolved: ResolvedModel) -> Sizes:
    """The model as the configuration lays it out."""
    return Sizes(resolved.shape, resolved.fields, config.parallel, resolved.vocab_rows)


def rank_memory(config: Config, sizes: Sizes, ranks: int) -> list[RankMemory]:
    """Memory of every rank."""
    p, ddp = config.parallel, config.megatron.ddp
    value = value_bytes(config)
    gradient = 4 if ddp.get("grad_reduce_in_fp32", True) else value
    state = 8 if value == 4 else 12  # two FP32 moments, and of BF16 weights an FP32 master
    buffers = [stage_buffers(sizes, stage, ranks, ddp) for stage in range(p.pipeline)]
    routers = [router_state_bytes(sizes, stage) for stage in range(p.pipeline)]
    activations = [peak_activations(config, sizes, stage, ranks, value) for stage in range(p.pipeline)]
    in_fp8 = config.training.fp8 != "none"
    fp8 = [fp8_copies_bytes(sizes, stage) if in_fp8 else 0 for stage in range(p.pipeline)]
    found = []
    for rank in range(ranks):
        place = place_of(rank, sizes, ranks)
        mine = buffers[place.stage]
        padded = sum(buffer.numel for buffer, _ in mine)
        owned = sum(buffer.owned(place.expert if expert else place.dense) for buffer, expert in mine)
        held = sum(end - start for buffer, _ in mine for start, end, _ in buffer.spans)
        weights = padded * value + routers[place.stage]
        found.append(RankMemory(
            rank, place.stage, held, weights, padded * gradient, owned * state, fp8[place.stage],
            activations[place.stage],
        ))  # fmt: skip
    return found


def value_bytes(config: Config) -> int:
    return 4 if config.training.precision == "fp32" else 2


def peak_activations(config: Config, sizes: Sizes, pipeline_stage: int, ranks: int, value_bytes: int) -> int:
    """Activations of a rank in the stage of training that needs most."""
    p, found = config.parallel, 0.0
    replicas = ranks // (p.tensor * p.pipeline * p.context)
    for stage in config.stages.values():
        tokens = stage.context_tok * stage.micro_batch // p.context
        micro_batches = stage.global_batch_tok // (stage.context_tok * stage.micro_batch * replicas)
        peak = activation_bytes(
            sizes, pipeline_stage, tokens, micro_batches, value_bytes, config.training.loss_chunk_tok
        )
        found = max(found, peak)
    return round(found)


def work_of(config: Config, shape: Shape, vocab_size: int, replicas: int) -> dict[str, dict[str, Any]]:
    """FLOPs of each stage: forward and backward, causal attention by its pairs, recomputation not counted.

    Where attention ends at documents and they are prepared, by their lengths; else as of whole sequences (`documents`:
    None).
    """
    found: dict[str, dict[str, Any]] = {}
    for name, stage in config.stages.items():
        documents = attention_work(config, name, replicas) if stage.masks == "documents" else None
        share = documents.share if documents else 1.0
        step = step_flops(shape, stage.context_tok, stage.global_batch_tok, vocab_size, share)
        pairs = round(stage.global_batch_tok // stage.context_tok * causal_pairs(stage.context_tok) * share)
        attention = 3 * forward_flops(shape, 0, pairs, 0, vocab_size)
        found[name] = {
            "context_tok": stage.context_tok,
            "global_batch_tok": stage.global_batch_tok,
            "tokens": stage.tokens,
            "steps": stage_steps(stage),
            "flops_per_token": step / stage.global_batch_tok,
            "flops_per_step": step,
            "attention_share": attention / step,
            "masks": stage.masks,
            "documents": dataclasses.asdict(documents) if documents else None,
        }
    return found


def monitors_of(config: Config, shape: Shape, vocab_size: int) -> list[dict[str, Any]]:
    """What each monitor costs: operations of a window, windows in the run, and its share of the training's operations.

    From a stand-in tokenizer and text of any length. Raises ValueError, as the monitor does, for what does not fit.
    """
    window, total = planning_window(config, shape, vocab_size), training_flops(config, shape, vocab_size)
    in_fp8 = config.training.fp8 != "none" and config.training.measure_in == "fp8"
    as_planned = _as_planned(config)
    planned = transformer_config(as_planned, resolve(as_planned))
    shared, found = why_not_exact(planned) is None and not in_fp8, []
    for number, monitor in enumerate(config.monitors):
        try:
            cost = window_cost(monitor, window, shape, shared, vocab_size)
        except ValueError as error:
            raise ValueError(f"{place(number, monitor)}: {error}") from error
        windows = windows_in(config, monitor)
        if cost is None:
            found.append({"monitor": monitor.name, "windows": windows})
            continue
        share = windows * cost.flops / total
        found.append({**dataclasses.asdict(cost), "windows": windows, "share_of_training": share})
    return found


def _as_planned(config: Config) -> Config:
    """The model that is planned: in BF16 unless it says FP32.

    Planning needs no kernels of the machine that it is for, which Megatron-Core would look for here.
    """
    precision: Literal["bf16", "fp32"] = "fp32" if config.training.precision == "fp32" else "bf16"
    given = {k: v for k, v in config.megatron.transformer.items() if "fp8" not in k and not k.endswith("quantization")}
    if config.model.layers != "portable" and resolve(config).fields.get("num_moe_experts"):
        given = {**given, "moe_grouped_gemm": True}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, layers="portable", attention="portable"),
        megatron=dataclasses.replace(config.megatron, transformer=given),
        training=dataclasses.replace(config.training, precision=precision, fp8="none"),
    )


def time_of(work: Mapping[str, float], ranks: int, tflops_per_gpu: float) -> dict[str, float]:
    """Seconds of a step and of the whole stage, at so many model TFLOP/s of each GPU, without monitors."""
    seconds = work["flops_per_step"] / (ranks * tflops_per_gpu * 1e12)
    whole_h = seconds * work["steps"] / 3600
    return {"tflops_per_gpu": tflops_per_gpu, "step_s": seconds, "days": whole_h / 24, "gpu_hours": whole_h * ranks}


def make_plan(
    config: Config, source: str, ranks: int | None, mfu: float, gpu: str | None, storage_gbps: float | None = None
) -> dict[str, Any]:
    """Everything that `lccp plan` says, in plain values. Raises ConfigError, one line for each reason not to run."""
    if not 0 < mfu <= 1:
        raise ConfigError(source, [f"--mfu: should be above 0 and at most 1, is {mfu}"])
    if storage_gbps is not None and not 0 < storage_gbps < math.inf:
        raise ConfigError(source, [f"--storage-gbps: should be above 0 and finite, is {storage_gbps}"])
    if ranks is not None and ranks < 1:
        raise ConfigError(source, [f"--ranks: should be at least 1, is {ranks}"])
    config = reached(config)
    resolved, ranks_given, ranks = resolve(config), ranks, ranks or smallest_ranks(config)
    problems = passthrough_problems(config, resolved, here=False)
    problems += layout_problems(config, ranks, resolved.fields, MEGATRON_VERSION) + uncounted(resolved.fields)
    if not problems:
        as_planned = _as_planned(config)
        problems = refused_by_megatron(as_planned, resolve(as_planned))
    if problems:
        raise ConfigError(source, problems)
    vocab, vocab_from = vocabulary(config, resolved)
    resolved = resolved.of_vocabulary(vocab)
    sizes = sizes_of(config, resolved)
    if problems := monitor_problems(config.monitors, planning_window(config, sizes.shape, vocab)):
        raise ConfigError(source, problems)
    p, etp = config.parallel, sizes.expert_tensor
    memory = rank_memory(config, sizes, ranks)
    by_stage = [
        max((m for m in memory if m.stage == stage), key=lambda m: m.total_bytes) for stage in range(p.pipeline)
    ]
    total, active = total_parameters(sizes.shape, vocab)
    work = work_of(config, sizes.shape, vocab, ranks // (p.tensor * p.pipeline * p.context))
    checkpoints = checkpoint_costs(sizes, ranks, config.megatron.ddp, value_bytes(config))
    return {
        "source": source,
        "family": resolved.name,
        "ranks": ranks,
        "ranks_given": ranks_given is not None,
        "layout": {
            "tensor": p.tensor, "pipeline": p.pipeline, "virtual_pipeline": p.virtual_pipeline, "context": p.context,
            "data": ranks // (p.tensor * p.pipeline * p.context), "expert_tensor": etp, "expert": p.expert,
            "expert_data": ranks // (etp * p.expert * p.pipeline),
        },
        "vocab_size": vocab, "vocab_rows": sizes.vocab_rows, "vocab_from": vocab_from,
        "tied_embeddings": sizes.shape.tied,
        "parameters_total": total, "parameters_active": active, "fp8": config.training.fp8,
        "worst_rank": _as_dict(max(by_stage, key=lambda m: m.total_bytes)),
        "worst_of_stage": [_as_dict(m) for m in by_stage],
        "checkpoints": {name: cost.as_dict(storage_gbps) for name, cost in checkpoints.items()},
        "storage_gbps": storage_gbps,
        "stop": {"within_s": config.training.stop_within_s, "torchrun_s": KILL_S, "slurm_s": NOTICE_S},
        "stages": work,
        "monitors": monitors_of(config, sizes.shape, vocab),
        "mfu": mfu,
        "gpus": {
            name: {
                "peak_tflops": kind.peak_tflops, "memory_gib": kind.memory_gib,
                "stages": {stage: time_of(w, ranks, mfu * kind.peak_tflops) for stage, w in work.items()},
            }
            for name, kind in GPUS.items() if (name in USUAL if gpu is None else gpu == name)
        },
    }  # fmt: skip


def _as_dict(memory: RankMemory) -> dict[str, int]:
    return {**dataclasses.asdict(memory), "total_bytes": memory.total_bytes}


def vocabulary(config: Config, resolved: ResolvedModel) -> tuple[int, str]:
    """Tokens of the vocabulary, and which field says so."""
    if resolved.vocab_size:
        return resolved.vocab_size, "model.family" if config.model.config is None else "model.config"
    if Path(config.data.tokenizer.path).exists():
        return configured_tokenizer(config.data.tokenizer).vocab_size, "data.tokenizer.path"
    return config.data.tokenizer.vocab_size, "data.tokenizer.vocab_size"


def print_plan(
    config: Config, source: str, ranks: int | None, mfu: float | None, gpu: str | None, as_json: bool,
    faults_per_day: Sequence[float] = (), outages: Sequence[str] = (), storage_gbps: float | None = None,
) -> None:  # fmt: skip
    """Print the plan, as a table or as one JSON object. Raises ConfigError if the layout cannot run, ValueError for a
    rate of faults or an outage that cannot be."""
    if outages and not faults_per_day:
        raise ConfigError(source, ["--outage: goes with --faults-per-day"])
    plan = make_plan(config, source, ranks, DEFAULT_MFU if mfu is None else mfu, gpu, storage_gbps)
    if faults_per_day:
        saves = config.checkpoint
        plan["effective_time"] = of_plan(
            plan,
            saves.every or Every(steps=500),
            saves.asynchronous,
            saves.any_layout_every > 1,
            faults_per_day,
            outages,
        )
    print(json.dumps(plan, indent=1) if as_json else as_table(plan))
