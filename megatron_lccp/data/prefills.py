"""Needle samples -> prefills: sequences in which many cells share the text they have in common.

In: needle samples. Out: `Prefill`s that give every sample's answer, and what they cost. Numpy only.

The samples of one fact in one haystack H differ in where the needle stands and where the question is asked. Their tree:

    trunk   H[:b] of the largest b
    branch  needle + H[b:b + a] of the largest a, one for each b; sees the first b tokens of the trunk
    tap     question + answer, one for each cell (b, a); sees what its branch sees and the branch up to a

Each stretch has the RoPE positions it would have in its own sample, so every token sees what it would see there. A
tree that is longer than its longest sample with all its taps is cut into several prefills of at most that length, and
the trunk's keys and values are kept between them. Exact for models in which a token's output depends on what it sees
and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_lccp.data.needles import NeedleSample


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of a prefill that see the same text before them, and each other causally."""

    start: int
    """First token in the prefill."""
    end: int
    """End, not included."""
    trunk: int = 0
    """Sees this many tokens of the trunk that was kept from the tree's first prefill."""
    here: tuple[tuple[int, int], ...] = ()
    """Earlier stretches (start, end) of this prefill that it sees."""


@dataclass(frozen=True)
class Tap:
    """Where a question is asked; positions count in the prefill."""

    samples: tuple[int, ...]
    """Numbers of the samples it answers: several, if cells coincide."""
    segment: int
    """Segment it lies in."""
    question: int
    """First token of the question."""
    answer: int
    """First token of the answer; for a null question the end."""
    end: int
    """End of the answer."""
    needle: tuple[int, int] = (0, 0)
    """Where the needle stands, in RoPE positions."""

    @property
    def is_null(self) -> bool:
        """True for a question without content, asked to see where attention goes anyway."""
        return self.answer == self.end


@dataclass(frozen=True, eq=False)
class Prefill:
    """One sequence to run."""

    tokens: np.ndarray
    """Token ids [s], int64."""
    positions: np.ndarray
    """RoPE position of each token [s], int64."""
    segments: tuple[Segment, ...]
    """Cover the sequence in order."""
    taps: tuple[Tap, ...]
    """What is read from it."""
    keeps_trunk: bool = False
    """Its first segment is the trunk of the prefills after it."""

    @property
    def is_plain(self) -> bool:
        """True for an ordinary causal sequence."""
        return len(self.segments) == 1 and not self.segments[0].trunk

    def __len__(self) -> int:
        return len(self.tokens)


Tree = list[Prefill]
"""Prefills that belong together, in order."""


def plain(tokens: np.ndarray, number: int, answer: tuple[int, int], question: int = 0, needle=(0, 0)) -> Prefill:
    """An ordinary sequence whose tokens `answer` = (start, end) are to be predicted."""
    tap = Tap((number,), 0, question, *answer, needle)
    tokens = np.asarray(tokens, np.int64)
    return Prefill(tokens, np.arange(len(tokens)), (Segment(0, len(tokens)),), (tap,))


def one_each(samples: Sequence[NeedleSample], null: bool = False) -> list[Tree]:
    """A forward of its own for every sample, and another for its null question: the reference, and the fallback."""
    trees = []
    for k, s in enumerate(samples):
        trees.append([plain(s.tokens, k, s.answer, s.question[0], s.needle)])
        if null:
            asked = np.concatenate([s.tokens[: s.question[0]], s.null_question])
            trees[-1].append(plain(asked, k, (len(asked), len(asked)), s.question[0], s.needle))
    return trees


def shared(samples: Sequence[NeedleSample], null: bool = False, parts: int = 1) -> list[Tree]:
    """As few tokens as possible: one tree for each fact and haystack.

    With fewer of them than `parts` (data-parallel replicas), each is cut into several, if its needle stands in several
    places; each has a trunk of its own.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault((sample.family, sample.sample), []).append(number)
    trees = []
    for numbers in groups.values():
        units = _units(samples, numbers, null)
        for mine in _split(units, -(-parts // len(groups))):
            trees.append(_pack(samples, mine))
    return trees


def deal(trees: Sequence[Tree], replicas: int) -> list[list[Prefill]]:
    """The prefills of each replica: longest trees first, each to whoever has least."""
    hands: list[list[Prefill]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    for tree in sorted(trees, key=tokens_of, reverse=True):
        least = loads.index(min(loads))
        hands[least] += tree
        loads[least] += tokens_of(tree)
    return hands


def tokens_of(prefills: Sequence[Prefill]) -> int:
    """Tokens that go through the model."""
    return sum(len(prefill) for prefill in prefills)


@dataclass(frozen=True, eq=False)
class _Unit:
    """A branch with its taps; stretches hold (tokens, first RoPE position, how much of the branch it sees)."""

    before: int
    stretches: list[tuple[np.ndarray, int, int]]
    taps: list[tuple[int, Tap]]
    """(stretch, tap whose positions count from the start of the stretch)."""

    def __len__(self) -> int:
        return sum(len(tokens) for tokens, _, _ in self.stretches)


def _units(samples: Sequence[NeedleSample], numbers: Sequence[int], null: bool) -> list[_Unit]:
    """One unit for each number of tokens before the needle."""
    cells: dict[int, dict[int, list[int]]] = {}
    for number in numbers:
        cells.setdefault(samples[number].before_tok, {}).setdefault(samples[number].after_tok, []).append(number)
    units = []
    for before, by_after in sorted(cells.items()):
        longest = samples[by_after[max(by_after)][0]]
        stretches = [(longest.tokens[before : longest.question[0]], before, 0)]
        taps = []
        for after, same in sorted(by_after.items()):
            s = samples[same[0]]
            asked_at, question = s.question[0], s.question[1] - s.question[0]
            tails = [(s.tokens[asked_at:], question)] + [(s.null_question, len(s.null_question))] * null
            for tail, answer in tails:
                taps.append((len(stretches), Tap(tuple(same), -1, 0, answer, len(tail), s.needle)))
                stretches.append((tail, asked_at, asked_at - before))
        units.append(_Unit(before, stretches, taps))
    return units


def _split(units: list[_Unit], parts: int) -> list[list[_Unit]]:
    """Units dealt into trees of about the same size, trunks counted."""
    hands: list[list[_Unit]] = [[] for _ in range(min(parts, len(units)))]

    def size(hand: list[_Unit]) -> int:
        return max(unit.before for unit in hand) + sum(map(len, hand))

    for unit in sorted(units, key=lambda unit: unit.before + len(unit), reverse=True):
        min(hands, key=lambda hand: size([*hand, unit])).append(unit)
    return hands


def _pack(samples: Sequence[NeedleSample], units: list[_Unit]) -> Tree:
    """A tree as one prefill, or as several as long as its longest sample with its taps (first fit decreasing)."""
    numbers = [number for unit in units for _, tap in unit.taps for number in tap.samples]
    if len(units) == 1 and len(units[0].taps) == 1:
        s, samples_here = samples[numbers[0]], units[0].taps[0][1].samples
        tap = Tap(samples_here, 0, s.question[0], *s.answer, s.needle)
        return [Prefill(s.tokens, np.arange(s.length_tok), (Segment(0, s.length_tok),), (tap,))]
    trunk_tok = max(unit.before for unit in units)
    trunk = next(samples[n] for n in numbers if samples[n].before_tok == trunk_tok).tokens[:trunk_tok]
    room = max(unit.before + len(unit) for unit in units)
    bins: list[list[_Unit]] = [[]]
    used = [trunk_tok]
    for unit in sorted(units, key=len, reverse=True):
        fits = next((k for k, full in enumerate(used) if full + len(unit) <= room), len(bins))
        if fits == len(bins):
            bins.append([])
            used.append(0)
        bins[fits].append(unit)
        used[fits] += len(unit)
    kept = len(bins) > 1 and trunk_tok > 0
    return [_lay_out(part, trunk if k == 0 else trunk[:0], k > 0, kept and k == 0) for k, part in enumerate(bins)]


def _lay_out(units: list[_Unit], trunk: np.ndarray, trunk_kept: bool, keeps_trunk: bool) -> Prefill:
    tokens, positions, segments, taps = [trunk], [np.arange(len(trunk))], [], []
    at = len(trunk)
    if len(trunk):
        segments.append(Segment(0, at))
    for unit in units:
        branch = at
        before = ((0, unit.before),) if unit.before and not trunk_kept else ()
        for number, (stretch, first, of_branch) in enumerate(unit.stretches):
            tokens.append(stretch)
            positions.append(first + np.arange(len(stretch)))
            sees = before + (((branch, branch + of_branch),) if of_branch else ())
            segments.append(Segment(at, at + len(stretch), unit.before if trunk_kept else 0, sees))
            for _, tap in (pair for pair in unit.taps if pair[0] == number):
                place = (at + tap.question, at + tap.answer, at + tap.end)
                taps.append(Tap(tap.samples, len(segments) - 1, *place, tap.needle))
            at += len(stretch)
    return Prefill(
        np.concatenate(tokens).astype(np.int64), np.concatenate(positions), tuple(segments), tuple(taps), keeps_trunk
    )
