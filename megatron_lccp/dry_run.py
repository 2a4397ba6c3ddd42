"""`lccp train --dry-run`: one step of every stage on the real layout, without weights, ranks or a GPU.

In: a configuration and how many ranks there would be. Out: what each pipeline stage holds, does and sends, and every
reason found why the first step would fail, one line each. Megatron-Core itself builds the model, runs its schedule,
reduces gradients and updates, on fake process groups and tensors without memory (parallel/fake.py), once for the first
and once for the last rank of every pipeline stage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from megatron_lccp.compose import about_model
from megatron_lccp.config.load import ConfigError
from megatron_lccp.config.rules import layout_problems
from megatron_lccp.config.tree import Config, StageConfig
from megatron_lccp.data.loader import StageData, text_of
from megatron_lccp.data.manifest import check_data
from megatron_lccp.data.prefills import Prefill, plain
from megatron_lccp.data.tokenizer import load_tokenizer
from megatron_lccp.model.build import (
    bare,
    build_chunks,
    passthrough_problems,
    set_rope_base,
    transformer_fields,
    wrap_for_training,
)
from megatron_lccp.model.families import Family, family_of
from megatron_lccp.model.forward import predict
from megatron_lccp.model.weights import model_shards
from megatron_lccp.monitor_cost import planning_window, prefills_of
from megatron_lccp.monitors.head_ablation import HeadAblation
from megatron_lccp.parallel import compat
from megatron_lccp.parallel.fake import Message, Record, fake_rank
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.parallel.zigzag import local_batch
from megatron_lccp.plan import smallest_ranks
from megatron_lccp.training.checkpoint import CheckpointError, checkpoints_in, read_about
from megatron_lccp.training.health import HealthMeter
from megatron_lccp.training.optimizer import make_optimizer, make_scheduler
from megatron_lccp.training.step import _clip, compute_gradients, prepare_schedules
from megatron_lccp.training.window import EvalWindow

# What needs a GPU or Transformer Engine, and the value that is walked in its place.
NOT_WALKED: dict[str, Any] = {
    "fp8": None, "fp4": None, "fp8_param": False, "tp_comm_overlap": False, "apply_rope_fusion": False,
    "masked_softmax_fusion": False, "gradient_accumulation_fusion": False, "persist_layer_norm": False,
    "moe_permute_fusion": False, "moe_router_fusion": False, "use_te_activation_func": False,
    "enable_cuda_graph": False, "cuda_graph_impl": "none", "fine_grained_activation_offloading": False,
}  # fmt: skip
DISPATCHERS = {"flex": "alltoall"}


@dataclass
class Walk:
    """What one rank did."""

    rank: int
    pipeline_stage: int
    layers: list[int] = field(default_factory=list)
    """Numbers of its transformer layers, from 1."""
    ends: str = ""
    """Embedding or output layer, if it has one."""
    steps: dict[str, Record] = field(default_factory=dict)
    """Stage of the training -> what its step did."""
    failed: set[str] = field(default_factory=set)
    """Stages whose step did not come to its end."""


@dataclass
class Findings:
    """Reasons why the training would fail, each with the ranks that met it."""

    ranks_of: dict[str, list[int]] = field(default_factory=dict)

    def add(self, text: str, rank: int | None = None) -> None:
        self.ranks_of.setdefault(" ".join(text.split()), []).extend([] if rank is None else [rank])

    @contextlib.contextmanager
    def of(self, what: str, rank: int | None = None) -> Iterator[None]:
        """Whatever is raised inside is a finding."""
        try:
            yield
        except Exception as error:  # Megatron-Core asserts, torch raises RuntimeError; all of it ends a training
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "megatron" in f.filename]
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            at = ""
            if frames and "megatron/core/" in frames[-1].filename:
                at = f" (megatron/core/{frames[-1].filename.split('megatron/core/')[-1]}:{frames[-1].lineno})"
            self.add(f"{what}: {kind}{error or 'no message'}{at}", rank)

    def lines(self) -> list[str]:
        """One line each."""
        found = []
        for text, ranks in self.ranks_of.items():
            where = f" [rank {', '.join(map(str, ranks[:4]))}{', ...' if len(ranks) > 4 else ''}]" if ranks else ""
            found.append(text + where)
        return found


def dry_run(config: Config, source: str, ranks: int | None) -> int:
    """Walk and report; 0 if nothing was found, else 2. Raises ConfigError for a layout that cannot be built at all.

    Without `ranks`, the fewest that the layout allows.
    """
    compat.apply()
    ranks = smallest_ranks(config) if ranks is None else ranks
    family = family_of(config.model.family)
    fields, findings = transformer_fields(config, family), Findings()
    walked, left_out = walkable(config, fields)
    problems = passthrough_problems(walked) + layout_problems(config, ranks, fields, compat.MEGATRON_VERSION)
    data = check_data(config)
    if problems:
        raise ConfigError(source, problems + data)
    for problem in data:
        findings.add(problem)
    tokenizer = _tokenizer(config, family, findings)
    vocab = family.vocab_size or (tokenizer.vocab_size if tokenizer else config.data.tokenizer.vocab_size)
    if not data:
        _read_batches(config, ranks, findings)
    _check_start(config, tokenizer, findings)
    samples = _longest_prefills(config, None if data else tokenizer, vocab, fields, findings)
    walks = []
    for rank in tqdm(walked_ranks(config, ranks), "walking ranks", leave=False, disable=not sys.stderr.isatty()):
        walks.append(walk(walked, family, vocab, rank, ranks, samples, findings))
    check_messages(walks, findings)
    print(report(config, source, ranks, walks, left_out))
    for line in findings.lines():
        print(f"lccp: {source}: {line}", file=sys.stderr)
    print(f"{len(findings.ranks_of) or 'no'} finding{'s' * (len(findings.ranks_of) != 1)}")
    return 2 if findings.ranks_of else 0


def walkable(config: Config, fields: dict[str, Any]) -> tuple[Config, list[str]]:
    """The configuration as a machine without a GPU can walk it, and what it leaves out."""
    stand_ins = {name: value for name, value in NOT_WALKED.items() if fields.get(name, value) != value}
    if (dispatcher := fields.get("moe_token_dispatcher_type")) in DISPATCHERS:
        stand_ins["moe_token_dispatcher_type"] = DISPATCHERS[dispatcher]
    left_out = [f"megatron.transformer.{name}" for name in stand_ins]
    model = config.model
    kernels = {f.name for f in dataclasses.fields(model) if getattr(model, f.name) in ("auto", "transformer_engine")}
    training = dataclasses.replace(
        config.training, precision="bf16" if config.training.precision == "auto" else config.training.precision
    )
    transformer = {**config.megatron.transformer, **stand_ins, "perform_initialization": False}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, **{name: "portable" for name in kernels}),
        megatron=dataclasses.replace(config.megatron, transformer=transformer),
        training=training,
    ), left_out


def walked_ranks(config: Config, ranks: int) -> list[int]:
    """The first and last rank of every pipeline stage: first and last tensor, context, expert and data rank."""
    per_stage = ranks // config.parallel.pipeline
    first = range(0, ranks, per_stage)
    return sorted({rank for start in first for rank in (start, start + per_stage - 1)})


def _tokenizer(config: Config, family: Family, findings: Findings) -> Any:
    path = Path(config.data.tokenizer.path)
    if not path.exists():
        return None  # among the problems of the data
    with findings.of("data.tokenizer.path"):
        tokenizer = load_tokenizer(path)
        if family.vocab_size is not None and tokenizer.vocab_size > family.vocab_size:
            findings.add(f"data.tokenizer.path: has {tokenizer.vocab_size} tokens, the model {family.vocab_size}")
        return tokenizer
    return None


def _read_batches(config: Config, ranks: int, findings: Findings) -> None:
    """The first micro-batch of every stage, from the prepared files."""
    p = config.parallel
    replicas = ranks // (p.tensor * p.pipeline * p.context)
    for name, stage in config.stages.items():
        one_step = {**config.stages, name: dataclasses.replace(stage, tokens=stage.global_batch_tok)}
        with findings.of(f"stages.{name}: reading the first batch"), tempfile.TemporaryDirectory() as cache:
            data = StageData(dataclasses.replace(config, stages=one_step), name, config.seed, cache)
            data.batch(0, 0, replicas - 1, replicas)


def _check_start(config: Config, tokenizer: Any, findings: Findings) -> None:
    """The checkpoint that the run would go on from, or the weights that it would start from."""
    if found := checkpoints_in(Path(config.dir) / "checkpoints"):
        with findings.of("dir"):
            about = read_about(found[-1])["about"]
            for name, value in (about_model(config, tokenizer) if tokenizer else {}).items():
                if about.get(name) != value:
                    raise CheckpointError(
                        f"{found[-1]}: is of another run: {name} was {about.get(name)!r}, is {value!r}"
                    )
    elif config.model.init_from and not Path(config.model.init_from).is_file():
        findings.add(f"model.init_from: {config.model.init_from} is no file")


def _longest_prefills(
    config: Config, tokenizer: Any, vocab: int, fields: dict[str, Any], findings: Findings
) -> dict[str, Prefill]:
    """Monitor -> the longest prefill that it would run and that needs no other before it."""
    text = (lambda name, at_least: text_of(config, tokenizer, name, at_least)) if tokenizer else None
    window, found = planning_window(config, vocab, tokenizer, text), {}
    for number, monitor in enumerate(config.monitors):
        name = f"monitors.{number} ({monitor.name})"
        with findings.of(name):
            if isinstance(monitor, HeadAblation):
                monitor.sets(torch.zeros(fields["num_layers"], fields["num_attention_heads"]).numpy())
            if hasattr(monitor, "work"):
                alone = [p for p in prefills_of(monitor.work(window, 1), True) if p.start == 0]
                found[name] = max(alone, key=len)
    return found


def walk(
    config: Config, family: Family, vocab: int, rank: int, ranks: int, samples: dict[str, Prefill], findings: Findings
) -> Walk:
    """Be one rank: build, one step of each stage, the longest prefill of each monitor. It ends at its first failure."""
    per_stage = ranks // config.parallel.pipeline
    done = Walk(rank, rank // per_stage)
    warnings.filterwarnings("ignore", message=".*sequence.parallel")
    with fake_rank(config.parallel, config.seed, rank, ranks) as (groups, record), contextlib.ExitStack() as failed:
        failed.enter_context(findings.of("building the model", rank))
        bare_chunks = build_chunks(config, family, vocab, groups)
        done.layers = [layer.layer_number for chunk in bare_chunks for layer in chunk.decoder.layers]
        done.ends = " + ".join(
            ["embedding"] * bare_chunks[0].pre_process + ["output layer"] * bare_chunks[-1].post_process
        )
        _check_weights(config, bare_chunks)
        chunks = wrap_for_training(bare_chunks, config, groups)
        optimizer = make_optimizer(chunks, config, groups)
        prepare_schedules(chunks)
        meter = HealthMeter(chunks, optimizer, groups) if config.training.health_every else None
        for name, stage in config.stages.items():
            done.failed.add(name)
            with findings.of(f"stages.{name}: one step", rank):
                _walk_step(config, stage, groups, chunks, optimizer, meter)
                done.failed.discard(name)
            done.steps[name] = record.cut()
        for name, prefill in samples.items():
            with findings.of(name, rank):
                _walk_prefill(config, name, groups, chunks, vocab, prefill)
    return done


def _check_weights(config: Config, chunks: Sequence[torch.nn.Module]) -> None:
    """Every tensor of this rank is in `model.init_from`, with its shape. ValueError names the first that is not."""
    path = config.model.init_from
    if not path or not Path(path).is_file() or checkpoints_in(Path(config.dir) / "checkpoints"):
        return
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for shard in model_shards(chunks):
                shape = tuple(file.get_slice(shard.key).get_shape()) if shard.key in names else None
                if shape != tuple(shard.global_shape):
                    raise ValueError(
                        f"model.init_from: {path}: {shard.key} has shape {shape}, the model wants {shard.global_shape}"
                    )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model.init_from: {path}: cannot be read as safetensors: {error}") from error


def micro_batches_of(stage: StageConfig, replicas: int) -> int:
    """Micro-batches of a step on each of so many data-parallel replicas."""
    return stage.global_batch_tok // (stage.context_tok * stage.micro_batch * replicas)


def _walk_step(
    config: Config, stage: StageConfig, groups: Groups, chunks: Sequence[Any], optimizer: Any, meter: HealthMeter | None
) -> None:
    """One step as training/step.py makes it; what the ranks would agree on is left out."""
    set_rope_base(chunks, stage.rope_base)
    make_scheduler(optimizer, config, stage, 0).step(increment=stage.global_batch_tok)
    count = micro_batches_of(stage, groups.dp.size())

    def batches(chunk: Any) -> Iterator[dict[str, torch.Tensor]]:
        tokens = torch.zeros(stage.micro_batch, stage.context_tok, dtype=torch.int64)
        batch = local_batch({"tokens": tokens, "labels": tokens}, groups.cp, torch.device("cpu"))
        for number in range(count):
            _pass_through(chunk, 0 < number < count - 1)
            yield batch

    with _balanced_routing(), meter.watching() if meter else contextlib.nullcontext():
        compute_gradients(chunks, groups, [batches(c) for c in chunks], count, stage.context_tok, stage.micro_batch)
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if meter:
        meter.partial()
    _clip(optimizer, norm)
    optimizer.step_with_ready_grads()
    optimizer.zero_grad()


def _pass_through(chunk: torch.nn.Module, yes: bool, first: int = 0) -> None:
    """Whether layers, from the `first` of the chunk on, hand on what they get: those that would repeat what is walked.

    Of the micro-batches of a step the first and the last, which ends it, are walked through all layers.
    """
    for layer in bare(chunk).decoder.layers[first:]:
        if yes:
            layer.forward = lambda hidden_states, *_, context=None, **__: (hidden_states, context)
        else:
            layer.__dict__.pop("forward", None)


@contextlib.contextmanager
def _balanced_routing() -> Iterator[None]:
    """Routers send each expert as many tokens as every other, for what they choose is not known without values."""
    original = TopKRouter.routing

    def routing(self: TopKRouter, logits: torch.Tensor, *args: Any, **kwargs: Any):
        probs, map_tE = original(self, logits, *args, **kwargs)
        tokens, experts = map_tE.shape
        chosen_tk = torch.arange(tokens * self.topk).view(tokens, self.topk) % experts
        return probs, torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen_tk, True)

    TopKRouter.routing = routing
    try:
        yield
    finally:
        TopKRouter.routing = original


def _walk_prefill(
    config: Config, name: str, groups: Groups, chunks: Sequence[Any], vocab: int, prefill: Prefill
) -> None:
    """A prefill through the rank's first layer and its ends, as a window would run it."""
    window = EvalWindow(
        chunks=chunks, groups=groups, run=config.name, tokenizer=None, vocab_size=vocab, config_hash="", stage="",
        step=0, tokens=0, text=lambda name, at_least: None,
    )  # fmt: skip
    # as many as an interleaved pipeline takes, and of one length: fake ranks cannot be asked how long theirs are
    at_once = max(groups.pp.size(), bare(chunks[0]).config.microbatch_group_size_per_vp_stage or 1)
    other = plain(prefill.tokens, 0, (len(prefill) - 1, len(prefill)))
    replicas = [[prefill, *[other] * (at_once - 1 if len(chunks) > 1 else 0)]] * groups.dp.size()
    for number, chunk in enumerate(chunks):
        _pass_through(chunk, True, first=number == 0)
    try:
        with window.opened(), _balanced_routing():
            predict(chunks, groups, replicas, vocab, look="PPL" not in name)
    finally:
        for chunk in chunks:
            _pass_through(chunk, False)


def check_messages(walks: Sequence[Walk], findings: Findings) -> None:
    """What a rank sends is what the rank beside it expects: as many tensors, in order, of these shapes and types."""
    at = {walk.rank: walk for walk in walks}
    for walk in walks:
        for name, step in walk.steps.items():
            for peer, sent in step.sent.items():
                if peer not in at or name not in at[peer].steps:
                    continue
                whole = name not in walk.failed | at[peer].failed
                expected = at[peer].steps[name].received.get(walk.rank, [])
                wrong = [k for k, pair in enumerate(zip(sent, expected)) if pair[0] != pair[1]]
                if wrong:
                    k = wrong[0]
                    findings.add(
                        f"stages.{name}: rank {walk.rank} sends {_shape(sent[k])} to rank {peer}, which expects "
                        f"{_shape(expected[k])} (message {k} of {len(sent)})"
                    )
                elif whole and len(sent) != len(expected):
                    findings.add(
                        f"stages.{name}: rank {walk.rank} sends {len(sent)} tensors to rank {peer}, which expects "
                        f"{len(expected)}: the job would hang"
                    )


def _shape(message: Message) -> str:
    shape, dtype = message
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def report(config: Config, source: str, ranks: int, walks: Sequence[Walk], left_out: Sequence[str]) -> str:
    """What was walked, for people."""
    p = config.parallel
    replicas, chunks = ranks // (p.tensor * p.pipeline * p.context), p.virtual_pipeline or 1
    lines = [
        f"{source}: {config.model.family} on {ranks} ranks, one step of each stage without weights",
        f"  layout      TP {p.tensor} x PP {p.pipeline}{f' x {chunks} chunks' if chunks > 1 else ''} x CP {p.context} "
        f"x DP {replicas}; experts EP {p.expert} x ETP {p.expert_tensor or p.tensor}",
    ]
    for name, stage in config.stages.items():
        count = micro_batches_of(stage, replicas)
        bubble = (p.pipeline - 1) / (chunks * count + p.pipeline - 1)
        lines += [
            f"Stage {name}: {count} micro-batches of {stage.micro_batch} x {stage.context_tok:,} tokens on each of "
            f"{replicas} replicas; {bubble:.1%} of a step is pipeline bubble, if stages take equal time",
            f"{'pipeline':>10}{'ranks':>12}  {'layers':<22}{'in flight':>10}  sends on",
        ]
        lines += [
            _pipeline_line(walk, ranks // p.pipeline, name) for walk in walks if walk.rank % (ranks // p.pipeline) == 0
        ]
    walked = [walk.rank for walk in walks]
    lines += [
        f"Walked: {len(walked)} of {ranks} ranks, the first and last of every pipeline stage: building, forward and "
        "backward",
        "  of every micro-batch (layers in the first and last), gradient reduction, update, learning rate, training "
        "health,",
        "  and the longest prefill of each monitor, in the first layer. Experts were given equally many tokens.",
        "Not walked: values (no NaN is found), memory (see `lccp plan`), NCCL, kernels of GPUs"
        + ("; " + ", ".join(left_out) if left_out else ""),
    ]
    return "\n".join(lines)


def _pipeline_line(walk: Walk, per_stage: int, stage: str) -> str:
    layers = f"{_spans(walk.layers)}{' + ' + walk.ends if walk.ends else ''}"
    step = walk.steps.get(stage)
    if step is None or stage in walk.failed:
        return f"{walk.pipeline_stage:>10}{'failed':>12}  {layers:<22}"
    after = {peer: sent for peer, sent in step.sent.items() if peer > walk.rank} or step.sent
    sends = "; ".join(f"{len(sent)} x {_shape(sent[0])} to rank {peer}" for peer, sent in sorted(after.items()))
    ranks = f"{walk.rank}-{walk.rank + per_stage - 1}"
    return f"{walk.pipeline_stage:>10}{ranks:>12}  {layers:<22}{step.in_flight():>10}  {sends or '-'}"


def _spans(numbers: Sequence[int]) -> str:
    """1-4, 17-20."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in spans) or "none"
