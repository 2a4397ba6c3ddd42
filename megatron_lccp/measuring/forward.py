"""Run a model for measuring: prefills in, the loss of chosen tokens out, on any layout.

In: the prefills of each data-parallel replica. Out, on every rank: for each sample the negative log-likelihood of its
answer in nat, the most likely token in its place and, on request, where every head looks. Only the rows that predict
the answer go through the output layer, so no S x V tensor exists.

Shapes: s tokens on this rank, r rows (one per predicted token), v vocabulary rows on this rank, L layers and N query
heads of the whole model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_lccp.config.fields import FP8_TOKENS
from megatron_lccp.measuring.attention_rows import AttentionRows
from megatron_lccp.measuring.engine import Asked, Slots, in_rounds
from megatron_lccp.measuring.found import Found
from megatron_lccp.measuring.head_scores import HeadScore
from megatron_lccp.measuring.pieces import Pieces
from megatron_lccp.measuring.prefill_attention import PrefillAttention, why_no_rows
from megatron_lccp.measuring.prefills import Prefill, Tap
from megatron_lccp.measuring.taps import RowScores
from megatron_lccp.model.build import bare
from megatron_lccp.model.vocabulary import real_columns
from megatron_lccp.parallel import compat
from megatron_lccp.parallel.gather import first_text
from megatron_lccp.parallel.groups import Groups

ROWS_AT_ONCE = 1024
"""Rows that go through the output layer together: bounds the logits to this many times the vocabulary shard."""


def predict(
    chunks: Sequence[torch.nn.Module],
    groups: Groups,
    replicas: Sequence[Sequence[Prefill]],
    vocab_size: int,
    look: bool = False,
    questions: bool = False,
    done: Callable[[int], None] | None = None,
    scores: Sequence[HeadScore] = (),
    pieces: Pieces | None = None,
) -> dict[int, Found]:
    """What the model says of every sample that the prefills of all replicas ask about, by number, on all ranks.

    `replicas` holds the prefills of each data-parallel rank, the same on all ranks. `look` scores the attention rows of
    the answers too, `questions` also those of the questions; `scores` are asked at the rows of the answers, if they see
    query, key and value. `done(tokens)` is called as prefills are done. Between `pieces` it may be given up
    (WindowStopped). Call it inside an EvalWindow (eval mode, no gradients). Raises ValueError for a model that cannot
    be measured so.
    """
    models = [bare(chunk) for chunk in chunks]
    asked = [score for score in scores if score.sees_rows]
    look = look or bool(asked)
    if look and (reason := first_text(why_no_rows(models))):  # stages may differ
        raise ValueError(f"heads cannot be scored: {reason}")
    longest, limit = max((len(prefill) for of in replicas for prefill in of), default=0), learned_positions(models[0])
    if limit is not None and longest > limit:
        raise ValueError(f"a sample has {longest} tokens, the model has learned positions for {limit}")
    found: dict[int, Found] = {}
    nulls: dict[int, np.ndarray] = {}
    run = _Run(models, groups, vocab_size, Asked(look, questions, asked))

    def one_round(now: list[list[Prefill]]) -> None:
        run.round(now)
        run.slots.collect(found, nulls)

    with hidden_states_out(models), run.attention:
        in_rounds(replicas, groups.pp.size(), one_round, done, pieces)
    for number, mass_LN in nulls.items():
        found[number].null_mass_LN = mass_LN
    return found


def learned_positions(model: GPTModel) -> int | None:
    """How many positions a model has an embedding for; None if its positions are not learned."""
    return model.max_sequence_length if model.position_embedding_type == "learned_absolute" else None


class _Run:
    """One round after another."""

    def __init__(self, models: Sequence[GPTModel], groups: Groups, vocab_size: int, asked: Asked):
        self.models, self.groups, self.vocab_size, self.asked = models, groups, vocab_size, asked
        self.attention = PrefillAttention(models, groups, self._on_rows if asked.looks else None, asked.questions)

    def round(self, replicas: Sequence[Sequence[Prefill]]) -> None:
        """Run some prefills of each replica; what they say is in `slots`."""
        groups, config = self.groups, self.models[0].config
        taps = [tap for prefills in replicas for prefill in prefills for tap in prefill.taps]
        shape = (config.num_layers, config.num_attention_heads)
        self.slots = Slots(taps, shape, self.asked, groups.device, groups.tp.rank())
        # as many on every replica, for their experts work together
        count = max(len(prefills) for prefills in replicas)
        if len(self.models) > 1:  # an interleaved pipeline takes a multiple of its stages
            group = max(groups.pp.size(), config.microbatch_group_size_per_vp_stage or 1)
            count = -(-count // group) * group
        mine = [*replicas[groups.dp.rank()], *[None] * (count - len(replicas[groups.dp.rank()]))]
        work = [(prefill, self._length(replicas, k)) for k, prefill in enumerate(mine)]
        lengths = [length for _, length in work]
        virtual = len(self.models) > 1
        pipeline = groups.pp.size() > 1
        with _for_measuring(config, len(set(lengths)) > 1 and pipeline):
            get_forward_backward_func(groups.pp.size(), len(self.models) if virtual else None)(
                forward_step_func=self._step,
                data_iterator=[iter(work) for _ in self.models] if virtual else iter(work),
                model=list(self.models),
                num_microbatches=count,
                seq_length=lengths[0],
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
                p2p_communicator=P2PCommunicator(groups.pp, config) if pipeline else None,
                pg_collection=ProcessGroupCollection(
                    tp=groups.tp, cp=groups.cp, pp=groups.pp, dp_cp=groups.dp, embd=None, pos_embd=None
                ),
            )

    def _length(self, replicas: Sequence[Sequence[Prefill]], k: int) -> int:
        """Tokens of the k-th prefill of this replica with its padding, which nothing that is measured attends to."""
        groups, config = self.groups, self.models[0].config
        alike = replicas  # where ranks exchange tokens without asking how many there are
        if not config.num_moe_experts or not (
            config.moe_token_dispatcher_type == "allgather" or config.moe_pad_expert_input_to_capacity
        ):
            alike = [replicas[groups.dp.rank()]]
        length = max((len(prefills[k]) for prefills in alike if k < len(prefills)), default=1)
        multiple = groups.tp.size() * (2 * groups.cp.size() if groups.cp.size() > 1 else 1)
        if config.fp8:
            multiple *= FP8_TOKENS
        return -(-length // multiple) * multiple

    def _step(self, work: Iterator[tuple[Prefill | None, int]], model: torch.nn.Module):
        prefill, length = next(work)
        device = self.groups.device
        row_s = self.attention.starts(prefill, length, device)
        tokens_S = torch.zeros(length, dtype=torch.int64, device=device)
        if prefill is not None:
            tokens_S[: len(prefill)] = torch.as_tensor(prefill.tokens, device=device)
        limit = learned_positions(self.models[0])
        position_s = row_s if limit is None else row_s.clamp(max=limit - 1)  # padding comes after the sample
        hidden_sbh = model(tokens_S[row_s][None], position_s[None], None)
        return hidden_sbh, partial(self._read, prefill, row_s)

    def _read(self, prefill: Prefill | None, row_s: torch.Tensor, hidden_sbh: torch.Tensor, non_loss_data: bool = True):
        """The last stage: losses of the answers, from the rows that predict them."""
        if prefill is None or not (taps := [tap for tap in prefill.taps if not tap.is_null]):
            return
        groups = self.groups
        held_s = row_s
        if self.models[-1].config.sequence_parallel:
            held_s = row_s.chunk(groups.tp.size())[groups.tp.rank()]
        target_r = np.concatenate([np.arange(tap.answer, tap.end) for tap in taps]) - prefill.start
        row_r = torch.as_tensor(target_r - 1, device=groups.device)
        targets = torch.as_tensor(prefill.tokens[target_r], device=groups.device)
        found = row_losses(self.models[-1], groups, hidden_sbh, held_s, row_r, targets, self.vocab_size)
        if groups.tp.rank() == 0 and groups.cp.rank() == 0:
            sizes = [tap.end - tap.answer for tap in taps]
            for tap, nll_r, best_r in zip(taps, *(x.split(sizes) for x in found)):
                self.slots.put_answer(tap, nll_r, best_r)

    def _on_rows(self, layer: int, tap: Tap, scores: RowScores, rows: AttentionRows | None) -> None:
        self.slots.put_rows(layer, tap, scores, rows, mine=self.groups.cp.rank() == 0)


@contextlib.contextmanager
def _for_measuring(config, any_length: bool) -> Iterator[None]:
    """While open, no timers run and, if needed, pipeline stages tell each other how long each sequence is.

    The interleaved schedule sets two more fields to None and restores them only if nothing raises
    (pipeline_parallel/schedules.py:958).
    """
    same = {name: getattr(config, name) for name in ("grad_sync_func", "param_sync_func")}
    with _set(config, variable_seq_lengths=config.variable_seq_lengths or any_length, timers=None, **same):
        yield


@contextlib.contextmanager
def _set(thing: object, **values: Any) -> Iterator[None]:
    """While open, these attributes have these values."""
    before = {name: getattr(thing, name) for name in values}
    try:
        for name, value in values.items():
            setattr(thing, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


@contextlib.contextmanager
def hidden_states_out(models: Sequence[GPTModel]) -> Iterator[None]:
    """While open, the last stage returns hidden states after the final norm instead of S x V logits, and layers that
    predict further tokens (`mtp_num_layers`), which come after it, do not run."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(_set(model, post_process=False, mtp_process=False))
        yield


def row_losses(
    model: GPTModel,
    groups: Groups,
    hidden_sbh: torch.Tensor,
    held_s: torch.Tensor,
    row_r: torch.Tensor,
    target_r: torch.Tensor,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nll_r in nat, most likely id_r) for targets predicted by some rows, over a vocabulary spread over the TP group.

    `held_s` says which rows of the sequence this rank's hidden states are; the same targets on all TP and CP ranks.

    Padding rows of the vocabulary are left out: the softmax is over the `vocab_size` tokens that exist.
    """
    nll, best = [], []
    for rows, targets in zip(row_r.split(ROWS_AT_ONCE), target_r.split(ROWS_AT_ONCE)):
        logit_rv = _logits(model, _take_rows(model, groups, hidden_sbh, held_s, rows))
        first_id = groups.tp.rank() * logit_rv.shape[1]
        logit_rv = logit_rv[:, : real_columns(vocab_size, groups.tp.rank(), logit_rv.shape[1])].float()
        a, b = _vocab_parallel(logit_rv, targets - first_id, first_id, groups)
        nll.append(a)
        best.append(b)
    return torch.cat(nll), torch.cat(best)


def _logits(model: GPTModel, rows_rh: torch.Tensor) -> torch.Tensor:
    """[r, v]: what the model's own output layer, which may scale, cap or adapt, says of rows that all TP ranks have."""
    layer, weight_vh = model.output_layer, None
    # A last stage that is not the first has an embedding too if it predicts further tokens (models/gpt/gpt_model.py).
    if model.share_embeddings_and_output_weights and hasattr(model, "embedding"):
        weight_vh = model.embedding.word_embeddings.weight
    # It is not to gather its input, nor to keep it for a backward pass (tensor_parallel/layers.py:1004).
    with _set(layer, sequence_parallel=False), _set(layer.config, defer_embedding_wgrad_compute=False):
        logit_r1v, _ = layer(rows_rh[:, None], weight=weight_vh, runtime_gather_output=False)
    assert logit_r1v.shape[:2] == (len(rows_rh), 1), logit_r1v.shape
    return compat.scaled_logits(model, logit_r1v[:, 0])


def _take_rows(model, groups: Groups, hidden_sbh: torch.Tensor, held_s: torch.Tensor, row_r: torch.Tensor):
    """Rows [r, h] of the whole sequence, of which context and sequence parallelism left this rank the rows `held_s`."""
    spread = [g for g in (groups.cp, groups.tp if model.config.sequence_parallel else None) if g and g.size() > 1]
    if not spread:
        return hidden_sbh[row_r, 0]
    place = held_s.new_full((len(held_s) * math.prod(group.size() for group in spread),), -1)
    place[held_s] = torch.arange(len(held_s), device=held_s.device)
    place_r = place[row_r]
    rows_rh = torch.where((place_r >= 0)[:, None], hidden_sbh[place_r.clamp(min=0), 0], 0)
    for group in spread:
        dist.all_reduce(rows_rh, group=group)
    return rows_rh


def _vocab_parallel(logit_rv: torch.Tensor, local_target_r: torch.Tensor, first_id: int, groups: Groups):
    """(cross entropy in nat, id of the largest logit, the lowest on a tie); a TP rank has some of the columns."""
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
    return sums[0].log() + (top_r - sums[1]), best_r  # in this order nothing is lost where logits are large
