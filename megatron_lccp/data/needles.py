"""Held-out tokens -> needle samples whose spans are known because they were built, not found.

In: a `NeedleSetSpec`, a tokenizer, held-out token ids. Out: a `NeedleSet`, the same one every time, with a hash.
A sample is  begin | before | needle | after | question | answer  in token ids; needle and answer are one list of ids,
used twice. Nothing is decoded and encoded again. Cells are paired: sample k of a family has one fact and one haystack H
in all of them, and is  begin | H[:before] | needle | H[before : before + after] | question | answer. `begin` is the
tokenizer's begin token, or nothing (data.tokenizer.bos).
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from megatron_lccp.data.people.facts import FAMILIES, Fact, null_question_text, question_text
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.schema import LONGEST_TOK, MOST_SAMPLES


@dataclass(frozen=True, eq=False)
class NeedleSample:
    """One sample; spans are (start, end) in tokens, the end not included."""

    tokens: np.ndarray
    """Token ids [length_tok], int64."""
    needle: tuple[int, int]
    """Where the needle stands."""
    question: tuple[int, int]
    """Where the question stands, from its line break to the colon that the answer follows."""
    answer: tuple[int, int]
    """Where the answer stands: the last tokens, the same ids as the needle."""
    content: np.ndarray
    """Which tokens of the needle are the name or the value, not the sentence around them: [needle tokens], bool."""
    null_question: np.ndarray
    """Ids of a question that asks nothing, in the same language: [tokens], int64."""
    before_tok: int
    """Haystack tokens before the needle."""
    after_tok: int
    """Haystack tokens between the needle and the question."""
    depth_cell: float | None
    """Depth that was asked for; None where before and after were."""
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
    def begin_tok(self) -> int:
        """Tokens that stand before the haystack: 1 with a begin token, else 0."""
        return self.needle[0] - self.before_tok

    @property
    def depth(self) -> float:
        """Where the needle really is: before / (before + after); 0 without a haystack."""
        return self.before_tok / max(self.before_tok + self.after_tok, 1)


@dataclass(frozen=True)
class Cell:
    """One cell of a grid for one sample: how much haystack stands where."""

    before_tok: int
    after_tok: int
    depth_cell: float | None = None


@dataclass(frozen=True)
class NeedleSetSpec:
    """Which cells are measured, of which families, with how many samples each.

    A grid is lengths_tok x depths, or befores_tok x afters_tok, or both.
    """

    families: tuple[str, ...] = ("biography",)
    """biography: an attribute of an invented person, one sentence for each attribute. paraphrase: one of several.
    pronoun: the person says it. single: a lone fact about a city. With _zh at the end: in Chinese."""
    lengths_tok: tuple[int, ...] = ()
    """Total tokens of a sample, begin token, question and answer included."""
    depths: tuple[float, ...] = ()
    """Share of the haystack that stands before the needle."""
    samples: int = 8
    """Samples of each cell."""
    seed: int = 0
    """Another seed gives other facts and haystacks."""
    haystacks: tuple[str, ...] = ()
    """Sources whose held-out tokens the needles lie in; samples take them in turn."""
    lattice_tok: int | None = None
    """Of lengths x depths: before is rounded to a multiple of this, so that cells share it and work can be shared."""
    befores_tok: tuple[int, ...] = ()
    """Haystack tokens before the needle; the length follows."""
    afters_tok: tuple[int, ...] = ()
    """Haystack tokens between needle and question, crossed with befores_tok."""
    most_tok: int | None = None
    """Of befores x afters: cells with more haystack than this, before and after together, are left out."""

    def __post_init__(self) -> None:
        if unknown := [family for family in self.families if family not in FAMILIES]:
            raise ValueError(f"families: {unknown[0]!r} is none of {', '.join(FAMILIES)}")
        grids = (("lengths_tok", "depths"), ("befores_tok", "afters_tok"))
        axes = [axis for grid in grids for axis in grid if any(getattr(self, other) for other in grid)]
        if not axes:
            raise ValueError("lengths_tok: is empty; give lengths_tok and depths, or befores_tok and afters_tok")
        for field in ("families", "haystacks", *axes):
            if not getattr(self, field):
                raise ValueError(f"{field}: is empty; give at least one")
        if self.samples < 1 or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(
                f"samples and depths: should be at least 1 and in [0, 1], are {self.samples} and {self.depths}"
            )
        if self.samples > MOST_SAMPLES:
            raise ValueError(f"samples: should be at most {MOST_SAMPLES:,}, is {self.samples:,}")
        for field in ("lengths_tok", "befores_tok", "afters_tok"):
            if (longest := max(getattr(self, field), default=0)) > LONGEST_TOK:
                raise ValueError(f"{field}: should be at most {LONGEST_TOK:,}, has {longest:,}")
        if self.lattice_tok is not None and self.lattice_tok < 1:
            raise ValueError(f"lattice_tok: {self.lattice_tok} is no number of tokens; give 1 or more, or null")
        if negative := [tok for tok in self.befores_tok + self.afters_tok if tok < 0]:
            raise ValueError(f"befores_tok and afters_tok: {negative[0]} is negative; give 0 or more")
        if self.befores_tok and not self._crossed():
            least = min(self.befores_tok) + min(self.afters_tok)
            raise ValueError(f"most_tok: {self.most_tok} leaves no cell; the smallest has {least} tokens of haystack")

    def _crossed(self) -> list[Cell]:
        """Cells of befores x afters."""
        crossed = product(self.befores_tok, self.afters_tok)
        return [Cell(b, a) for b, a in crossed if self.most_tok is None or b + a <= self.most_tok]

    def cells(self, fixed_tok: int) -> list[Cell]:
        """All cells for a sample of which all but the haystack takes `fixed_tok`: as many for every sample."""
        cells = []
        lattice = self.lattice_tok or 1
        for length_tok, depth in product(self.lengths_tok, self.depths):
            haystack_tok = length_tok - fixed_tok
            before_tok = min(round(depth * haystack_tok / lattice), haystack_tok // lattice) * lattice
            cells.append(Cell(before_tok, haystack_tok - before_tok, depth))
        return cells + self._crossed()


@dataclass(frozen=True, eq=False)
class NeedleSet:
    """Samples in the order family, cell, sample; equal `sha` (12 hex digits) means the same samples."""

    samples: tuple[NeedleSample, ...]
    sha: str
    repeated: tuple[str, ...] = ()
    """Haystacks that the longest sample goes round more than once, a sentence for each: its text comes again in it."""


def build_needle_set(spec: NeedleSetSpec, tokenizer: Tokenizer, heldout: Callable[[str], np.ndarray]) -> NeedleSet:
    """Build every sample of the grid. `heldout` gives the token ids [tokens] of a source by name.

    Raises ValueError if a length has no room for needle, question, answer and one token of haystack, or if a haystack
    holds a needle already.
    """
    haystacks = {name: heldout(name) for name in spec.haystacks}
    made: list[NeedleSample] = []
    for family in spec.families:
        by_index = [list(_samples(spec, family, index, tokenizer, haystacks)) for index in range(spec.samples)]
        made += [sample for cell in zip(*by_index) for sample in cell]
    return NeedleSet(tuple(made), _hash(made), tuple(_repeated(made, haystacks, tokenizer)))


def compose(
    before: np.ndarray,
    after: np.ndarray,
    needle: list[int],
    content: list[bool],
    question: list[int],
    begin: Sequence[int] = (),
    **coordinates,
) -> NeedleSample:
    """Lay out one sample; `coordinates` are the remaining fields of NeedleSample."""
    start = len(begin) + len(before)
    answer_start = start + len(needle) + len(after) + len(question)
    return NeedleSample(
        tokens=np.concatenate([np.array(begin, np.int64), before, needle, after, question, needle]).astype(np.int64),
        needle=(start, start + len(needle)),
        question=(answer_start - len(question), answer_start),
        answer=(answer_start, answer_start + len(needle)),
        content=np.array(content, dtype=bool),
        before_tok=len(before),
        after_tok=len(after),
        **coordinates,
    )


def encode_fact(fact: Fact, tokenizer: Tokenizer) -> tuple[list[int], list[bool], list[int]]:
    """Ids of the needle, which of them hold some of the name or the value, and ids of the question.

    The sentence is encoded in one piece, as training text is. Which characters a token holds is read off the text of
    the ids up to it; a character of several tokens counts for each of them.
    """
    parts = fact.parts()
    text = "".join(part for part, _ in parts)
    in_slot = [is_slot for part, is_slot in parts for _ in part]
    ids = tokenizer.encode(text)
    so_far = [tokenizer.decode(ids[:count]) for count in range(len(ids) + 1)]
    starts = [len(os.path.commonprefix([decoded, text])) for decoded in so_far]
    ends = [start + (len(decoded) > start) for decoded, start in zip(so_far, starts)]  # a character that has begun
    content = [any(in_slot[start:end]) for start, end in zip(starts, ends[1:])]
    return ids, content, tokenizer.encode(question_text(fact))


def room_problems(spec: NeedleSetSpec, tokenizer: Tokenizer) -> list[str]:
    """Lengths that have no room for needle, question, answer and one token of haystack, a line for each family."""
    problems, begin_tok = [], int(tokenizer.bos is not None)
    for family in spec.families if spec.lengths_tok else ():
        facts = (FAMILIES[family](index, _rng(spec, family, index)[1]) for index in range(spec.samples))
        encoded = (encode_fact(fact, tokenizer) for fact in facts)
        fixed_tok = begin_tok + max(2 * len(needle) + len(question) for needle, _, question in encoded)
        if min(spec.lengths_tok) <= fixed_tok:
            problems.append(_no_room(spec, family, fixed_tok))
    return problems


def _no_room(spec: NeedleSetSpec, family: str, fixed_tok: int) -> str:
    return (
        f"lengths_tok: {min(spec.lengths_tok)} has no room for a haystack; needle, question and answer of a {family} "
        f"sample take {fixed_tok} tokens"
    )


def _rng(spec: NeedleSetSpec, family: str, index: int) -> tuple[int, random.Random]:
    """(seed of a sample, what it is drawn with)."""
    seed = int(hashlib.sha256(f"needle/{spec.seed}/{family}/{index}".encode()).hexdigest()[:15], 16)
    return seed, random.Random(seed)


def _samples(
    spec: NeedleSetSpec, family: str, index: int, tokenizer: Tokenizer, haystacks: dict[str, np.ndarray]
) -> Iterator[NeedleSample]:
    """One sample index of a family in all cells."""
    seed, rng = _rng(spec, family, index)
    fact = FAMILIES[family](index, rng)
    needle, content, question = encode_fact(fact, tokenizer)
    null_question = np.array(tokenizer.encode(null_question_text(fact.language)), dtype=np.int64)
    source = spec.haystacks[index % len(spec.haystacks)]
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    fixed_tok = len(begin) + 2 * len(needle) + len(question)
    if spec.lengths_tok and min(spec.lengths_tok) <= fixed_tok:
        raise ValueError(_no_room(spec, family, fixed_tok))
    cells = spec.cells(fixed_tok)
    offset = rng.randrange(len(haystacks[source]) or 1)
    longest_tok = max(cell.before_tok + cell.after_tok for cell in cells)
    haystack = _window(haystacks[source], offset, longest_tok, _marks(tokenizer), source)
    if _occurs(np.array(needle), haystack):
        raise ValueError(f"haystacks: the held-out tokens of {source!r} hold the needle {fact.sentence!r} already")
    for cell in cells:
        yield compose(
            haystack[: cell.before_tok], haystack[cell.before_tok : cell.before_tok + cell.after_tok],
            needle, content, question, begin, null_question=null_question, depth_cell=cell.depth_cell,
            family=family, kind=fact.kind, haystack=source, sample=index, seed=seed,
        )  # fmt: skip


def _window(tokens: np.ndarray, offset: int, count: int, marks: Sequence[int], source: str) -> np.ndarray:
    """`count` tokens from `offset` on, going round at the end, without the tokens that end or begin documents: a sample
    is one document."""
    pieces = [np.empty(0, tokens.dtype)]
    missing, position, without = count, offset, 0
    while missing:
        piece = np.asarray(tokens[position : position + missing])
        position = position + len(piece) if position + len(piece) < len(tokens) else 0
        kept = piece[~np.isin(piece, marks)]
        without = 0 if len(kept) else without + max(len(piece), 1)
        if without > len(tokens):
            raise ValueError(f"haystacks: source {source!r} has no held-out tokens")
        pieces.append(kept)
        missing -= len(kept)
    return np.concatenate(pieces).astype(np.int64)


def _repeated(samples: list[NeedleSample], haystacks: dict[str, np.ndarray], tokenizer: Tokenizer) -> Iterator[str]:
    longest: dict[str, int] = {}
    for s in samples:
        longest[s.haystack] = max(longest.get(s.haystack, 0), s.before_tok + s.after_tok)
    for source, wanted_tok in longest.items():
        has_tok = int((~np.isin(haystacks[source], _marks(tokenizer))).sum())
        if has_tok < wanted_tok:
            yield (
                f"{source} has {has_tok:,} held-out tokens, and the longest sample takes {wanted_tok:,} of them: its text "
                f"comes {wanted_tok / has_tok:.1f} times in it; raise data.heldout_share, give the source more documents "
                "or name a longer one in haystacks"
            )


def _marks(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end or begin documents."""
    return (tokenizer.eod,) if tokenizer.bos is None else (tokenizer.eod, tokenizer.bos)


def _occurs(needle: np.ndarray, haystack: np.ndarray) -> bool:
    if len(haystack) < len(needle):
        return False
    windows = np.lib.stride_tricks.sliding_window_view(haystack, len(needle))
    starts = np.flatnonzero(haystack[: len(windows)] == needle[0])
    return bool((windows[starts] == needle).all(axis=1).any())


def _hash(samples: list[NeedleSample]) -> str:
    digest = hashlib.sha256()
    for s in samples:
        where = (s.needle, s.answer, s.before_tok, s.after_tok, s.depth_cell, s.family, s.kind, s.sample, s.length_tok)
        digest.update(repr(where).encode() + s.tokens.tobytes() + s.content.tobytes() + s.null_question.tobytes())
    return digest.hexdigest()[:12]
