"""Held-out tokens -> needle samples whose spans are known because they were built, not found.

In: a `NeedleSetSpec`, a tokenizer, held-out token ids. Out: a `NeedleSet`, the same one every time, with a hash.
A sample is  before | needle | after | question | answer  in token ids; needle and answer are one list of ids, used
twice. Nothing is decoded and encoded again. Sample k of a cell has the same fact and the same haystack at every depth
and, from the same first token on, at every length: cells are paired.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_lccp.data.facts import FAMILIES, Fact, question_text
from megatron_lccp.data.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class NeedleSample:
    """One sample; spans are (start, end) in tokens, the end not included."""

    tokens: np.ndarray
    """Token ids [length_tok], int64."""
    needle: tuple[int, int]
    """Where the needle stands."""
    answer: tuple[int, int]
    """Where the answer stands: the last tokens, the same ids as the needle."""
    content: np.ndarray
    """Which tokens of the needle are the name or the value, not the sentence around them: [needle tokens], bool."""
    before_tok: int
    """Haystack tokens before the needle."""
    after_tok: int
    """Haystack tokens between the needle and the question."""
    depth_cell: float
    """Depth that was asked for."""
    family: str
    """Family of the fact."""
    kind: str
    """Kind of the fact in its family, such as the attribute."""
    haystack: str
    """Source of the haystack."""
    sample: int
    """Index in its cell; equal indices of a family share fact and haystack."""
    seed: int
    """Seed that fact and haystack were drawn with."""

    @property
    def length_tok(self) -> int:
        return len(self.tokens)

    @property
    def depth(self) -> float:
        """Where the needle really is: before / (before + after)."""
        return self.before_tok / (self.before_tok + self.after_tok)


@dataclass(frozen=True)
class NeedleSetSpec:
    """A grid of cells, family x length x depth, and how many samples each has."""

    families: tuple[str, ...] = ("biography",)
    """biography: an attribute of an invented person. single: a lone fact about a city."""
    lengths_tok: tuple[int, ...] = (1024,)
    """Total tokens of a sample, question and answer included."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Share of the haystack that stands before the needle."""
    samples: int = 8
    """Samples of each cell."""
    seed: int = 0
    """Another seed gives other facts and haystacks."""
    haystacks: tuple[str, ...] = ()
    """Sources whose held-out tokens the needles lie in; samples take them in turn."""

    def __post_init__(self) -> None:
        if unknown := [family for family in self.families if family not in FAMILIES]:
            raise ValueError(f"families: {unknown[0]!r} is none of {', '.join(FAMILIES)}")
        for field in ("families", "lengths_tok", "depths", "haystacks"):
            if not getattr(self, field):
                raise ValueError(f"{field}: is empty; give at least one")
        if self.samples < 1 or not 0 <= min(self.depths) <= max(self.depths) <= 1:
            raise ValueError(
                f"samples and depths: should be at least 1 and in [0, 1], are {self.samples} and {self.depths}"
            )


@dataclass(frozen=True, eq=False)
class NeedleSet:
    """Samples in the order family, length, depth, sample; equal `sha` (12 hex digits) means the same samples."""

    samples: tuple[NeedleSample, ...]
    sha: str


def build_needle_set(spec: NeedleSetSpec, tokenizer: Tokenizer, heldout: Callable[[str], np.ndarray]) -> NeedleSet:
    """Build every sample of the grid. `heldout` gives the token ids [tokens] of a source by name.

    Raises ValueError if a length has no room for needle, question, answer and one token of haystack, or if a haystack
    holds a needle already.
    """
    haystacks = {name: heldout(name) for name in spec.haystacks}
    by_cell: dict[tuple[str, int, float], list[NeedleSample]] = {
        (family, length, depth): [] for family in spec.families for length in spec.lengths_tok for depth in spec.depths
    }
    for family in spec.families:
        for index in range(spec.samples):
            for length_tok, sample in _samples(spec, family, index, tokenizer, haystacks):
                by_cell[family, length_tok, sample.depth_cell].append(sample)
    samples = tuple(sample for cell in by_cell.values() for sample in cell)
    return NeedleSet(samples, _hash(samples))


def compose(
    before: np.ndarray, after: np.ndarray, needle: list[int], content: list[bool], question: list[int], **coordinates
) -> NeedleSample:
    """Lay out one sample; `coordinates` are the remaining fields of NeedleSample."""
    start, answer_start = len(before), len(before) + len(needle) + len(after) + len(question)
    return NeedleSample(
        tokens=np.concatenate([before, needle, after, question, needle]).astype(np.int64),
        needle=(start, start + len(needle)),
        answer=(answer_start, answer_start + len(needle)),
        content=np.array(content, dtype=bool),
        before_tok=len(before),
        after_tok=len(after),
        **coordinates,
    )


def encode_fact(fact: Fact, tokenizer: Tokenizer) -> tuple[list[int], list[bool], list[int]]:
    """Ids of " <sentence>", which of them are name or value, and ids of the question up to and with `Answer:`."""
    ids: list[int] = []
    content: list[bool] = []
    for text, is_slot in fact.parts():
        part = tokenizer.encode(text)
        ids += part
        content += [is_slot] * len(part)
    return ids, content, tokenizer.encode(question_text(fact))


def _samples(
    spec: NeedleSetSpec, family: str, index: int, tokenizer: Tokenizer, haystacks: dict[str, np.ndarray]
) -> Iterator[tuple[int, NeedleSample]]:
    """(length, sample) of all cells of a family for one sample index."""
    seed = int(hashlib.sha256(f"needle/{spec.seed}/{family}/{index}".encode()).hexdigest()[:15], 16)
    rng = random.Random(seed)
    fact = FAMILIES[family](index, rng)
    needle, content, question = encode_fact(fact, tokenizer)
    source = spec.haystacks[index % len(spec.haystacks)]
    fixed_tok = 2 * len(needle) + len(question)
    if min(spec.lengths_tok) <= fixed_tok:
        raise ValueError(
            f"lengths_tok: {min(spec.lengths_tok)} has no room for a haystack; needle, question and answer of a "
            f"{family} sample take {fixed_tok} tokens"
        )
    offset = rng.randrange(len(haystacks[source]) or 1)
    longest = _window(haystacks[source], offset, max(spec.lengths_tok) - fixed_tok, tokenizer.eod, source)
    if _occurs(np.array(needle), longest):
        raise ValueError(f"haystacks: the held-out tokens of {source!r} hold the needle {fact.sentence!r} already")
    for length_tok in spec.lengths_tok:
        haystack = longest[: length_tok - fixed_tok]
        for depth in spec.depths:
            before_tok = round(depth * len(haystack))
            yield length_tok, compose(
                haystack[:before_tok], haystack[before_tok:], needle, content, question,
                depth_cell=depth, family=family, kind=fact.kind, haystack=source, sample=index, seed=seed,
            )  # fmt: skip


def _window(tokens: np.ndarray, offset: int, count: int, eod: int, source: str) -> np.ndarray:
    """`count` tokens from `offset` on, going round at the end, without end tokens: a sample is one document."""
    pieces: list[np.ndarray] = []
    missing, position, without = count, offset, 0
    while missing:
        piece = np.asarray(tokens[position : position + missing])
        position = position + len(piece) if position + len(piece) < len(tokens) else 0
        kept = piece[piece != eod]
        without = 0 if len(kept) else without + max(len(piece), 1)
        if without > len(tokens):
            raise ValueError(f"haystacks: source {source!r} has no held-out tokens")
        pieces.append(kept)
        missing -= len(kept)
    return np.concatenate(pieces).astype(np.int64)


def _occurs(needle: np.ndarray, haystack: np.ndarray) -> bool:
    if len(haystack) < len(needle):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(haystack, len(needle))
    starts = np.flatnonzero(haystack[: len(windows)] == needle[0])
    return bool((windows[starts] == needle).all(axis=1).any())


def _hash(samples: tuple[NeedleSample, ...]) -> str:
    digest = hashlib.sha256()
    for s in samples:
        where = (s.needle, s.answer, s.before_tok, s.after_tok, s.depth_cell, s.family, s.kind, s.sample, s.length_tok)
        digest.update(repr(where).encode() + s.tokens.tobytes() + s.content.tobytes())
    return digest.hexdigest()[:12]
