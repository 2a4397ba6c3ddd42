"""What answers the monitors' prefills: the seam between what is asked and how a model is run.

In: prefills (measuring/prefills.py). Out: losses, most likely tokens and looks, the same on all ranks. Two engines are
here: Megatron-Core's chunks on any layout (measuring/megatron_engine.py), and any causal model of transformers
(measuring/hf_engine.py). A monitor asks its window, and never an engine.

Shapes: r answer tokens, L layers and N query heads of the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from megatron_lccp.measuring.attention_rows import AttentionRows
from megatron_lccp.measuring.found import Found, Look
from megatron_lccp.measuring.head_scores import HeadScore
from megatron_lccp.measuring.pieces import Pieces, tokens_in
from megatron_lccp.measuring.prefills import Prefill, Tap
from megatron_lccp.measuring.taps import RowScores
from megatron_lccp.parallel.gather import sum_over_ranks
from megatron_lccp.parallel.groups import Groups

PREFILLS_AT_ONCE = 8
"""Prefills that a pipeline stage of a replica runs between two reports of progress; enough to keep a pipeline full."""


class Sizes(NamedTuple):
    """What monitors ask of a model's shape."""

    layers: int
    heads: int
    """Query heads of a layer, over all ranks; of the layer with most."""
    context_tok: int
    """Tokens of the longest sequence that the model was built for."""
    vocab_size: int
    """Tokens that it can predict, without padding."""


@dataclass(frozen=True)
class Asked:
    """What a forward is to say beside losses and most likely tokens."""

    look: bool = False
    """Where heads look from the rows of the answers."""
    questions: bool = False
    """And from those of the questions, and of null questions."""
    scores: Sequence[HeadScore] = ()
    """Scores of heads that see query, key and value, at the rows of the answers."""

    @property
    def looks(self) -> bool:
        """Whether attention is looked at."""
        return self.look or bool(self.scores)


class Engine(Protocol):
    """A model that answers prefills. Every rank holds one and calls the same functions in the same order."""

    @property
    def groups(self) -> Groups:
        """Process groups: prefills are dealt over `dp`, and one that works for itself has the others of size 1."""

    @property
    def sizes(self) -> Sizes:
        """The model's shape."""

    def opened(self) -> AbstractContextManager[None]:
        """Evaluation mode and no gradients; on leaving, modes, hooks and random states are as before."""

    def why_not_shared(self) -> str | None:
        """Why this rank's part must run each sample on its own; None if cells can share prefills."""

    def without_heads(self, heads: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        """While open, the output of these heads (layer, head) is zero in every forward.

        Raises ValueError for a model whose heads it cannot reach.
        """

    def predict(
        self, replicas: Sequence[Sequence[Prefill]], asked: Asked, done: Callable[[int], None], pieces: Pieces | None
    ) -> dict[int, Found]:
        """What the model says of every sample that the prefills of all replicas ask about, by number, on all ranks.

        `replicas` holds the prefills of each data-parallel rank, the same on all ranks. `done(tokens)` is called as
        prefills are done. Between `pieces` it may be given up (WindowStopped). Raises ValueError for what the model
        cannot be asked.
        """


class Slots:
    """Results of some prefills of every replica; a slot for each tap, filled by whichever ranks see part of it."""

    def __init__(
        self, taps: Sequence[Tap], sizes: tuple[int, int], asked: Asked, device: torch.device, tp_rank: int = 0
    ):
        """`sizes`: layers and heads of the whole model. `tp_rank`: numbers the heads of a rank that holds some."""
        self.taps, self.asked, self._tp_rank = taps, asked, tp_rank
        self._slot = {id(tap): k for k, tap in enumerate(taps)}
        longest, shape = max((tap.end - tap.answer for tap in taps), default=0), (len(taps), *sizes)
        self._nll = torch.zeros(len(taps), longest, device=device)
        self._best = torch.zeros(len(taps), longest, device=device, dtype=torch.int64)
        if asked.looks:
            self._position = torch.zeros(*shape, longest, device=device, dtype=torch.int32)
            self._mass = torch.zeros(2, *shape, device=device)
            self._measured = torch.zeros(len(asked.scores), *shape, longest, device=device)

    def put_answer(self, tap: Tap, nll_r: torch.Tensor, best_r: torch.Tensor) -> None:
        """The losses and most likely tokens of an answer; one rank alone says them."""
        slot = self._slot[id(tap)]
        self._nll[slot, : len(nll_r)] = nll_r
        self._best[slot, : len(best_r)] = best_r

    def put_rows(self, layer: int, tap: Tap, scores: RowScores, rows: AttentionRows | None, mine: bool = True) -> None:
        """Where this rank's heads of a layer look; `mine`: this rank says so, of those that hold these heads."""
        asked, device = self.asked, self._mass.device
        mine_nr = [_asked(score, rows) for score in asked.scores] if rows is not None else []
        if not mine:
            return
        slot, heads = self._slot[id(tap)], scores.best_rn.shape[1]
        count = tap.answer - tap.question if asked.questions else 1  # the last of the question predicts the answer
        held = slice(self._tp_rank * heads, (self._tp_rank + 1) * heads)
        self._mass[1, slot, layer, held] = scores.mass_rn[:count].mean(0).to(device)
        for which, value_nr in enumerate(mine_nr):
            self._measured[which, slot, layer, held, : value_nr.shape[1]] = value_nr.to(device)
        if not tap.is_null:
            answer_nr = scores.position_rn[count - 1 :].T
            self._position[slot, layer, held, : answer_nr.shape[1]] = answer_nr.to(device, torch.int32)
            self._mass[0, slot, layer, held] = scores.mass_rn[count - 1 :].mean(0).to(device)

    def collect(
        self, found: dict[int, Found], nulls: dict[int, np.ndarray], absent_LN: np.ndarray | None = None
    ) -> None:
        """Bring the slots together over all ranks and file them by sample; of `absent_LN` heads nothing is known."""
        nll, best = (sum_over_ranks(x).cpu().numpy() for x in (self._nll, self._best))
        if self.asked.looks:
            slots = (self._position, self._mass, self._measured)
            position, mass, measured = (sum_over_ranks(x).cpu().numpy() for x in slots)
            if absent_LN is not None:
                position[:, absent_LN], mass[:, :, absent_LN], measured[:, :, absent_LN] = -1, np.nan, np.nan
        for slot, tap in enumerate(self.taps):
            count = tap.end - tap.answer
            for number in tap.samples:
                if tap.is_null:
                    if self.asked.looks:
                        nulls[number] = mass[1, slot]
                    continue
                found[number] = Found(nll[slot, :count], best[slot, :count])
                if self.asked.looks:
                    questions = mass[1, slot] if self.asked.questions else None
                    found[number].look = Look(position[slot, :, :, :count], mass[0, slot], questions)
                    found[number].measured_LNr = {
                        score.metric.name: of_score[slot, :, :, :count]
                        for score, of_score in zip(self.asked.scores, measured)
                    }


def in_rounds(
    replicas: Sequence[Sequence[Prefill]],
    stages: int,
    run: Callable[[list[list[Prefill]]], None],
    done: Callable[[int], None] | None,
    pieces: Pieces | None,
) -> None:
    """Call `run` with some prefills of every replica at a time, a multiple of the pipeline `stages`, until all are run.

    `done(tokens)` is called after each; between `pieces` a signal may end it (WindowStopped).
    """
    at_once = most = PREFILLS_AT_ONCE * stages
    tokens = start = 0
    while start < max(len(prefills) for prefills in replicas):
        if pieces is not None:
            at_once = pieces.next(replicas, start, stages, most)
        began = time.perf_counter()
        now = [list(prefills[start : start + at_once]) for prefills in replicas]
        run(now)
        tokens += sum(len(prefill) for prefills in now for prefill in prefills)
        if done is not None:
            done(tokens)
        if pieces is not None:
            pieces.rest(tokens_in(replicas, start, at_once), time.perf_counter() - began)
        start += at_once


def _asked(score: HeadScore, rows: AttentionRows) -> torch.Tensor:
    """[n, r]: what a score says of some rows. ValueError if it is not a number for each row and head."""
    value_rn, shape = score.of_rows(rows), rows.query_rnh.shape[:2]
    if not torch.is_tensor(value_rn) or value_rn.shape != shape:
        is_ = f"has shape {list(value_rn.shape)}" if torch.is_tensor(value_rn) else f"is {type(value_rn).__name__}"
        raise ValueError(f"{type(score).__name__}.of_rows: should be a tensor {list(shape)} (rows, heads), {is_}")
    return value_rn.T.float()
