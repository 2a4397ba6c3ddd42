"""Copying of drawn token ids from far back, by how far: what context extension has to give, without any language.

In: an open window. Out: rows per sample and lag. The pattern for a monitor with an axis of its own (`lag_tok`).

A sample is a text of ids drawn from the tokenizer's ordinary ones. At its end a segment of it comes again, that which
stands `lag_tok` tokens back: only the model's context can say how it goes on, since no corpus holds such a text. All lags
share the text, and the second copy stands at the same place for each: nothing but the distance differs. No id stands in
a text twice as long as the tokenizer has enough, so that one token of the copy says which segment it is.

    prefill   text [longest_tok - segment_tok] + second copy of lag 1 + second copy of lag 2 + ...
    sees      each copy the text and itself, at the positions behind the text
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_lccp.measuring import (
    FIRST_ORDINARY_ID,
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

_OF_LAG: dict[str, Any] = dict(axes=("lag_tok",))


@dataclass(frozen=True)
class CopyBack(Monitor):
    """How far back the model can copy from: a drawn segment comes again, `lag_tok` tokens after it stood first.

    The first token of a copy is left out: nothing says that a copy begins.
    """

    metrics = (
        Metric(
            **_OF_LAG, name="copied", unit="share", level="behavioural", better="higher", bounds=(0.0, 1.0),
            judged=True, margin=0.01,
            about="Tokens of the second copy that are the most likely ones after those before them: 1 for a model that "
            "copies from this far back, 0 for one that does not.",
        ),
        Metric(
            **_OF_LAG, name="second_nll", unit="nat", level="probabilistic", better="lower", bounds=(0.0, None),
            judged=True, margin=0.01,
            about="Mean NLL of the second copy's tokens: 0 is certain and right, first_nll is what no copying gives.",
        ),
        Metric(
            **_OF_LAG, name="first_nll", unit="nat", level="probabilistic", bounds=(0.0, None),
            about="The same of the first copy, which nothing foretells: the logarithm of how many ids a model takes for "
            "possible, and more where it bets on some.",
        ),
    )  # fmt: skip
    every: Every = Every(steps=100)
    """When it is due; besides, at the start of a stage and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on, or stop the run."""
    longest_tok: int = 1024
    """Tokens of a sample, text and second copy."""
    segment_tok: int = 32
    """Tokens of the segment that comes again."""
    lags_tok: tuple[int, ...] = ()
    """From the start of the first copy to that of the second. Empty: 64, 128, ... as far as they fit, and longest_tok less
    two segments."""
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
        low, high = self.segment_tok, self.longest_tok - self.segment_tok - 1
        if high < low:
            least = 2 * self.segment_tok + 1
            raise ValueError(
                f"longest_tok: should be at least {least}, two segments and a token, is {self.longest_tok}"
            )
        if wrong := [lag for lag in self.lags_tok if not low <= lag <= high]:
            raise ValueError(
                f"lags_tok: should be from {low}, a segment, to {high}, what longest_tok leaves room for, not {wrong[0]}"
            )

    def lags(self) -> list[int]:
        """Those that are measured, in order."""
        if self.lags_tok:
            return sorted(set(self.lags_tok))
        last = max(self.longest_tok - 2 * self.segment_tok, self.segment_tok)
        doubled = [64 * 2**k for k in range(self.longest_tok.bit_length())]
        return sorted({last, *(lag for lag in doubled if self.segment_tok <= lag < last)})

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows of all metrics per sample and lag."""
        lags, texts = self.lags(), self.texts(window)
        same = hashlib.sha256(repr((lags, self.segment_tok)).encode() + texts.tobytes()).hexdigest()[:12]
        share = self.share and can_share(window)
        found = run_trees(window, self.trees(texts, share), self.name, same)
        n = self.segment_tok - 1
        for sample, text in enumerate(texts):
            for k, lag in enumerate(lags):
                first, second = (found[number] for number in self.numbers(sample, k))
                start = len(text) - lag
                right = second.best_r == text[start + 1 : start + self.segment_tok]
                where = dict(lag_tok=lag, length_tok=self.longest_tok, sample=sample, sample_set=same)
                yield window.row(self, "copied", right.mean(), n, **where)
                yield window.row(self, "second_nll", second.nll_r.mean(), n, **where)
                yield window.row(self, "first_nll", first.nll_r.mean(), n, **where)

    def texts(self, window: EvalWindow) -> np.ndarray:
        """[samples, longest_tok - segment_tok]: drawn ids, int64; each comes as often as every other, or once more."""
        ids = np.arange(FIRST_ORDINARY_ID, _ordinary_end(window))
        count = self.longest_tok - self.segment_tok
        texts = []
        for sample in range(self.samples):
            rng = np.random.default_rng([self.seed, sample])
            texts.append(np.concatenate([rng.permutation(ids) for _ in range(-(-count // len(ids)))])[:count])
        return np.stack(texts).astype(np.int64)

    def numbers(self, sample: int, lag: int) -> tuple[int, int]:
        """Numbers of the first copy and of the second, of a text and the lag of this index."""
        at = 2 * (sample * len(self.lags()) + lag)
        return at, at + 1

    def trees(self, texts: np.ndarray, share: bool) -> list[Tree]:
        """A prefill for each text; or, without sharing, one for each lag in it."""
        count = len(self.lags())
        sets = [range(count)] if share else [[k] for k in range(count)]
        return [[self.prefill(text, sample, some)] for sample, text in enumerate(texts) for some in sets]

    def prefill(self, text: np.ndarray, sample: int, some: Iterable[int]) -> Prefill:
        """A text and, behind it, the second copies of some lags, none of which sees another."""
        lags, size, whole = self.lags(), self.segment_tok, len(text)
        tokens, segments, first_taps, second_taps = [text], [Segment(0, whole)], [], []
        for k in some:
            start, at = whole - lags[k], whole + size * (len(tokens) - 1)
            first, second = self.numbers(sample, k)
            tokens.append(text[start : start + size])
            segments.append(Segment(at, at + size, ((0, whole),)))
            first_taps.append(Tap((first,), start + 1, start + 1, start + size))
            second_taps.append(Tap((second,), at + 1, at + 1, at + size))
        if len(tokens) == 2:  # the copy goes on where the text ends: an ordinary sequence
            segments = [Segment(0, whole + size)]
        positions = np.concatenate([np.arange(whole), *[whole + np.arange(size)] * (len(tokens) - 1)])
        return Prefill(np.concatenate(tokens), positions, tuple(segments), (*first_taps, *second_taps))

    def work(self, window: EvalWindow) -> Work:
        """What `measure` runs, for a plan."""
        texts, lags = self.texts(window), self.lags()
        return Work(len(lags), len(lags) * len(texts), self.trees(texts, False), self.trees(texts, self.share))

    def check(self, window: EvalWindow) -> Iterable[str]:
        """Samples longer than the model's context, and a tokenizer with too few ids to draw from."""
        if self.longest_tok > window.context_tok:
            yield f"longest_tok: {self.longest_tok} is more than the model's context of {window.context_tok}; lower it"
        ids = _ordinary_end(window) - FIRST_ORDINARY_ID
        if ids < 2 * self.segment_tok:
            yield (
                f"segment_tok: two segments of {self.segment_tok} need as many ordinary ids; the tokenizer has "
                f"{max(ids, 0)}; lower it"
            )


def _ordinary_end(window: EvalWindow) -> int:
    """The ordinary ids of the tokenizer that the model has end before this."""
    return min(window.tokenizer.ordinary_size, window.vocab_size)
