"""`lccp train --dry-run`: one step of every stage that the run reaches, on the real layout, without weights or a GPU.

In: a configuration and how many ranks there would be. Out: what each pipeline stage holds, does and sends, and every
reason found why the first step would fail, one line each. Megatron-Core itself builds the model, runs its schedule,
reduces gradients and updates, on fake process groups and tensors without memory (parallel/fake.py), once for the first
and once for the last rank of every pipeline stage.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_lccp.config.fields import PLAIN_ATTENTION
from megatron_lccp.config.load import ConfigError
from megatron_lccp.config.rules import layout_problems
from megatron_lccp.config.tree import Config
from megatron_lccp.data.loader import stage_data, text_of
from megatron_lccp.data.manifest import check_data
from megatron_lccp.data.tokenizers.load import configured_tokenizer
from megatron_lccp.measuring.beforehand import monitor_problems, place, planning_window
from megatron_lccp.model.build import passthrough_problems
from megatron_lccp.model.resolved import ResolvedModel, resolve
from megatron_lccp.model.shape import Shape
from megatron_lccp.parallel import compat
from megatron_lccp.parallel.fake import Message
from megatron_lccp.planning.dry_run_rank import Findings, Longest, RankRun, micro_batches_of, run_rank
from megatron_lccp.planning.monitor_cost import prefills_of
from megatron_lccp.planning.plan import reached, smallest_ranks
from megatron_lccp.text import count_text
from megatron_lccp.training.progress import on_terminal
from megatron_lccp.training.setup import about_run, check_base
from megatron_lccp.weights.checkpoint import checkpoints_in, require_same_run
from megatron_lccp.weights.fit import require_fit
from megatron_lccp.weights.sharded import read_about, read_metadata, tensors_in
from megatron_lccp.weights.whole import shapes_in

# What needs a GPU or Transformer Engine, and the value that is run in its place.
NOT_RUN: dict[str, Any] = {
    "fp4": None, "fp8_param": False, "fp8_dot_product_attention": False, "fp8_multi_head_attention": False,
    "first_last_layers_bf16": False, "moe_router_padding_for_quantization": False, "moe_router_padding_for_fp8": False,
    "cp_comm_type": None, "apply_rope_fusion": False,
    "masked_softmax_fusion": False, "gradient_accumulation_fusion": False, "persist_layer_norm": False,
    "moe_permute_fusion": False, "moe_router_fusion": False, "use_te_activation_func": False,
    "enable_cuda_graph": False, "cuda_graph_impl": "none", "fine_grained_activation_offloading": False,
    "cpu_offloading": False, **PLAIN_ATTENTION,
}  # fmt: skip
DISPATCHERS = {"flex": "alltoall"}


def dry_run(config: Config, source: str, ranks: int | None) -> int:
    """Run and report; 0 if nothing was found, else 2. Raises ConfigError for a layout that cannot be built at all.

    Without `ranks`, the fewest that the layout allows.
    """
    compat.apply()
    ranks = smallest_ranks(config) if ranks is None else ranks
    model, findings = resolve(config), Findings()
    problems = passthrough_problems(config, model, here=False) + layout_problems(
        config, ranks, model.fields, compat.MEGATRON_VERSION
    )
    data = check_data(config)
    if problems:
        raise ConfigError(source, problems + data)
    config = reached(config)
    plain, left_out = without_gpu(config, model.fields)
    for problem in data:
        findings.add(problem)
    tokenizer = _tokenizer(config, model, findings)
    model = model.of_vocabulary(tokenizer.vocab_size if tokenizer else config.data.tokenizer.vocab_size)
    model_run = resolve(plain).of_vocabulary(model.vocabulary)
    if not data:
        _read_batches(config, ranks, findings)
    weights = _check_start(config, model, tokenizer, findings)
    samples = _longest_prefills(config, None if data else tokenizer, model.vocabulary, model.shape, findings)
    rank_runs = []
    for rank in tqdm(ranks_to_run(config, ranks), "running ranks", leave=False, disable=not on_terminal()):
        rank_runs.append(run_rank(plain, model_run, rank, ranks, samples, findings))
    check_messages(rank_runs, findings)
    if weights and all(one.tensors for one in rank_runs):
        with findings.of("model.init_from"):
            require_fit(weights, _shapes_at(weights), [one.tensors for one in rank_runs], model.vocabulary)
    print(report(config, source, ranks, rank_runs, left_out))
    for line in findings.lines():
        print(f"lccp: {source}: {line}", file=sys.stderr)
    print(count_text(len(findings.ranks_of), "finding") if findings.ranks_of else "no findings")
    return 2 if findings.ranks_of else 0


def without_gpu(config: Config, fields: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The configuration as a machine without a GPU can run it, and what it leaves out."""
    stand_ins = {name: value for name, value in NOT_RUN.items() if fields.get(name, value) != value}
    if (dispatcher := fields.get("moe_token_dispatcher_type")) in DISPATCHERS:
        stand_ins["moe_token_dispatcher_type"] = DISPATCHERS[dispatcher]
    if "moe_act" in (modules := fields.get("recompute_modules") or []):  # of Transformer Engine's experts alone
        stand_ins["recompute_modules"] = [module for module in modules if module != "moe_act"]
    left_out = [f"megatron.transformer.{name}" for name in stand_ins]
    model = config.model
    kernels = {f.name for f in dataclasses.fields(model) if getattr(model, f.name) in ("auto", "transformer_engine")}
    portable: dict[str, Any] = dict.fromkeys(kernels, "portable")
    precision = "bf16" if config.training.precision == "auto" else config.training.precision
    if config.training.fp8 != "none":
        left_out.append("training.fp8")
    if config.parallel.context_levels is not None:
        left_out.append("parallel.context_levels")
    training = dataclasses.replace(config.training, precision=precision, fp8="none", measure_in="bf16")
    transformer = {**config.megatron.transformer, **stand_ins, "perform_initialization": False}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, **portable),
        parallel=dataclasses.replace(config.parallel, context_levels=None),
        megatron=dataclasses.replace(config.megatron, transformer=transformer),
        training=training,
    ), left_out


def ranks_to_run(config: Config, ranks: int) -> list[int]:
    """The first and last rank of every pipeline stage: first and last tensor, context, expert and data rank."""
    per_stage = ranks // config.parallel.pipeline
    first = range(0, ranks, per_stage)
    return sorted({rank for start in first for rank in (start, start + per_stage - 1)})


def _tokenizer(config: Config, model: ResolvedModel, findings: Findings) -> Any:
    path = Path(config.data.tokenizer.path)
    if not path.exists():
        return None  # among the problems of the data
    with findings.of("data.tokenizer.path"):
        tokenizer = configured_tokenizer(config.data.tokenizer)
        if model.vocab_size is not None and tokenizer.vocab_size > model.vocab_size:
            findings.add(f"data.tokenizer.path: has {tokenizer.vocab_size} tokens, the model {model.vocab_size}")
        return tokenizer
    return None


def _read_batches(config: Config, ranks: int, findings: Findings) -> None:
    """The first micro-batch of every stage, from the prepared files."""
    p = config.parallel
    replicas = ranks // (p.tensor * p.pipeline * p.context)
    for name, stage in config.stages.items():
        first = dataclasses.replace(stage, tokens=stage.global_batch_tok, goes_on_from=None)
        one_step = {**config.stages, name: first}
        with findings.of(f"stages.{name}: reading the first batch"), tempfile.TemporaryDirectory() as cache:
            data = stage_data(dataclasses.replace(config, stages=one_step), name, cache)
            data.batch(0, 0, replicas - 1, replicas)


def _check_start(config: Config, model: ResolvedModel, tokenizer: Any, findings: Findings) -> Path | None:
    """The checkpoint that the run would go on from, or the weights that it would start from: what it says of itself.

    Returns where those weights are, if nothing is wrong with them so far.
    """
    if found := checkpoints_in(Path(config.dir) / "checkpoints"):
        with findings.of("dir"):
            require_same_run(found[-1], read_about(found[-1]), about_run(config, model, tokenizer) if tokenizer else {})
    elif config.model.init_from and not Path(config.model.init_from).exists():
        remedy = "make it with tools/convert_checkpoint.py, or start from random weights with null"
        findings.add(f"model.init_from: {config.model.init_from} is no file or directory; {remedy}")
    elif config.model.init_from:
        with findings.of("model.init_from"):
            check_base(model, config.model.init_from, tokenizer)
            return Path(config.model.init_from)
    return None


def _shapes_at(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a whole-model file or of a checkpoint directory. ValueError if it cannot be read."""
    if path.is_dir():
        return {name: shape for name, (shape, _) in tensors_in(read_metadata(path)).items()}
    return shapes_in(path)


def _longest_prefills(
    config: Config, tokenizer: Any, vocab: int, shape: Shape, findings: Findings
) -> dict[str, Longest]:
    """Monitor -> the longest prefill that it would run and that needs no other before it."""
    text = (lambda name, at_least: text_of(config, tokenizer, name, at_least)) if tokenizer else None
    window, found = planning_window(config, shape, vocab, tokenizer, text), {}
    for problem in monitor_problems(config.monitors, window):
        findings.add(problem)
    for number, monitor in enumerate(config.monitors):
        with findings.of(name := place(number, monitor)):
            if (work := monitor.work(window)) is not None:
                alone = [p for p in prefills_of(work, True) if p.start == 0]
                found[name] = Longest(max(alone, key=len), work.look, work.questions)
    return found


def check_messages(rank_runs: Sequence[RankRun], findings: Findings) -> None:
    """What a rank sends is what the rank beside it expects: as many tensors, in order, of these shapes and types."""
    at = {one.rank: one for one in rank_runs}
    for one in rank_runs:
        for name, step in one.steps.items():
            for peer, sent in step.sent.items():
                if peer not in at or name not in at[peer].steps:
                    continue
                whole = name not in one.failed | at[peer].failed
                expected = at[peer].steps[name].received.get(one.rank, [])
                wrong = [k for k, pair in enumerate(zip(sent, expected)) if pair[0] != pair[1]]
                if wrong:
                    k = wrong[0]
                    findings.add(
                        f"stages.{name}: rank {one.rank} sends {_shape(sent[k])} to rank {peer}, which expects "
                        f"{_shape(expected[k])} (message {k} of {len(sent)})"
                    )
                elif whole and len(sent) != len(expected):
                    findings.add(
                        f"stages.{name}: rank {one.rank} sends {len(sent)} tensors to rank {peer}, which expects "
                        f"{len(expected)}: the job would hang"
                    )


def _shape(message: Message) -> str:
    shape, dtype = message
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def report(config: Config, source: str, ranks: int, rank_runs: Sequence[RankRun], left_out: Sequence[str]) -> str:
    """What was run, for people."""
    p = config.parallel
    replicas, chunks = ranks // (p.tensor * p.pipeline * p.context), p.virtual_pipeline or 1
    lines = [
        f"{source}: {resolve(config).name} on {count_text(ranks, 'rank')}, one step of each stage without weights",
        f"  layout      TP {p.tensor} x PP {p.pipeline}{f' x {chunks} chunks' if chunks > 1 else ''} x CP {p.context} "
        f"x DP {replicas}; experts EP {p.expert} x ETP {p.expert_tensor or p.tensor}",
    ]
    held = {one.rank: f"{_spans(one.layers)}{' + ' + one.ends if one.ends else ''}" for one in rank_runs}
    width = max(map(len, held.values()))
    for name, stage in config.stages.items():
        count = micro_batches_of(stage, replicas)
        bubble = (p.pipeline - 1) / (chunks * count + p.pipeline - 1)
        lines += [
            f"Stage {name}: each of {replicas} data-parallel replicas runs micro-batches of {stage.micro_batch} x "
            f"{stage.context_tok:,} tokens, {count} a step; {bubble:.1%} of it is pipeline bubble, if pipeline stages "
            "take equal time",
            f"{'pipeline':>10}{'ranks':>12}  {'layers':<{width}}{'in flight':>11}  sends on in a step",
        ]
        lines += [
            _pipeline_line(one, ranks // p.pipeline, name, f"{held[one.rank]:<{width}}")
            for one in rank_runs
            if one.rank % (ranks // p.pipeline) == 0
        ]
    ran = [one.rank for one in rank_runs]
    lines += [
        f"Ran: {len(ran)} of {ranks} ranks, the first and last of every pipeline stage: building, forward and backward",
        "  of every micro-batch (the first and last of them through the layers), gradient reduction, update, learning",
        "  rate, training health, and the longest prefill of each monitor, in the first layer. Experts were given "
        "equally",
        "  many tokens. In flight: micro-batches whose activations a rank holds at once.",
        "Not run: values (no NaN is found), memory (see `lccp plan`), NCCL, kernels of GPUs"
        + ("; " + ", ".join(left_out) if left_out else ""),
    ]
    return "\n".join(lines)


def _pipeline_line(one: RankRun, per_stage: int, stage: str, layers: str) -> str:
    step = one.steps.get(stage)
    if step is None or stage in one.failed:
        return f"{one.pipeline_stage:>10}{'failed':>12}  {layers}"
    after = {peer: sent for peer, sent in step.sent.items() if peer > one.rank} or step.sent
    sends = "; ".join(f"{len(sent)} x {_shape(sent[0])} to rank {peer}" for peer, sent in sorted(after.items()))
    ranks = f"{one.rank}-{one.rank + per_stage - 1}"
    return f"{one.pipeline_stage:>10}{ranks:>12}  {layers}{step.in_flight():>11}  {sends or '-'}"


def _spans(numbers: Sequence[int]) -> str:
    """1-4, 17-20."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans) or "none"
