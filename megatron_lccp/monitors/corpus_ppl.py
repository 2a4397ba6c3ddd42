"""Perplexity on held-out documents: the smallest monitor, and the pattern for one of your own.

In: an open window. Out: rows per corpus, whole and by position in the text. Paper: section 7.1, Figure 6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from megatron_lccp.measuring import (
    LONGEST_TOK,
    MOST_SAMPLES,
    EvalWindow,
    Every,
    Metric,
    Monitor,
    Row,
    Work,
    agreed,
    plain,
    run_trees,
    sequences_of,
)

_OF_CORPUS: dict[str, Any] = dict(
    unit="nat", level="probabilistic", better="lower", bounds=(0.0, None), series=("corpus", "length_tok")
)


@dataclass(frozen=True)
class CorpusPPL(Monitor):
    """How well the model predicts held-out documents of each corpus (zh, en, code: whatever sources are called)."""

    metrics = (
        Metric(
            **_OF_CORPUS, name="nll", judged=True, margin=0.005,
            about="Mean NLL of all predicted tokens; 0 is certain and right, ln(vocabulary) is what knowing nothing gives.",
        ),
        Metric(**{**_OF_CORPUS, "unit": "ppl", "bounds": (1.0, None)}, name="ppl", about="exp(nll)."),
        Metric(
            **_OF_CORPUS, name="position_nll", axes=("to_tok",),
            about="The same over the tokens at positions from_tok to to_tok: a model that uses its context has less of "
            "it further on.",
        ),
        Metric(**_OF_CORPUS, name="sequence_nll", about="nll of one sequence, so that changes are paired."),
        Metric(
            **_OF_CORPUS, name="sequence_position_nll", axes=("to_tok",),
            about="position_nll of one sequence, so that changes are paired.",
        ),
    )  # fmt: skip
    every: Every = Every(steps=100)
    """When it is due; besides, at the start of a stage and at the end."""
    on_error: Literal["skip", "stop"] = "skip"
    """After an exception: record it and go on, or stop the run."""
    corpora: tuple[str, ...] = ()
    """Sources whose held-out documents are measured. Empty: all that the stages train on."""
    length_tok: int = 1024
    """Tokens of a sequence, its begin token included."""
    sequences: int = 8
    """Sequences per corpus."""
    edges_tok: tuple[int, ...] = tuple(1024 * 2**k for k in range(10))
    """Where stretches of positions end; the first begins at 0, the last one ends with the sequence."""

    def __post_init__(self) -> None:
        if self.length_tok < 2 or self.sequences < 1:
            raise ValueError(
                f"length_tok and sequences: should be at least 2 and 1, are {self.length_tok} and {self.sequences}"
            )
        if self.length_tok > LONGEST_TOK or self.sequences > MOST_SAMPLES:
            raise ValueError(
                f"length_tok and sequences: should be at most {LONGEST_TOK:,} and {MOST_SAMPLES:,}, are "
                f"{self.length_tok:,} and {self.sequences:,}"
            )

    def measure(self, window: EvalWindow) -> Iterable[Row]:
        """Rows of all metrics per corpus."""
        edges = [0, *(edge for edge in sorted(set(self.edges_tok)) if 1 < edge < self.length_tok), self.length_tok]
        if not (self.corpora or window.corpora):
            raise ValueError("corpora: is empty; name a text, such as bundled/stdlib, or give attach() some texts")
        for corpus in self.corpora or window.corpora:
            with agreed():
                sequence_ks = self.sequences_in(window, corpus)
            if len(sequence_ks) < self.sequences:
                window.caution(self, f"{corpus} has held-out text for {len(sequence_ks)} of {self.sequences} sequences")
            same = hashlib.sha256(np.asarray(sequence_ks, np.int64).tobytes()).hexdigest()[:12]
            trees = [[plain(tokens_s, k, (1, len(tokens_s)))] for k, tokens_s in enumerate(sequence_ks)]
            found = run_trees(window, trees, f"{self.name} {corpus}", same)
            nll_ks = np.stack([found[k].nll_r for k in range(len(trees))])  # column s is the token at position s + 1
            where = dict(corpus=corpus, length_tok=self.length_tok)
            yield window.row(self, "nll", nll_ks.mean(), nll_ks.size, **where)
            yield window.row(self, "ppl", np.exp(nll_ks.mean()), nll_ks.size, **where)
            for start, end in pairwise(edges):
                part = nll_ks[:, max(start - 1, 0) : end - 1]
                at = dict(from_tok=start, to_tok=end, **where)
                yield window.row(self, "position_nll", part.mean(), part.size, **at)
                for k, nll_s in enumerate(part):
                    one = dict(sample=k, sample_set=same, **at)
                    yield window.row(self, "sequence_position_nll", nll_s.mean(), nll_s.size, **one)
            for k, nll_s in enumerate(nll_ks):
                at = dict(sample=k, sample_set=same, **where)
                yield window.row(self, "sequence_nll", nll_s.mean(), nll_s.size, **at)

    def sequences_in(self, window: EvalWindow, corpus: str) -> np.ndarray:
        """The sequences of a corpus: [sequences, length_tok], fewer if it has no more."""
        key = (corpus, self.length_tok, self.sequences)
        if key not in window.cache:
            tokens = window.text(corpus, self.length_tok * (self.sequences + 1))
            bos = window.tokenizer.bos
            window.cache[key] = sequences_of(tokens, self.length_tok - 1, self.sequences, corpus, bos)
        return window.cache[key]

    def work(self, window: EvalWindow) -> Work:
        """What `measure` runs, for a plan."""
        corpora = self.corpora or window.corpora
        trees = [[plain(s, 0, (1, len(s)))] for corpus in corpora for s in self.sequences_in(window, corpus)]
        return Work(len(corpora), len(trees), trees, trees)
