"""The batches of a stage whose documents are packed, or whose attention ends at them.

In: a configuration whose data is prepared, and what earlier steps took. Out: `PackedData.batch`, the same samples for a
step on any layout and after any restart, each with the weight of its labels in the loss. Shapes: b sequences of a
micro-batch, s tokens of a sequence; a micro-batch is one row of b s tokens, [1, b s].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_lccp.config.tree import Config, PackConfig, StageConfig
from megatron_lccp.data.corpus import Corpus, Place, lengths_of, open_corpus
from megatron_lccp.data.manifest import Manifest, prefix
from megatron_lccp.data.pack import Keyed, PackState, Piece, Recipe, Sample, dealt, keyed, next_window, work
from megatron_lccp.data.stages import mixture_weights
from megatron_lccp.parallel.gather import agreed
from megatron_lccp.parallel.zigzag import BOUNDS


def is_packed(stage: StageConfig) -> bool:
    """Whether samples of a stage come from here."""
    return stage.pack is not None or stage.masks != "none"


def row_of(stage: StageConfig) -> tuple[int, int]:
    """(rows, tokens of a row) of a micro-batch."""
    rows, length = stage.micro_batch, stage.context_tok
    return (1, rows * length) if is_packed(stage) else (rows, length)


def _place(micro_batch_index: int, data_rank: int, data_ranks: int) -> int:
    """Which of a step's micro-batches a replica takes, of all of them in the order of their work.

    Neighbours, which have about the same work, run beside each other, and the turn goes to and fro: so every replica has
    about the same work in the whole step too.
    """
    turn = data_rank if micro_batch_index % 2 == 0 else data_ranks - 1 - data_rank
    return micro_batch_index * data_ranks + turn


@dataclass(frozen=True)
class AttentionWork:
    """What attention has to do where it ends at documents."""

    share: float
    """Of the work of whole sequences."""
    busiest: float
    """The busiest replica's in a step over the mean's, on average."""
    padding: float
    """Share of the tokens that are padding."""


def attention_work(config: Config, name: str, replicas: int, windows: int = 4) -> AttentionWork | None:
    """By the lengths of the prepared documents, of the first windows of a stage; None if a source is not prepared.

    No text is read: documents stand in an order that is drawn.
    """
    stage = config.stages[name]
    shares, corpora = mixture_weights(stage), {}
    for source in shares:
        path = prefix(config.data.dir, source, "train")
        if not Path(f"{path}.idx").is_file():
            return None
        corpora[source] = lengths_of(path)
    recipe = Recipe(shares, stage.context_tok, stage.pack or PackConfig(how="concat"), config.seed)
    per_step, b = stage.global_batch_tok // stage.context_tok, stage.micro_batch
    state, works, busiest, padding = PackState(), [], [], []
    for _ in range(windows):
        made, state = next_window(recipe, corpora, state, recipe.pack.window_steps * per_step)
        for samples in dealt(made, recipe.pack.window_steps, recipe):
            of_sample = np.array([work(sample, recipe) for sample in samples], float)
            of_replica = np.zeros(replicas)
            for number in range(per_step // (replicas * b)):
                for rank in range(replicas):
                    at = _place(number, rank, replicas) * b
                    of_replica[rank] += of_sample[at : at + b].sum()
            works.append(of_sample.mean() / stage.context_tok**2)
            busiest.append(of_replica.max() / of_replica.mean())
            padding.append(1 - sum(p.tokens for sample in samples for p in sample) / stage.global_batch_tok)
    return AttentionWork(float(np.mean(works)), float(np.mean(busiest)), float(np.mean(padding)))


class PackedData:
    """The training samples of one stage."""

    def __init__(
        self, config: Config, stage: StageConfig, shares: Mapping[str, float], manifest: Manifest, cache_dir: Path,
        taken: Mapping[str, Any] | None, at_step: int, steps: int,
    ):  # fmt: skip
        """`at_step` of `steps` comes next. `taken` is what `taken` said of it, or of the end of a stage before this one;
        None: nothing was taken yet.

        Raises ValueError if a source is empty, or has no document that `long: exact` takes, or if documents are gone
        that the running window still needs.
        """
        self._recipe = Recipe(shares, stage.context_tok, stage.pack or PackConfig(how="concat"), config.seed)
        self._stage, self._eod, self._steps = stage, manifest.tokenizer.eod, steps
        self._per_step = stage.global_batch_tok // stage.context_tok
        if taken is None or "behind" not in taken:  # nothing, or by stages that know nothing of it
            taken = None
        left = taken["left"] if taken else []
        names = dict.fromkeys([*shares, *(piece[0] for step in left for sample in step for piece in sample)])
        self._corpora = _corpora(config, names, manifest, cache_dir)
        for source in shares:
            _require_documents(self._corpora[source], self._recipe, prefix(config.data.dir, source, "train"), source)
        self._behind = PackState.from_json(taken["behind"]) if taken else PackState()
        self._news: list[str] = []
        self._first, self._dealt = at_step, [[self._pieces(sample) for sample in step] for step in left]
        if at_step == 0 and left:  # of a stage that was cut short
            unused = tuple(keyed(piece, self._corpora) for step in self._dealt for sample in step for piece in sample)
            self._behind = replace(self._behind, carried=(*self._behind.carried, *unused))
            self._dealt = []

    def news(self) -> list[str]:
        """What is to be told of the windows since the last call: which sources begin again."""
        said, self._news = self._news, []
        return said

    @property
    def places(self) -> Mapping[str, Place]:
        """Where each source stands behind the window at hand."""
        return self._behind.places

    def taken(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps so that `step` can come next, also with other files or another mixture: the pieces in
        the steps left of the window at hand, and what was taken behind it."""
        left = [
            [[keyed(piece, self._corpora) for piece in sample] for sample in samples]
            for samples in self._dealt[step - self._first :]
        ]
        return {"left": left, "behind": self._behind.to_json()}

    def _pieces(self, sample: Sequence[Keyed]) -> Sample:
        found = [
            Piece(source, self._corpora[source].document_of(key), start, end) for source, key, start, end in sample
        ]
        if gone := [piece.source for piece in found if piece.document < 0]:
            raise ValueError(
                f"data.sources.{gone[0]}: a document is gone that the running window of packing has taken; prepare the "
                "source with it, or go on from a checkpoint before"
            )
        return found

    def batch(self, step: int, micro_batch_index: int, data_rank: int, data_ranks: int) -> dict[str, Any]:
        """One micro-batch of a data-parallel rank: tokens, labels, padding [1, b s]; loss_weight, unless all labels
        count alike; bounds, if attention ends at documents. On the CPU.

        `step` counts from 0 within the stage. All micro-batches of all data ranks together are the samples of the step.
        """
        samples = self._samples_of(step)
        count, b = len(samples), self._stage.micro_batch
        first = _place(micro_batch_index, data_rank, data_ranks) * b
        assert 0 <= first <= count - b, (micro_batch_index, data_rank, data_ranks)
        made = [self._sample(sample) for sample in samples[first : first + b]]
        found: dict[str, Any] = {
            name: torch.from_numpy(np.concatenate([one[name] for one in made]))[None]
            for name in ("tokens", "labels", "padding")
        }
        counted = sum(self._labels(sample) for sample in samples)
        if counted < count * self._stage.context_tok:
            trained = torch.from_numpy(np.concatenate([one["trained"] for one in made]))[None]
            found["loss_weight"] = trained.float() * (count // b / max(counted, 1))
        if self._stage.masks == "documents":
            lengths = [length for one in made for length in one["lengths"]]
            found[BOUNDS] = tuple(accumulate(lengths, initial=0))
        return found

    def samples(self, step: int) -> Sequence[Sample]:
        """What stands in the samples of a step."""
        return self._samples_of(step)

    def _samples_of(self, step: int) -> Sequence[Sample]:
        assert 0 <= step < self._steps and self._first <= step <= self._first + len(self._dealt), (step, self._first)
        if step == self._first + len(self._dealt):
            steps = min(self._recipe.pack.window_steps, self._steps - step)
            before = self._behind.places
            made, self._behind = next_window(self._recipe, self._corpora, self._behind, steps * self._per_step)
            self._news += [
                f"{source}: its documents come again, for the {place.epoch + 1}. time, from the steps {step + 1} to "
                f"{step + steps} of the stage on"
                for source, place in self._behind.places.items()
                if place.epoch > (before[source].epoch if source in before else 0)
            ]
            self._first, self._dealt = step, dealt(made, steps, self._recipe)
        return self._dealt[step - self._first]

    def _labels(self, sample: Sample) -> int:
        """Labels that count: of a document's last token there is none."""
        return sum(p.tokens - (p.end == self._corpora[p.source].length_d[p.document]) for p in sample)

    def _sample(self, sample: Sample) -> dict[str, Any]:
        s = self._stage.context_tok
        tokens, labels = np.full(s, self._eod, np.int64), np.full(s, self._eod, np.int64)
        trained, padding, lengths, at = np.zeros(s, bool), np.ones(s, bool), [], 0
        for piece in sample:
            corpus, count = self._corpora[piece.source], piece.tokens
            text = corpus.tokens(piece.document, piece.start, piece.end + 1)  # and the next, if the document has one
            tokens[at : at + count] = text[:count]
            follows = min(len(text), corpus.length_d[piece.document] - piece.start) - 1
            labels[at : at + follows] = text[1 : follows + 1]
            trained[at : at + follows] = True
            padding[at : at + count] = False
            room = self._recipe.room(count)
            lengths.append(room)
            at += room
        if at < s:
            lengths.append(s - at)  # nothing but padding
        return {"tokens": tokens, "labels": labels, "trained": trained, "padding": padding, "lengths": lengths}


def _require_documents(corpus: Corpus, recipe: Recipe, path: str, source: str) -> None:
    least = recipe.context_tok if recipe.pack.long == "exact" and recipe.pack.how == "best_fit" else 1
    if not len(corpus.length_d) or corpus.length_d.max() < least:
        remedy = f"give source {source!r} one" + ", or set pack.long: fragment" * (least > 1)
        raise ValueError(f"{path}.bin: has no document of {least} tokens to train on; {remedy}")


def _corpora(config: Config, names: Iterable[str], manifest: Manifest, cache_dir: Path) -> dict[str, Corpus]:
    """Sources by name. The first rank reads their documents for the hashes, if nobody has before."""

    def opened() -> dict[str, Corpus]:
        found = {}
        for name in names:
            path = prefix(config.data.dir, name, "train")
            digest = manifest.entry(name, config.data.dir).files[f"{Path(path).name}.bin"]["sha256"]
            found[name] = open_corpus(path, cache_dir / f"{name}-{digest[:12]}.keys")
        return found

    if not dist.is_initialized():
        return opened()
    with agreed():
        found = opened() if dist.get_rank() == 0 else {}
    return found or opened()
