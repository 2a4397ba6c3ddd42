"""`lccp plan`: what a configuration takes on a number of ranks, from its sizes alone.

In: a configuration, how many ranks, the share of peak FLOPs that is hoped for. Out: parameters, memory of the worst
rank, FLOPs and GPU-hours, as a table or as JSON. Needs no ranks, no data, no GPU and no memory for the model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lccp.config.load import ConfigError
from megatron_lccp.config.rules import layout_problems
from megatron_lccp.config.tree import Config
from megatron_lccp.data.tokenizer import load_tokenizer
from megatron_lccp.model.build import padded_vocab, passthrough_problems, transformer_fields
from megatron_lccp.model.families import family_of
from megatron_lccp.model.flops import causal_pairs, forward_flops, step_flops
from megatron_lccp.model.memory import (
    Sizes,
    activation_bytes,
    place_of,
    size_problems,
    stage_buffers,
    total_parameters,
)
from megatron_lccp.parallel.compat import MEGATRON_VERSION

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Dense BF16 peak (NVIDIA's data sheets) and the memory that a program finds on it."""

    peak_tflops: float
    memory_gib: float


GPUS = {"H100": Gpu(989.0, 79.0), "H200": Gpu(989.0, 140.0), "B200": Gpu(2250.0, 178.0)}
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
    """The buffer its parameters lie in, padding included."""
    gradients_bytes: int
    """The buffer their gradients are summed in."""
    optimizer_bytes: int
    """Its part of the distributed optimizer: FP32 master weights (where weights are BF16) and two moments."""
    activations_bytes: int
    """An estimate that no GPU has confirmed."""

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


def smallest_ranks(config: Config) -> int:
    """The fewest ranks that the layout allows."""
    p = config.parallel
    return math.lcm(p.tensor * p.pipeline * p.context, (p.expert_tensor or p.tensor) * p.expert * p.pipeline)


def sizes_of(config: Config, vocab_size: int) -> Sizes:
    """The model of a configuration whose tokenizer has `vocab_size` tokens."""
    family = family_of(config.model.family)
    rows = padded_vocab(family.vocab_size or vocab_size, config)
    return Sizes(transformer_fields(config, family), config.parallel, rows, family.tied_embeddings, family.qk_norm)


def rank_memory(config: Config, sizes: Sizes, ranks: int) -> list[RankMemory]:
    """Memory of every rank."""
    p, ddp = config.parallel, config.megatron.ddp
    value = 4 if config.training.precision == "fp32" else 2
    gradient = 4 if ddp.get("grad_reduce_in_fp32", True) else value
    state = 8 if value == 4 else 12  # two FP32 moments, and of BF16 weights an FP32 master
    buffers = [stage_buffers(sizes, stage, ranks, ddp) for stage in range(p.pipeline)]
    activations = [_peak_activations(config, sizes, stage, ranks, value) for stage in range(p.pipeline)]
    found = []
    for rank in range(ranks):
        place = place_of(rank, sizes, ranks)
        mine = buffers[place.stage]
        padded = sum(buffer.numel for buffer, _ in mine)
        owned = sum(buffer.owned(place.expert if expert else place.dense) for buffer, expert in mine)
        held = sum(end - start for buffer, _ in mine for start, end, _ in buffer.spans)
        found.append(
            RankMemory(
                rank, place.stage, held, padded * value, padded * gradient, owned * state, activations[place.stage]
            )
        )
    return found


def _peak_activations(config: Config, sizes: Sizes, pipeline_stage: int, ranks: int, value_bytes: int) -> int:
    """Activations of a rank in the stage of training that needs most."""
    p, found = config.parallel, 0.0
    replicas = ranks // (p.tensor * p.pipeline * p.context)
    for stage in config.stages.values():
        tokens = stage.context_tok * stage.micro_batch // p.context
        micro_batches = stage.global_batch_tok // (stage.context_tok * stage.micro_batch * replicas)
        found = max(found, activation_bytes(sizes, pipeline_stage, tokens, micro_batches, value_bytes))
    return round(found)


def work_of(config: Config, fields: Mapping[str, Any], vocab_size: int) -> dict[str, dict[str, float]]:
    """FLOPs of each stage: forward and backward, causal attention by its pairs, recomputation not counted."""
    found = {}
    for name, stage in config.stages.items():
        step = step_flops(fields, stage.context_tok, stage.global_batch_tok, vocab_size)
        pairs = stage.global_batch_tok // stage.context_tok * causal_pairs(stage.context_tok)
        attention = 3 * forward_flops(fields, 0, pairs, 0, vocab_size)
        found[name] = {
            "context_tok": stage.context_tok,
            "global_batch_tok": stage.global_batch_tok,
            "tokens": stage.tokens,
            "steps": math.ceil(stage.tokens / stage.global_batch_tok),
            "flops_per_token": step / stage.global_batch_tok,
            "flops_per_step": step,
            "attention_share": attention / step,
        }
    return found


def time_of(work: Mapping[str, float], ranks: int, tflops_per_gpu: float) -> dict[str, float]:
    """Seconds of a step and of the whole stage, at so many model TFLOP/s of each GPU, without monitors."""
    seconds = work["flops_per_step"] / (ranks * tflops_per_gpu * 1e12)
    whole_h = seconds * work["steps"] / 3600
    return {"tflops_per_gpu": tflops_per_gpu, "step_s": seconds, "days": whole_h / 24, "gpu_hours": whole_h * ranks}


def make_plan(config: Config, source: str, ranks: int | None, mfu: float, gpu: str | None) -> dict[str, Any]:
    """Everything that `lccp plan` says, in plain values. Raises ConfigError, one line for each reason not to run."""
    if not 0 < mfu <= 1:
        raise ConfigError(source, [f"--mfu: should be above 0 and at most 1, is {mfu}"])
    if ranks is not None and ranks < 1:
        raise ConfigError(source, [f"--ranks: should be at least 1, is {ranks}"])
    family, ranks_given, ranks = family_of(config.model.family), ranks, ranks or smallest_ranks(config)
    vocab, vocab_from = _vocabulary(config)
    sizes = sizes_of(config, vocab)
    # planning needs no kernels of the machine that it is for
    anywhere = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    problems = passthrough_problems(anywhere) + layout_problems(config, ranks, sizes.fields, MEGATRON_VERSION)
    problems += size_problems(sizes, {**vars(config.megatron), "transformer": sizes.fields})
    if problems:
        raise ConfigError(source, problems)
    p, etp = config.parallel, sizes.expert_tensor
    memory = rank_memory(config, sizes, ranks)
    by_stage = [
        max((m for m in memory if m.stage == stage), key=lambda m: m.total_bytes) for stage in range(p.pipeline)
    ]
    total, active = total_parameters(sizes, vocab)
    work = work_of(config, sizes.fields, vocab)
    return {
        "source": source,
        "family": config.model.family,
        "ranks": ranks,
        "ranks_given": ranks_given is not None,
        "layout": {
            "tensor": p.tensor, "pipeline": p.pipeline, "virtual_pipeline": p.virtual_pipeline, "context": p.context,
            "data": ranks // (p.tensor * p.pipeline * p.context), "expert_tensor": etp, "expert": p.expert,
            "expert_data": ranks // (etp * p.expert * p.pipeline),
        },
        "vocab_size": vocab, "vocab_rows": sizes.vocab_rows, "vocab_from": vocab_from,
        "tied_embeddings": family.tied_embeddings,
        "parameters_total": total, "parameters_active": active,
        "worst_rank": _as_dict(max(by_stage, key=lambda m: m.total_bytes)),
        "worst_of_stage": [_as_dict(m) for m in by_stage],
        "stages": work,
        "monitors": [monitor.name for monitor in config.monitors],
        "mfu": mfu,
        "gpus": {
            name: {
                "peak_tflops": kind.peak_tflops, "memory_gib": kind.memory_gib,
                "stages": {stage: time_of(w, ranks, mfu * kind.peak_tflops) for stage, w in work.items()},
            }
            for name, kind in GPUS.items() if gpu in (None, name)
        },
    }  # fmt: skip


def _as_dict(memory: RankMemory) -> dict[str, int]:
    return {**dataclasses.asdict(memory), "total_bytes": memory.total_bytes}


def _vocabulary(config: Config) -> tuple[int, str]:
    """Tokens of the vocabulary, and which field says so."""
    if size := family_of(config.model.family).vocab_size:
        return size, "model.family"
    if Path(config.data.tokenizer.path).is_file():
        return load_tokenizer(config.data.tokenizer.path).vocab_size, "data.tokenizer.path"
    return config.data.tokenizer.vocab_size, "data.tokenizer.vocab_size"


def print_plan(
    config: Config, source: str, ranks: int | None, mfu: float | None, gpu: str | None, as_json: bool
) -> None:
    """Print the plan, as a table or as one JSON object. Raises ConfigError if the layout cannot run."""
    plan = make_plan(config, source, ranks, DEFAULT_MFU if mfu is None else mfu, gpu)
    print(json.dumps(plan, indent=1) if as_json else as_table(plan))


def as_table(plan: Mapping[str, Any]) -> str:
    """The plan for people."""
    at, ranks = plan["layout"], plan["ranks"]
    chunks = f" x {at['virtual_pipeline']} chunks" if at["virtual_pipeline"] else ""
    lines = [
        f"{plan['source']}: {plan['family']} on {ranks} ranks"
        + ("" if plan["ranks_given"] else ", the fewest this layout allows (--ranks sets another number)"),
        f"  layout      TP {at['tensor']} x PP {at['pipeline']}{chunks} x CP {at['context']} x DP {at['data']}; "
        f"experts ETP {at['expert_tensor']} x EP {at['expert']} x DP {at['expert_data']}",
        f"  parameters  {plan['parameters_total']:,} total, {plan['parameters_active']:,} active for one token",
        f"  vocabulary  {plan['vocab_size']:,} tokens (from {plan['vocab_from']}), {plan['vocab_rows']:,} rows",
        "",
        "Memory of the worst rank of each pipeline stage, GiB",
        f"{'stage':>7}{'rank':>7}{'parameters':>16}{'weights':>9}{'gradients':>11}{'optimizer':>11}"
        f"{'activations*':>14}{'total*':>8}",
    ]
    for m in plan["worst_of_stage"]:
        gib = [m[f"{kind}_bytes"] / GIB for kind in ("weights", "gradients", "optimizer", "activations", "total")]
        worst = " <- worst" if m["rank"] == plan["worst_rank"]["rank"] else ""
        lines.append(
            f"{m['stage']:>7}{m['rank']:>7}{m['parameters']:>16,}{gib[0]:>9.2f}{gib[1]:>11.2f}{gib[2]:>11.2f}"
            f"{gib[3]:>14.2f}{gib[4]:>8.2f}{worst}"
        )
    lines += [
        "* Activations are an estimate that no GPU has confirmed: experts evenly loaded, attention fused. Kernels'",
        "  workspace, communication buffers and fragmentation come on top.",
        "",
        f"{'stage':<10}{'context':>9}{'batch':>12}{'steps':>9}{'FLOPs/token':>13}{'FLOPs/step':>12}{'attention':>11}",
    ]
    for name, w in plan["stages"].items():
        lines.append(
            f"{name:<10}{w['context_tok']:>9,}{w['global_batch_tok']:>12,}{w['steps']:>9,}{w['flops_per_token']:>13.2e}"
            f"{w['flops_per_step']:>12.2e}{w['attention_share']:>11.1%}"
        )
    lines += ["", *_gpu_lines(plan)]
    if plan["monitors"]:
        dry_run = f"`lccp measure {plan['source']} --dry-run`"
        lines.append(f"Monitors come on top: {dry_run} says which share of a step they cost, from prepared data")
    return "\n".join(lines)


def _gpu_lines(plan: Mapping[str, Any]) -> list[str]:
    """Time and fit on each kind of GPU."""
    lines = [
        f"At {plan['mfu']:.1%} of the BF16 peak (recomputation and monitors not counted)",
        f"{'GPU':<6}{'stage':<10}{'TFLOP/s':>9}{'s/step':>9}{'days':>8}{'GPU-hours':>11}{'worst rank takes*':>20}",
    ]
    worst_gib = plan["worst_rank"]["total_bytes"] / GIB
    for name, gpu in plan["gpus"].items():
        takes = f"{worst_gib / gpu['memory_gib']:.0%} of {gpu['memory_gib']:.0f} GiB"
        for stage, t in gpu["stages"].items():
            lines.append(
                f"{name:<6}{stage:<10}{t['tflops_per_gpu']:>9.0f}{t['step_s']:>9.2f}{t['days']:>8.2f}"
                f"{t['gpu_hours']:>11,.0f}{takes:>20}"
            )
    if tight := [name for name, gpu in plan["gpus"].items() if worst_gib > gpu["memory_gib"]]:
        lines.append(
            f"Does not fit on {', '.join(tight)} by this estimate: raise parallel.context, parallel.tensor or "
            "parallel.pipeline, or set megatron.transformer.recompute_granularity"
        )
    return lines
