"""`lccp plan --suggest`: the layouts of a number of GPUs on which a configuration fits, fastest first.

In: a configuration, whose own layout and recomputation do not count, how many GPUs and of which kind. Out: layouts with
the memory of their worst rank and the predicted time, as a table or as JSON. Every layout is held against the rules that
a training asks; memory is the plan's (memory.py), speed a prediction for ranking (speed.py).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lccp.config.load import ConfigError
from megatron_lccp.config.rules import layout_problems
from megatron_lccp.config.tree import Config, ParallelConfig
from megatron_lccp.model.resolved import ResolvedModel, resolve
from megatron_lccp.parallel.compat import MEGATRON_VERSION
from megatron_lccp.planning.gpus import GPUS, Gpu
from megatron_lccp.planning.memory import Sizes, fp8_copies_bytes, router_state_bytes
from megatron_lccp.planning.plan import (
    peak_activations,
    rank_memory,
    reached,
    sizes_of,
    value_bytes,
    vocabulary,
    work_of,
)
from megatron_lccp.planning.speed import NODE, StepTime, step_time
from megatron_lccp.text import digits_text, time_text

GIB = 2**30
ROOM = 0.85
"""Share of a GPU's memory that a layout may take by the estimate: the rest is for kernels' workspace, communication
buffers and fragmentation."""
SHOWN = 8
DECIDED = (
    "recompute_granularity", "recompute_modules", "recompute_method", "recompute_num_layers",
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
)  # fmt: skip
"""Fields of TransformerConfig that the search decides, or that it leaves out."""


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits."""

    config: Config
    """The configuration on it."""
    memory_bytes: int
    """Of the worst rank."""
    stages: Mapping[str, StepTime]
    """Stage of training -> its step."""
    days: float
    """All steps, without monitors."""
    tflops: float
    """Model TFLOP/s of each GPU."""

    @property
    def recompute(self) -> str:
        """What is computed again, in words."""
        given = self.config.megatron.transformer
        return (
            "all" if given.get("recompute_granularity") == "full" else "+".join(given.get("recompute_modules", ["-"]))
        )

    def overrides(self) -> list[str]:
        """Arguments that lay a configuration out so."""
        p = self.config.parallel
        found = [
            f"--parallel.{f.name}={json.dumps(getattr(p, f.name))}"
            for f in dataclasses.fields(p)
            if f.name != "context_levels"
        ]
        given = {name: self.config.megatron.transformer.get(name) for name in DECIDED[:4]}
        return found + [f"--megatron.transformer.{name}={json.dumps(value)}" for name, value in given.items() if value]


def suggest(
    config: Config, source: str, ranks: int, kind: str, say: Callable[[str], None] = lambda text: None
) -> list[Suggestion]:
    """The best layouts that fit, fastest first, the best of each (TP, PP, CP, EP); none if nothing fits.

    Raises ConfigError for a configuration that is wrong whatever its layout.
    """
    if ranks < 1:
        raise ConfigError(source, [f"--ranks: should be at least 1, is {ranks}"])
    config = reached(config)
    vocab = vocabulary(config, resolve(config))[0]
    plain = {k: v for k, v in config.megatron.transformer.items() if k not in DECIDED}
    config = dataclasses.replace(config, megatron=dataclasses.replace(config.megatron, transformer=plain))
    model = resolve(config).of_vocabulary(vocab)
    layouts = list(_layouts(model, ranks))
    flops = {name: w["flops_per_step"] * w["steps"] for name, w in work_of(config, model.shape, vocab, 1).items()}
    best: dict[tuple[int, ...], Suggestion] = {}
    began = said = time.monotonic()
    for number, layout in enumerate(layouts):
        if time.monotonic() - said > 2:
            said = time.monotonic()
            say(f"{number:,} of {len(layouts):,} layouts, {said - began:.0f} s, {len(best)} fit")
        laid = dataclasses.replace(config, parallel=layout)
        if layout_problems(laid, ranks, model.fields, MEGATRON_VERSION):
            continue
        key = (layout.tensor, layout.pipeline, layout.context, layout.expert)
        for found in _fitting(laid, model, ranks, GPUS[kind], flops):
            if key not in best or found.days < best[key].days:
                best[key] = found
    ordered = sorted(best.values(), key=lambda one: one.days)[:SHOWN]
    return [dataclasses.replace(one, memory_bytes=_exact_bytes(one.config, model, ranks)) for one in ordered]


def _layouts(model: ResolvedModel, ranks: int) -> Iterator[ParallelConfig]:
    """Layouts whose sizes divide the ranks; what a model does not allow is left to the rules."""
    shape = model.shape
    for tensor in _divisors(min(ranks, NODE), ranks):
        for pipeline in _divisors(shape.layers, ranks // tensor):
            for context in _divisors(ranks, ranks // (tensor * pipeline)):
                for expert in _divisors(shape.experts, ranks // pipeline) if shape.experts else (1,):
                    for expert_tensor in sorted({1, tensor}) if shape.experts else (tensor,):
                        for chunks in _divisors(shape.layers // pipeline, 8) if pipeline > 1 else (1,):
                            virtual = chunks if chunks > 1 else None
                            if ranks % (expert_tensor * expert * pipeline) == 0:
                                yield ParallelConfig(tensor, pipeline, virtual, expert, expert_tensor, context)


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, min(number, most) + 1) if number % size == 0 and most % size == 0 or size == 1]


def _recomputations(shape: Any) -> list[dict[str, Any]]:
    """From what costs least time to what takes least memory."""
    parts = ["layernorm", *(["mlp"] if not all(shape.routed) else []), *(["moe"] if any(shape.routed) else [])]
    return [
        {}, {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
        {"recompute_granularity": "selective", "recompute_modules": parts},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ]  # fmt: skip


def _fitting(
    config: Config, model: ResolvedModel, ranks: int, gpu: Gpu, flops: Mapping[str, float]
) -> Iterator[Suggestion]:
    """The layout with the least recomputation that fits."""
    for again in _recomputations(model.shape):
        given = {**config.megatron.transformer, **again}
        one = dataclasses.replace(config, megatron=dataclasses.replace(config.megatron, transformer=given))
        sizes = Sizes(model.shape, {**model.fields, **again}, config.parallel, model.vocab_rows)
        held = [_parameters(sizes, stage) for stage in range(config.parallel.pipeline)]
        memory = max(_bytes(one, sizes, stage, ranks, numel) for stage, numel in enumerate(held))
        if memory > ROOM * gpu.memory_gib * GIB:
            continue
        ddp = config.megatron.ddp
        steps = {name: step_time(sizes, of, ranks, gpu, ddp, max(held)) for name, of in config.stages.items()}
        seconds = sum(steps[name].total_s * (of.tokens / of.global_batch_tok) for name, of in config.stages.items())
        if seconds:
            yield Suggestion(one, memory, steps, seconds / 86400, sum(flops.values()) / seconds / ranks / 1e12)
        return


def _parameters(sizes: Sizes, stage: int) -> tuple[int, int]:
    """(dense, expert) parameters of a rank of a pipeline stage."""
    s, p = sizes.shape, sizes.layout
    dense = expert = 0
    for layer in sizes.stage_layers(stage):
        for part in (part for part in s.parts(layer) if part.trained):
            if part.over == "expert":
                expert += part.numel // sizes.expert_tensor * (s.experts // p.expert)
            else:
                dense += part.numel // (p.tensor if part.over == "tensor" else 1)
    embedding = sizes.vocab_rows // p.tensor * s.hidden
    first, last = stage == 0, stage == p.pipeline - 1
    dense += embedding * (first + (last and (not s.tied or p.pipeline > 1))) + s.hidden * last
    return dense, expert


def _bytes(config: Config, sizes: Sizes, stage: int, ranks: int, numel: Sequence[int]) -> int:
    """Memory of a rank of a stage, the padding of buffers apart."""
    p, value = config.parallel, value_bytes(config)
    gradient = 4 if config.megatron.ddp.get("grad_reduce_in_fp32", True) else value
    replicas = (ranks // (p.tensor * p.pipeline), ranks // (sizes.expert_tensor * p.expert * p.pipeline))
    kept = sum(numel) * (value + gradient) + router_state_bytes(sizes, stage)
    kept += sum(count * (8 if value == 4 else 12) // among for count, among in zip(numel, replicas))
    kept += fp8_copies_bytes(sizes, stage) if config.training.fp8 != "none" else 0
    return kept + peak_activations(config, sizes, stage, ranks, value)


def _exact_bytes(config: Config, model: ResolvedModel, ranks: int) -> int:
    resolved = dataclasses.replace(resolve(config), vocab_size=model.vocab_size)
    return max(memory.total_bytes for memory in rank_memory(config, sizes_of(config, resolved), ranks))


def print_suggestions(config: Config, source: str, ranks: int | None, kind: str | None, as_json: bool) -> None:
    """Print the layouts, as a table or as one JSON object. Raises ConfigError if none fits."""
    if ranks is None:
        raise ConfigError(source, ["--suggest: needs --ranks, the number of GPUs"])
    kind = kind or "H100"
    found = suggest(config, source, ranks, kind, say=lambda text: print(f"lccp plan: {text}", file=sys.stderr))
    if not found:
        what = f"{ranks} {kind} of {GPUS[kind].memory_gib:g} GiB"
        raise ConfigError(
            source, [f"--suggest: no layout fits {what}; raise --ranks, or lower context_tok or micro_batch"]
        )
    print(
        json.dumps(_as_json(found, source, ranks, kind), indent=1) if as_json else _as_table(found, source, ranks, kind)
    )


def _as_json(found: Sequence[Suggestion], source: str, ranks: int, kind: str) -> dict[str, Any]:
    return {
        "source": source, "ranks": ranks, "gpu": kind, "memory_gib": GPUS[kind].memory_gib,
        "layouts": [
            {
                "parallel": dataclasses.asdict(one.config.parallel), "recompute": one.recompute,
                "overrides": one.overrides(), "memory_bytes": one.memory_bytes, "days": one.days,
                "gpu_hours": one.days * 24 * ranks, "tflops_per_gpu": one.tflops,
                "stages": {
                    name: {**dataclasses.asdict(step), "step_s": step.total_s} for name, step in one.stages.items()
                },
            }
            for one in found
        ],
    }  # fmt: skip


def _as_table(found: Sequence[Suggestion], source: str, ranks: int, kind: str) -> str:
    last = list(found[0].stages)[-1]
    lines = [
        f"{source}: {resolve(found[0].config).name} on {ranks} {kind}, layouts that fit, by predicted speed",
        f"{'':>3}{'TP':>4}{'PP':>4}{'VPP':>5}{'CP':>4}{'DP':>5}{'EP':>4}{'ETP':>5}  {'recomputed':<20}{'GiB':>7}"
        f"{'a step of ' + last:>{max(10, 12 + len(last))}}{'waiting':>9}{'sending':>9}{'TFLOP/s':>9}{'days':>9}",
    ]
    for number, one in enumerate(found, 1):
        p, step = one.config.parallel, one.stages[last]
        sending = step.tensor_s + step.expert_s + step.context_s + step.data_s
        replicas = ranks // (p.tensor * p.pipeline * p.context)
        lines.append(
            f"{number:>2} {p.tensor:>4}{p.pipeline:>4}{p.virtual_pipeline or 1:>5}{p.context:>4}{replicas:>5}{p.expert:>4}"
            f"{p.expert_tensor or p.tensor:>5}  {one.recompute:<20}{one.memory_bytes / GIB:>7.1f}"
            f"{time_text(step.total_s):>{max(10, 12 + len(last))}}{step.bubble_s / step.total_s:>9.1%}"
            f"{sending / step.total_s:>9.1%}{one.tflops:>9.0f}{digits_text(one.days):>9}"
        )
    lines += [
        f"GiB: of the worst rank, which may take {ROOM:.0%} of {GPUS[kind].memory_gib:g} here. Speed: a model fitted to one",
        "published series, good for ranking; measure before you rely on it. Nodes have eight GPUs. The first one is",
        "  " + " ".join(found[0].overrides()),
    ]
    return "\n".join(lines)
