"""One optimizer step: forward and backward over the micro-batches, a decision that all ranks share, an update.

In: model chunks, optimizer, an iterator of micro-batches. Out: `StepResult`. A step whose loss or gradient norm is not
finite anywhere changes nothing on any rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.utils.checkpoint import checkpoint

from megatron_lccp.measuring.forward import hidden_states_out
from megatron_lccp.model.build import bare
from megatron_lccp.model.documents import documents
from megatron_lccp.parallel import compat
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.parallel.zigzag import BOUNDS
from megatron_lccp.training.health import HealthMeter, StepHealth


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss_nat: float
    """Mean next-token loss over the global batch."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    skipped: bool
    """True if loss or gradient was not finite: nothing was updated."""
    stop: bool
    """True if a rank wants to stop after this step."""
    health: StepHealth | None = None
    """What the step said of the model, if it was asked, also of a step that was skipped."""


def prepare_schedules(chunks: Sequence[DistributedDataParallel]) -> None:
    """Tell Megatron-Core's schedules how gradients are finished."""
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    if chunks[0].ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        grad_sync = [chunk.start_grad_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
        if len(chunks) > 1:
            config.grad_sync_func = grad_sync


def forward_step(batches: Iterator[dict[str, Any]], model: torch.nn.Module, loss_chunk_tok: int | None = None):
    """Megatron-Core's forward step: the next micro-batch -> losses [b, s] and what makes one number of them.

    A micro-batch holds `tokens`, `labels` and `positions`, [b, s] each. One in which labels do not all count has
    `loss_weight` too, and one in which attention ends at documents `bounds` (parallel/zigzag.py) and `padding`.
    """
    batch = next(batches)
    gpt = bare(model)
    packed = _packed(batch, gpt) if BOUNDS in batch else {}
    weight = batch.get("loss_weight")
    if loss_chunk_tok is None or not gpt.post_process:
        out = model(batch["tokens"], batch["positions"], None, labels=batch["labels"], **packed)
        if weight is not None and gpt.post_process:
            out = out * weight
    else:
        with hidden_states_out([gpt]):
            hidden_sbh = model(batch["tokens"], batch["positions"], None, **packed)
        out = losses_in_chunks(gpt, hidden_sbh, batch["labels"], loss_chunk_tok, weight)
    one_number = mean_loss if weight is None else weighted_loss
    return out, partial(one_number, context_ranks=gpt.config.context_parallel_size)


def _packed(batch: dict[str, Any], model: GPTModel) -> dict[str, Any]:
    """What a forward pass is told of packed documents: where they begin and, with experts, what is padding (True)."""
    told: dict[str, Any] = {"packed_seq_params": documents(batch[BOUNDS], batch["tokens"].device)}
    if model.config.num_moe_experts:
        padding_bs = batch["padding"]
        # The first stage takes its part of the sequence by itself (models/gpt/gpt_model.py:314), later ones do not.
        if model.config.sequence_parallel and not model.pre_process:
            tp = model.pg_collection.tp
            padding_bs = padding_bs.chunk(tp.size(), dim=1)[tp.rank()].contiguous()
        told["padding_mask"] = padding_bs
    return told


def losses_in_chunks(
    model: GPTModel, hidden_sbh: torch.Tensor, labels_bs: torch.Tensor, chunk_tok: int,
    weight_bs: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Losses [b, s] of the last stage, in another order, from the logits of `chunk_tok` tokens at a time; each times its
    weight.

    Nothing of the logits is kept for the backward, which computes them again. `hidden_sbh` is this rank's part of the
    sequence under sequence parallelism, so a chunk is made of a stretch of every tensor-parallel rank's part.
    """
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    dtype = (model.output_layer.weight if weight is None else weight).dtype

    def losses(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits, _ = model.output_layer(hidden.to(dtype), weight=weight)
        return model.compute_language_model_loss(labels, compat.scaled_logits(model, logits))

    parts = labels_bs.shape[1] // hidden_sbh.shape[0]  # tensor-parallel ranks under sequence parallelism, else 1
    here = max(1, chunk_tok // parts)

    def chunks(x_bs: torch.Tensor) -> list[torch.Tensor]:
        return [part.flatten(1) for part in x_bs.unflatten(1, (parts, -1)).split(here, dim=2)]

    found = [
        checkpoint(losses, hidden, label, use_reentrant=False, preserve_rng_state=False)
        for hidden, label in zip(hidden_sbh.split(here), chunks(labels_bs), strict=True)
    ]
    if weight_bs is not None:
        found = [loss * weight for loss, weight in zip(found, chunks(weight_bs), strict=True)]
    return torch.cat(found, dim=1)


def mean_loss(losses_bs: torch.Tensor, context_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss to differentiate, loss to report) of this rank's part of a micro-batch.

    Every part has as many tokens, so means of means are exact. Megatron-Core multiplies what is differentiated by the
    context-parallel ranks (pipeline_parallel/schedules.py:268) and averages gradients over them.
    """
    loss = losses_bs.float().mean()
    return loss / context_ranks, loss.detach().clone()


def weighted_loss(losses_bs: torch.Tensor, context_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `mean_loss`, of losses that were multiplied by `loss_weight`: micro-batches of all replicas over the labels of
    the step that count, so that the mean over micro-batches and replicas of these sums is the mean over labels, however
    unevenly they lie (means of means are not)."""
    loss = losses_bs.float().sum()
    return loss, loss.detach() * context_ranks


def compute_gradients(
    chunks: Sequence[DistributedDataParallel],
    groups: Groups,
    batches: Sequence[Iterator[dict[str, Any]]],
    micro_batches: int,
    context_tok: int,
    micro_batch: int,
    force_all_reduce: bool = False,
    loss_chunk_tok: int | None = None,
) -> list[torch.Tensor]:
    """Fill every parameter's main_grad, reduced over all ranks that share it; micro-batch losses on the last stage.

    Each rank gets what its part of the distributed optimizer needs; `force_all_reduce` gives all of it to all.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    virtual = groups.layout.virtual_pipeline
    return get_forward_backward_func(groups.layout.pipeline, virtual)(
        forward_step_func=partial(forward_step, loss_chunk_tok=loss_chunk_tok),
        data_iterator=list(batches) if virtual else batches[0],
        model=list(chunks) if virtual else chunks[0],
        num_microbatches=micro_batches,
        seq_length=context_tok,
        micro_batch_size=micro_batch,
        forward_only=False,
        force_all_reduce=force_all_reduce,
    )


def train_step(
    chunks: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: Groups,
    batches: Sequence[Iterator[dict[str, Any]]],
    micro_batches: int,
    context_tok: int,
    micro_batch: int,
    asked: Callable[[], bool] = lambda: False,
    meter: HealthMeter | None = None,
    loss_chunk_tok: int | None = None,
) -> StepResult:
    """One step. `batches` has one iterator per model chunk of this rank, each over this replica's micro-batches.

    `asked` says, once the gradients are there, whether this rank was asked to stop.
    """
    # Expert biases move where gradients are finished, before anyone knows whether these are finite.
    biases = [b for chunk in chunks for name, b in chunk.named_buffers() if name.endswith("router.expert_bias")]
    before = [bias.clone() for bias in biases]
    with meter.watching() if meter else contextlib.nullcontext():
        losses = compute_gradients(
            chunks, groups, batches, micro_batches, context_tok, micro_batch, loss_chunk_tok=loss_chunk_tok
        )
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    seen = meter.partial() if meter else None
    loss, finite, stop, seen_by_all = _agree(losses, grad_norm, asked(), seen, groups)
    if finite:
        update(optimizer, grad_norm)
    else:
        for bias, old in zip(biases, before):
            bias.copy_(old)
    optimizer.zero_grad()
    health = meter.whole(seen_by_all) if meter else None
    return StepResult(loss, grad_norm, skipped=not finite, stop=stop, health=health)


def _agree(
    losses: list[torch.Tensor], grad_norm: float, stop: bool, seen: torch.Tensor | None, groups: Groups
) -> tuple[float, bool, bool, np.ndarray]:
    """(mean loss over all replicas, everything was finite, some rank wants to stop, sum of `seen`), the same on all
    ranks, by one reduction."""
    sums = torch.zeros(4, dtype=torch.float64, device=groups.device)
    if losses:  # on tensor-parallel ranks alike
        sums[0], sums[1] = torch.stack(losses).double().sum(), len(losses)
    sums[2], sums[3] = float(not math.isfinite(grad_norm)), float(stop)
    if seen is not None:
        sums = torch.cat([sums, seen])
    dist.all_reduce(sums)
    total, count, not_finite, stops, *_ = whole = sums.cpu().numpy()
    loss = float(total / count)
    return loss, math.isfinite(loss) and not_finite == 0, bool(stops > 0), whole[4:]


def update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip the prepared gradients, whose whole norm is given, and move the weights."""
    for part in optimizer.chained_optimizers:
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()
