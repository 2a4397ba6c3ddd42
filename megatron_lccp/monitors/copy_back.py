"""Copying of drawn token ids from far back, by how far: what context extension has to give, without any language.

In: an open window. Out: rows per sample and lag. The pattern for a monitor with an axis of its own (`lag_tok`).

A sample is a segment of ids drawn from the tokenizer's ordinary ones, drawn filler, and the segment again, `lag_tok`
tokens after it began: only the context can say how the second copy goes on, since no corpus holds such a text. No id
stands in a sample twice as long as the tokenizer has enough, so that one token says where in the segment the copy is.
The samples of one text T share it, for they differ in where the second copy comes:

    prefix  T, the segment first; as long as the longest lag
    copy    the segment at the positions from `lag_tok` on, one for each lag; sees T[:lag_tok] and itself

With a begin token (data.tokenizer.bos) all of it stands one position further on, behind that token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_lccp.measuring import (
    FIRST_ORDINARY_ID,
    LONGEST_TOK,
    MOST_SAMPLES,
    EvalWindow,
    Every,
    Metric,
    Monitor,
    Prefill,
    Row,
    Segment,
    Tap,
    Tree,
    Work,
    can_share,
    run_trees,
)


@dataclass(frozen=True)
class CopyBack(Monitor):
    """How far back the model can copy from: a drawn segment comes again, `lag_tok` tokens after it stood first.

    The first token of a copy is left out: nothing says that a copy begins.
    """

    metrics = (
        Metric(
            name="copied", unit="share", axes=("lag_tok",), level="behavioural", better="higher", bounds=(0.0, 1.0),
            judged=True, margin=0.01,
            about="Tokens of the second copy that are the most likely ones after those before them: 1 for a model that "
            "copies from this far back, 0 for one that does not.",
        ),
        Metric(
            name="second_nll", unit="nat", axes=("lag_tok",), level="probabilistic", better="lower", bounds=(0.0, None),
            judged=True, margin=0.01,
            about="Mean NLL of the second copy's tokens: 0 is certain and right.",
        ),
        Metric(
            name="first_nll", unit="nat", level="probabilistic", bounds=(0.0, None),
            about="The same of the first copy, which nothing foretells: ln(ordinary ids) for a model that takes them all "
            "for equally possible, more for one that bets on text.",
        ),
    )  # fmt: skip
    every: Every = Every(steps=100)
    """When it is due; besides, at the start of a stage and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on, or stop the run."""
    longest_tok: int = 1024
    """Tokens of the longest sample, begin token and both copies included."""
    segment_tok: int = 32
    """Tokens of the segment that comes again."""
    lags_tok: tuple[int, ...] = ()
    """From the start of the first copy to that of the second; empty: 64, 128, ..., and what longest_tok leaves room
    for."""
    samples: int = 4
    """Drawn texts; every lag is measured in each."""
    seed: int = 3
    """Another seed draws other texts."""
    share: bool = True
    """One prefill for many cells where the model allows it; false: a forward for every sample."""

    def __post_init__(self) -> None:
        if self.segment_tok < 2 or self.samples < 1:
            raise ValueError(
                f"segment_tok and samples: should be at least 2 and 1, are {self.segment_tok} and {self.samples}"
            )
        if self.longest_tok > LONGEST_TOK or self.samples > MOST_SAMPLES:
            raise ValueError(
                f"longest_tok and samples: should be at most {LONGEST_TOK:,} and {MOST_SAMPLES:,}, are "
                f"{self.longest_tok:,} and {self.samples:,}"
            )
        low, high = self.segment_tok, self.longest_tok - self.segment_tok
        if high < low:
            raise ValueError(f"longest_tok: should be at least {2 * low}, two segments, is {self.longest_tok}")
        if wrong := [lag for lag in self.lags_tok if not low <= lag <= high]:
            raise ValueError(
                f"lags_tok: should be from {low}, a segment, to {high}, what longest_tok leaves room for, not {wrong[0]}"
            )

    def lags(self, begin_tok: int = 0) -> list[int]:
        """Those that are measured, in order, in samples that begin with so many tokens of their own."""
        if self.lags_tok:
            return sorted(set(self.lags_tok))
        longest = max(self.longest_tok - self.segment_tok - begin_tok, self.segment_tok)
        doubled = (64 * 2**k for k in range(longest.bit_length()))
        return [*(lag for lag in doubled if self.segment_tok <= lag < longest), longest]

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows of all metrics: of the first copy per sample, of the second per sample and lag."""
        begin = _begin(window)
        lags, texts = self.lags(len(begin)), self.texts(window)
        if (ids := _ordinary_end(window) - FIRST_ORDINARY_ID) < texts.shape[1]:
            window.caution(
                self,
                f"the tokenizer has {ids:,} ordinary ids for texts of {texts.shape[1]:,}: each comes more than once in a "
                "text, so one token does not say where the copy is; lower longest_tok",
            )
        same = hashlib.sha256(repr((lags, self.segment_tok, *begin)).encode() + texts.tobytes()).hexdigest()[:12]
        found = run_trees(window, self.trees(texts, self.share and can_share(window), begin), self.name, same)
        n = self.segment_tok - 1
        for sample, text in enumerate(texts):
            first = found[self.number(sample, len(self.lags()))]
            where = dict(sample=sample, sample_set=same)
            yield window.row(self, "first_nll", first.nll_r.mean(), n, **where)
            for k, lag in enumerate(lags):
                second = found[self.number(sample, k)]
                at = dict(lag_tok=lag, length_tok=len(begin) + lag + self.segment_tok, **where)
                right = second.best_r == text[1 : self.segment_tok]
                yield window.row(self, "copied", right.mean(), n, **at)
                yield window.row(self, "second_nll", second.nll_r.mean(), n, **at)

    def texts(self, window: EvalWindow) -> np.ndarray:
        """[samples, longest lag]: drawn ids, int64; each comes as often as every other, or once more."""
        ids = np.arange(FIRST_ORDINARY_ID, _ordinary_end(window))
        count = max(self.lags(len(_begin(window))))
        texts = []
        for sample in range(self.samples):
            rng = np.random.default_rng([self.seed, sample])
            texts.append(np.concatenate([rng.permutation(ids) for _ in range(-(-count // len(ids)))])[:count])
        return np.stack(texts).astype(np.int64)

    def number(self, sample: int, lag: int) -> int:
        """Of the second copy at the lag of this index; one past the last lag: of the first copy."""
        return sample * (len(self.lags()) + 1) + lag

    def trees(self, texts: np.ndarray, share: bool, begin: Sequence[int] = ()) -> list[Tree]:
        """A prefill for each text; or, without sharing, one for each lag in it. Each begins with the tokens `begin`."""
        lags = range(len(self.lags(len(begin))))
        return [
            [self.prefill(text, sample, some, begin)]
            for sample, text in enumerate(texts)
            for some in ([lags] if share else [[k] for k in lags])
        ]

    def prefill(self, text: np.ndarray, sample: int, some: Sequence[int], begin: Sequence[int] = ()) -> Prefill:
        """A text as far as the longest of some lags needs it, and the second copies, none of which sees another."""
        known, size, copy = self.lags(len(begin)), self.segment_tok, text[: self.segment_tok]
        first, lags = len(begin), [known[k] for k in some]
        end = first + max(lags)
        starts = [end + size * k for k in range(len(lags))]
        segments = [Segment(0, end), *(Segment(at, at + size, ((0, first + lag),)) for at, lag in zip(starts, lags))]
        if len(lags) == 1:  # the copy goes on where the text ends: an ordinary sequence
            segments = [Segment(0, end + size)]
        taps = [Tap((self.number(sample, k),), at + 1, at + 1, at + size) for k, at in zip(some, starts)]
        if max(lags) == max(known):
            number = self.number(sample, len(self.lags()))
            taps.insert(0, Tap((number,), first + 1, first + 1, first + size))
        tokens = np.concatenate([np.array(begin, np.int64), text[: max(lags)], *[copy] * len(lags)])
        positions = np.concatenate([np.arange(end), *(first + lag + np.arange(size) for lag in lags)])
        return Prefill(tokens, positions, tuple(segments), tuple(taps))

    def work(self, window: EvalWindow) -> Work:
        """What `measure` runs, for a plan."""
        texts, begin = self.texts(window), _begin(window)
        lags, alone = self.lags(len(begin)), self.trees(texts, False, begin)
        return Work(len(lags), len(lags) * len(texts), alone, self.trees(texts, self.share, begin))

    def check(self, window: EvalWindow) -> Iterable[str]:
        """Samples longer than the model's context, and a tokenizer with too few ids to draw from."""
        if self.longest_tok > window.context_tok:
            yield f"longest_tok: {self.longest_tok} is more than the model's context of {window.context_tok}; lower it"
        needed_tok = len(_begin(window)) + max(self.lags(len(_begin(window)))) + self.segment_tok
        if needed_tok > self.longest_tok:
            yield f"longest_tok: the begin token makes the longest sample {needed_tok} tokens; raise it by 1"
        ids = _ordinary_end(window) - FIRST_ORDINARY_ID
        if ids < 2 * self.segment_tok:
            yield (
                f"segment_tok: two segments of {self.segment_tok} need as many ordinary ids; the tokenizer has "
                f"{max(ids, 0)}; lower it"
            )


def _begin(window: EvalWindow) -> list[int]:
    """The token that every sample begins with, if there is one."""
    return [] if window.tokenizer.bos is None else [window.tokenizer.bos]


def _ordinary_end(window: EvalWindow) -> int:
    """The ordinary ids of the tokenizer that the model has end before this."""
    return min(window.tokenizer.ordinary_size, window.vocab_size)
