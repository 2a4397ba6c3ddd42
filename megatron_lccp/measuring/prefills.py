"""Needle samples -> prefills: sequences in which many cells share the text they have in common.

In: needle samples. Out: `Prefill`s that give every sample's answer, and what they cost. Numpy only.

The samples of one fact in one haystack H differ in where the needle stands and where the question is asked. Their tree
(a begin token, where samples have one, counts as the first token of H):

    prefix  H[:b] + needle + H[b:b + a] of the largest b, and of its largest a: shared by all
    branch  needle + H[b:b + a] of the largest a, one for each other b; sees the first b tokens of the prefix
    tap     question + answer, one for each cell (b, a); sees what its branch sees and the branch up to a

Each stretch has the RoPE positions it would have in its own sample, so every token sees what it would see there. Laid
end to end, the largest b first, they are one long sequence, which goes through the model in prefills of a given length;
keys and values of what later tokens see are kept meanwhile, never more than of the longest sample and a few prefills.
Exact for models in which a token's output depends on what it sees and nothing else.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_lccp.data.needles import NeedleSample

Stretch = tuple[int, int]
"""Tokens [start, end) of the long sequence. All places below count in it; a prefill has some of it."""


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens that see the same text before them, and each other causally."""

    start: int
    """First token."""
    end: int
    """End, not included."""
    sees: tuple[Stretch, ...] = ()
    """Earlier stretches that it sees, in the order of their RoPE positions."""


@dataclass(frozen=True)
class Tap:
    """Where a question is asked."""

    samples: tuple[int, ...]
    """Numbers of the samples it answers: several, if cells coincide."""
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
    """What goes through the model together: some consecutive tokens of the long sequence, or all of a short one."""

    tokens: np.ndarray
    """Token ids [s], int64."""
    positions: np.ndarray
    """RoPE position of each token [s], int64."""
    segments: tuple[Segment, ...]
    """Cover its tokens in order."""
    taps: tuple[Tap, ...]
    """What is read from it; each lies in one segment."""
    start: int = 0
    """Place of its first token."""
    keep_to: int = 0
    """End of the last segment that sees any of it; until then its keys and values are kept."""

    @property
    def end(self) -> int:
        """Place after its last token."""
        return self.start + len(self.tokens)

    @property
    def is_plain(self) -> bool:
        """True for an ordinary causal sequence."""
        return len(self.segments) == 1 and not self.segments[0].sees

    def segment_of(self, tap: Tap) -> Segment:
        """The segment that a tap lies in."""
        return next(segment for segment in self.segments if tap.question < segment.end)

    def __len__(self) -> int:
        return len(self.tokens)


Tree = list[Prefill]
"""Prefills that belong together, in order."""


def plain(tokens: np.ndarray, number: int, answer: tuple[int, int], question: int = 0, needle=(0, 0)) -> Prefill:
    """An ordinary sequence whose tokens `answer` = (start, end) are to be predicted."""
    tap = Tap((number,), question, *answer, needle)
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


def shared(
    samples: Sequence[NeedleSample], null: bool = False, parts: int = 1, prefill_tok: int | None = None
) -> list[Tree]:
    """As few tokens as possible: one tree for each fact and haystack, in prefills of at most `prefill_tok` tokens.

    None: as many tokens as the tree's longest sample has with all taps of its branch. A prefill is longer where a
    question with its answer is: those are never cut. With fewer trees than `parts` (data-parallel replicas), each is
    cut into several, if its needle stands in several places; each has a shared prefix of its own.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for number, sample in enumerate(samples):
        groups.setdefault((sample.family, sample.sample), []).append(number)
    trees = []
    for numbers in groups.values():
        branches = _branches(samples, numbers, null)
        for mine in _split(branches, -(-parts // len(groups))):
            trees.append(_tree(mine, prefill_tok))
    return trees


def deal(trees: Sequence[Tree], replicas: int) -> list[list[Prefill]]:
    """The prefills of each replica: longest trees first, each to whoever has least."""
    dealt: list[list[Prefill]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    for tree in sorted(trees, key=tokens_of, reverse=True):
        least = loads.index(min(loads))
        dealt[least] += tree
        loads[least] += tokens_of(tree)
    return dealt


def tokens_of(prefills: Sequence[Prefill]) -> int:
    """Tokens that go through the model."""
    return sum(len(prefill) for prefill in prefills)


@dataclass(frozen=True, eq=False)
class _Branch:
    """What the cells with one number of tokens before the needle need."""

    before: int
    text: np.ndarray
    """Tokens of the longest sample up to its question, those before the needle included."""
    asked: list[tuple[int, np.ndarray, Tap]]
    """(RoPE position of the question, question and answer, tap whose places count from the question), last first."""

    def __len__(self) -> int:
        """Tokens from the needle on."""
        return len(self.text) - self.before + sum(len(tokens) for _, tokens, _ in self.asked)


def _branches(samples: Sequence[NeedleSample], numbers: Sequence[int], null: bool) -> list[_Branch]:
    cells: dict[int, dict[int, list[int]]] = {}
    for number in numbers:
        cells.setdefault(samples[number].needle[0], {}).setdefault(samples[number].after_tok, []).append(number)
    branches = []
    for before, by_after in cells.items():
        asked = []
        for _, same in sorted(by_after.items(), reverse=True):
            s = samples[same[0]]
            at, question = s.question[0], s.question[1] - s.question[0]
            tails = [(s.tokens[at:], question)] + [(s.null_question, len(s.null_question))] * null
            asked += [(at, tail, Tap(tuple(same), 0, answer, len(tail), s.needle)) for tail, answer in tails]
        longest = samples[by_after[max(by_after)][0]]
        branches.append(_Branch(before, longest.tokens[: longest.question[0]], asked))
    return branches


def _split(branches: list[_Branch], parts: int) -> list[list[_Branch]]:
    """Branches dealt into trees of about the same size, shared prefixes counted."""
    groups: list[list[_Branch]] = [[] for _ in range(min(parts, len(branches)))]

    def size(group: list[_Branch]) -> int:
        return max(branch.before for branch in group) + sum(map(len, group))

    for branch in sorted(branches, key=lambda branch: branch.before + len(branch), reverse=True):
        min(groups, key=lambda group: size([*group, branch])).append(branch)
    return groups


def _tree(branches: list[_Branch], prefill_tok: int | None) -> Tree:
    """The branches end to end, cut. The shared prefix comes first, and less and less of it is seen by those after it."""
    room = prefill_tok or max(branch.before + len(branch) for branch in branches)
    tokens, positions, taps, sizes = [], [], [], []
    segments: list[Segment] = []
    at = 0

    def add(stretch: np.ndarray, position: int, sees: tuple[Stretch, ...]) -> None:
        nonlocal at
        end = at + len(stretch)
        tokens.append(stretch)
        positions.append(position + np.arange(len(stretch)))
        if segments and sees == (*segments[-1].sees, (segments[-1].start, at)):  # it goes on where the last one ends
            segments[-1] = dataclasses.replace(segments[-1], end=end)
        else:
            segments.append(Segment(at, end, sees))
        at = end

    for branch in sorted(branches, key=lambda branch: branch.before, reverse=True):
        start, seen = at, branch.before if segments else 0
        prefix = ((0, seen),) if seen else ()
        add(branch.text[seen:], seen, prefix)
        sizes.append([at - start, *(len(tail) for _, tail, _ in branch.asked)])
        for position, tail, tap in branch.asked:
            places = (at + tap.question, at + tap.answer, at + tap.end)
            taps.append(Tap(tap.samples, *places, tap.needle))
            add(tail, position, (*prefix, (start, start + position - seen)))
    whole = Prefill(np.concatenate(tokens).astype(np.int64), np.concatenate(positions), tuple(segments), tuple(taps))
    return _cut(whole, _starts(sizes, room))


def _starts(sizes: Sequence[Sequence[int]], room: int) -> list[int]:
    """Where the prefills of a tree start; of each branch, `sizes` has the tokens of its text and of its taps.

    A branch that does not fit beside those before it starts a prefill, and only one that is longer than a prefill is
    cut: so little else is kept with what it needs. No tap is cut.
    """
    starts, at = [0], 0
    for text, *taps in sizes:
        if at > starts[-1] and at + text + sum(taps) > starts[-1] + room:
            starts.append(at)
        at += text
        while at > starts[-1] + room:
            starts.append(starts[-1] + room)
        for tap in taps:
            if at + tap > starts[-1] + room:
                starts.append(at)
            at += tap
    return starts


def _cut(whole: Prefill, starts: Sequence[int]) -> Tree:
    """A sequence in parts; what goes on in a later part sees what the earlier ones have of it."""
    tree, keep_to = [], [0] * len(starts)
    for start, end in pairwise([*starts, len(whole)]):
        segments = []
        for segment in whole.segments:
            first, last = max(segment.start, start), min(segment.end, end)
            if first < last:
                earlier = ((segment.start, first),) if segment.start < first else ()
                segments.append(Segment(first, last, segment.sees + earlier))
        taps = tuple(tap for tap in whole.taps if start <= tap.question < end)
        tree.append(Prefill(whole.tokens[start:end], whole.positions[start:end], tuple(segments), taps, start))
        for segment in segments:
            for a, b in segment.sees:
                for k in range(bisect_right(starts, a) - 1, bisect_left(starts, b)):
                    keep_to[k] = segment.end
    return [dataclasses.replace(prefill, keep_to=end) for prefill, end in zip(tree, keep_to)]
