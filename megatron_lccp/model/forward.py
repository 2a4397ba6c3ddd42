"""Run a model for measuring: sequences in, the loss of chosen tokens out, on any layout.

In: token sequences and the positions whose tokens are to be predicted. Out, on every rank: for each such token its
negative log-likelihood in nat and whether it is the most likely one. Only the rows that predict them go through the
output layer, so no S x V tensor exists.

Shapes: s sequence, r rows (one per predicted token), v vocabulary rows on this rank. Data-parallel replicas share the
sequences among them.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_lccp.model.build import bare
from megatron_lccp.parallel.gather import sum_over_ranks
from megatron_lccp.parallel.groups import Groups

ROWS_AT_ONCE = 1024
"""Rows that go through the output layer together: bounds the logits to this many times the vocabulary shard."""


@dataclass(frozen=True)
class Request:
    """One sequence to run."""

    tokens: np.ndarray
    """Token ids [s], int64."""
    predict: tuple[int, int]
    """Positions [start, end) of the tokens to predict, start >= 1; the row before each predicts it."""


@dataclass(frozen=True)
class Prediction:
    """What the model said of the tokens of one request."""

    nll_r: np.ndarray
    """Negative log-likelihood of each token, nat."""
    hit_r: np.ndarray
    """True where the token is the most likely one (the lowest id on a tie)."""


def predict(
    chunks: Sequence[torch.nn.Module],
    groups: Groups,
    requests: Sequence[Request],
    vocab_size: int,
    before: Callable[[int | None], None] | None = None,
    done: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Predictions for all requests, on all ranks. Call it inside an EvalWindow (eval mode, no gradients).

    `before(k)` is called on this rank before request k runs here (None: a filler that keeps expert-parallel ranks in
    step), so that a tap knows what it sees; `done(count)` after each length.
    """
    longest = max((request.predict[1] - request.predict[0] for request in requests), default=0)
    found = torch.zeros(2, len(requests), longest, device=groups.device, dtype=torch.float32)
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        by_length[len(request.tokens)].append(number)
    finished = 0
    for length, numbers in sorted(by_length.items()):
        mine: list[int | None] = list(numbers[groups.dp.rank() :: groups.dp.size()])
        # as many on every replica, and with an interleaved pipeline a multiple of its stages
        multiple = groups.pp.size() if groups.layout.virtual_pipeline else 1
        share = -(-len(numbers) // (groups.dp.size() * multiple)) * multiple
        mine += [None] * (share - len(mine))
        _run(chunks, groups, requests, numbers[0], mine, length, vocab_size, before, found)
        finished += len(numbers)
        if done is not None:
            done(finished)
    nll, hit = sum_over_ranks(found).cpu().numpy()
    sizes = [request.predict[1] - request.predict[0] for request in requests]
    return [Prediction(nll[k, :size], hit[k, :size] > 0.5) for k, size in enumerate(sizes)]


def _run(chunks, groups: Groups, requests, filler: int, mine, length: int, vocab_size: int, before, found) -> None:
    """Run this replica's requests of one length through the pipeline; the owner writes what it found into `found`."""
    multiple = chunks[0].config.tensor_model_parallel_size if bare(chunks[0]).config.sequence_parallel else 1
    padded = -(-length // multiple) * multiple  # tokens after the end are not attended to, so any will do
    position_s = torch.arange(padded, device=groups.device)[None]

    def step(numbers: Iterator[int | None], model: torch.nn.Module):
        number = next(numbers)
        if before is not None:
            before(number)
        request = requests[filler if number is None else number]
        tokens_bs = torch.zeros(1, padded, dtype=torch.int64, device=groups.device)
        tokens_bs[0, :length] = torch.as_tensor(request.tokens, device=groups.device)
        hidden_sbh = model(tokens_bs, position_s, None)
        return hidden_sbh, partial(read, number, request)

    def read(number: int | None, request: Request, hidden_sbh: torch.Tensor, non_loss_data: bool = True):
        start, end = request.predict
        target_r = torch.as_tensor(request.tokens[start:end], device=groups.device)
        nll_r, hit_r = row_losses(bare(chunks[-1]), groups, hidden_sbh, start - 1, target_r, vocab_size)
        if number is not None and groups.tp.rank() == 0:
            found[0, number, : end - start] = nll_r
            found[1, number, : end - start] = hit_r.float()

    virtual = groups.layout.virtual_pipeline
    models = [bare(chunk) for chunk in chunks]
    with _hidden_states_out(models):
        get_forward_backward_func(groups.layout.pipeline, virtual)(
            forward_step_func=step,
            data_iterator=[iter(mine) for _ in models] if virtual else iter(mine),
            model=models,
            num_microbatches=len(mine),
            seq_length=padded,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )


@contextlib.contextmanager
def _hidden_states_out(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """While open, the last stage returns hidden states after the final norm instead of S x V logits."""
    last = [model for model in models if model.post_process]
    try:
        for model in last:
            model.post_process = False
        yield
    finally:
        for model in last:
            model.post_process = True


def row_losses(
    model: torch.nn.Module,
    groups: Groups,
    hidden_sbh: torch.Tensor,
    first_row: int,
    target_r: torch.Tensor,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nll_r in nat, hit_r) of targets predicted by consecutive rows, over a vocabulary spread over the TP group.

    Padding rows of the vocabulary are left out: the softmax is over the `vocab_size` tokens that exist.
    """
    tied_here = model.share_embeddings_and_output_weights and model.pre_process
    weight_vh = model.embedding.word_embeddings.weight if tied_here else model.output_layer.weight
    first_id = groups.tp.rank() * weight_vh.shape[0]
    real = min(max(vocab_size - first_id, 0), weight_vh.shape[0])
    nll, hit = [], []
    for start in range(0, len(target_r), ROWS_AT_ONCE):
        targets = target_r[start : start + ROWS_AT_ONCE]
        rows_rh = _take_rows(model, groups, hidden_sbh, first_row + start, len(targets)).to(weight_vh.dtype)
        logit_rv = (rows_rh @ weight_vh[:real].T).float()
        a, b = _vocab_parallel(logit_rv, targets - first_id, first_id, groups)
        nll.append(a)
        hit.append(b)
    return torch.cat(nll), torch.cat(hit)


def _take_rows(model, groups: Groups, hidden_sbh: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Rows [count, h] of the whole sequence, of which sequence parallelism left this rank one stretch."""
    if not model.config.sequence_parallel:
        return hidden_sbh[first : first + count, 0]
    mine = hidden_sbh.shape[0]
    offset = groups.tp.rank() * mine
    rows_rh = hidden_sbh.new_zeros(count, hidden_sbh.shape[-1])
    low, high = max(first, offset), min(first + count, offset + mine)
    if low < high:
        rows_rh[low - first : high - first] = hidden_sbh[low - offset : high - offset, 0]
    dist.all_reduce(rows_rh, group=groups.tp)
    return rows_rh


def _vocab_parallel(logit_rv: torch.Tensor, local_target_r: torch.Tensor, first_id: int, groups: Groups):
    """Cross entropy and argmax over logits whose columns are spread over the TP group."""
    rows, real = logit_rv.shape
    top_r = logit_rv.amax(-1) if real else logit_rv.new_full((rows,), -torch.inf)
    dist.all_reduce(top_r, op=dist.ReduceOp.MAX, group=groups.tp)
    exp_sum_r = (logit_rv - top_r[:, None]).exp().sum(-1)
    mine_r = (local_target_r >= 0) & (local_target_r < real)
    target_r = torch.zeros_like(top_r)
    target_r[mine_r] = logit_rv[mine_r, local_target_r[mine_r]]
    sums = torch.stack([exp_sum_r, target_r])
    dist.all_reduce(sums, group=groups.tp)
    ids_v = torch.arange(first_id, first_id + real, device=logit_rv.device)
    beyond = torch.iinfo(torch.int64).max
    best_r = (
        torch.where(logit_rv == top_r[:, None], ids_v, beyond).amin(-1)
        if real
        else top_r.new_full((rows,), beyond, dtype=torch.int64)
    )
    dist.all_reduce(best_r, op=dist.ReduceOp.MIN, group=groups.tp)
    return top_r + sums[0].log() - sums[1], best_r == local_target_r + first_id
