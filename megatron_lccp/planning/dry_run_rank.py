"""One rank of a dry run: it builds, makes one step of each stage and runs the longest prefill of each monitor.

In: a configuration that this machine can run (dry_run.py), a rank of so many. Out: a `RankRun`, what the rank holds and
sends, and what failed, among the `Findings`. Megatron-Core's own code runs, without memory (parallel/fake.py).
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_lccp.config.tree import Config, StageConfig
from megatron_lccp.data.packed import is_packed, row_of
from megatron_lccp.measuring.forward import predict
from megatron_lccp.measuring.megatron_engine import MegatronEngine
from megatron_lccp.measuring.prefills import Prefill, plain
from megatron_lccp.model.build import bare, build_chunks, set_rope, wrap_for_training
from megatron_lccp.model.resolved import ResolvedModel
from megatron_lccp.parallel.fake import Record, fake_rank
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.parallel.zigzag import BOUNDS, local_batch
from megatron_lccp.training.health import HealthMeter
from megatron_lccp.training.optimizer import make_optimizer, make_scheduler
from megatron_lccp.training.step import compute_gradients, prepare_schedules, update
from megatron_lccp.weights.fit import whole_shapes
from megatron_lccp.weights.whole import model_shards


@dataclass(frozen=True)
class Longest:
    """The longest prefill of a monitor, and whether attention rows of answers and questions are scored in it."""

    prefill: Prefill
    look: bool
    questions: bool


@dataclass
class RankRun:
    """What one rank did."""

    rank: int
    pipeline_stage: int
    layers: list[int] = field(default_factory=list)
    """Numbers of its transformer layers, from 1."""
    ends: str = ""
    """Embedding or output layer, if it has one."""
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the model's tensors of which it holds a part, whole, by name; none if it could not be built."""
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
            self.add(f"{what}: {kind}{str(error) or 'no message'}{at}", rank)

    def lines(self) -> list[str]:
        """One line each."""
        found = []
        for text, ranks in self.ranks_of.items():
            where = f" [rank {', '.join(map(str, ranks[:4]))}{', ...' if len(ranks) > 4 else ''}]" if ranks else ""
            found.append(text + where)
        return found


def run_rank(
    config: Config, model: ResolvedModel, rank: int, ranks: int, samples: dict[str, Longest], findings: Findings
) -> RankRun:
    """Be one rank: build, one step of each stage, the longest prefill of each monitor. It ends at its first failure."""
    per_stage = ranks // config.parallel.pipeline
    done = RankRun(rank, rank // per_stage)
    warnings.filterwarnings("ignore", message=".*sequence.parallel")
    with fake_rank(config.parallel, config.seed, rank, ranks) as (groups, record), contextlib.ExitStack() as failed:
        failed.enter_context(findings.of("building the model", rank))
        bare_chunks = build_chunks(config, model, groups)
        done.layers = [layer.layer_number for chunk in bare_chunks for layer in chunk.decoder.layers]
        done.ends = " + ".join(
            ["embedding"] * bare_chunks[0].pre_process + ["output layer"] * bare_chunks[-1].post_process
        )
        done.tensors = whole_shapes(model_shards(bare_chunks))
        chunks = wrap_for_training(bare_chunks, config, groups)
        optimizer = make_optimizer(chunks, config)
        prepare_schedules(chunks)
        meter = HealthMeter(chunks, optimizer, groups) if config.training.health_every else None
        for name, stage in config.stages.items():
            done.failed.add(name)
            with findings.of(f"stages.{name}: one step", rank):
                _walk_step(config, stage, groups, chunks, optimizer, meter)
                done.failed.discard(name)
            done.steps[name] = record.cut()
        for name, longest in samples.items():
            with findings.of(name, rank):
                _run_prefill(config, groups, chunks, model.vocabulary, longest)
    return done


def micro_batches_of(stage: StageConfig, replicas: int) -> int:
    """Micro-batches of a step on each of so many data-parallel replicas."""
    return stage.global_batch_tok // (stage.context_tok * stage.micro_batch * replicas)


def _walk_step(
    config: Config, stage: StageConfig, groups: Groups, chunks: Sequence[Any], optimizer: Any, meter: HealthMeter | None
) -> None:
    """One step as training/step.py makes it; what the ranks would agree on is left out."""
    set_rope(chunks, stage)
    make_scheduler(optimizer, config, stage, 0).step(increment=stage.global_batch_tok)
    count = micro_batches_of(stage, groups.dp.size())

    rows, row_tok = row_of(stage)

    def batches(chunk: Any) -> Iterator[dict[str, Any]]:
        tokens = torch.zeros(rows, row_tok, dtype=torch.int64)
        whole: dict[str, Any] = {"tokens": tokens, "labels": tokens}
        if is_packed(stage):
            whole |= {"padding": tokens.bool(), "loss_weight": tokens.float()}
        if stage.masks == "documents":
            whole[BOUNDS] = (0, row_tok)  # one document: the most work that there can be
        batch = local_batch(whole, groups.cp, torch.device("cpu"))
        for number in range(count):
            _pass_through(chunk, 0 < number < count - 1)
            yield batch

    with _balanced_routing(), meter.watching() if meter else contextlib.nullcontext():
        compute_gradients(
            chunks, groups, [batches(c) for c in chunks], count, row_tok, rows,
            loss_chunk_tok=config.training.loss_chunk_tok,
        )  # fmt: skip
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if meter:
        meter.partial()
    update(optimizer, norm)
    optimizer.zero_grad()


def _pass_through(chunk: torch.nn.Module, yes: bool, first: int = 0) -> None:
    """Whether layers, from the `first` of the chunk on, hand on what they get: those that would repeat what is run.

    Of the micro-batches of a step the first and the last, which ends it, go through all layers.
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


def _run_prefill(config: Config, groups: Groups, chunks: Sequence[Any], vocab: int, longest: Longest) -> None:
    """A prefill through the rank's first layer and its ends, as a window would run it."""
    # as many as an interleaved pipeline takes, and of one length: fake ranks cannot be asked how long theirs are
    at_once = max(groups.pp.size(), bare(chunks[0]).config.microbatch_group_size_per_vp_stage or 1)
    prefill = longest.prefill
    other = plain(prefill.tokens, 0, (len(prefill) - 1, len(prefill)))
    replicas = [[prefill, *[other] * (at_once - 1 if len(chunks) > 1 else 0)]] * groups.dp.size()
    for number, chunk in enumerate(chunks):
        _pass_through(chunk, True, first=number == 0)
    try:
        with MegatronEngine(chunks, groups, vocab).opened(), _balanced_routing():
            predict(chunks, groups, replicas, vocab, longest.look, longest.questions)
    finally:
        for chunk in chunks:
            _pass_through(chunk, False)
