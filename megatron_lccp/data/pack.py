"""Which stretches of which documents stand together in a sample: whole documents over the whole mixture.

In: the documents of each source, their shares, and a `PackState` that says what has been taken. Out: a window of steps,
and the state behind it. A window is a function of the state alone, so a resume on any layout has it again, and whatever
changes (shares, lengths, files) takes effect with the next one. Nothing is lost: what does not fit is carried over.

`best_fit` puts the longest stretch first, each where the least room is left (best-fit decreasing, Ding et al., arXiv
2404.10830), over all sources at once: short documents fill what long ones leave. `concat` lays documents end to end and
cuts where a sample is full. Plain numbers throughout; tokens are read only for batches (data/packed.py).
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from megatron_lccp.config.tree import PackConfig
from megatron_lccp.data.corpus import Corpus, Place, Walk


class Piece(NamedTuple):
    """A stretch of a document."""

    source: str
    document: int
    start: int
    end: int

    @property
    def tokens(self) -> int:
        """Tokens of it."""
        return self.end - self.start


Keyed = tuple[str, int, int, int]
"""A piece that outlives the files: source, key of the document, start, end."""
Sample = Sequence[Piece]
"""What stands in one sequence, in this order; padding behind each piece up to a multiple of `align_tok`."""


@dataclass(frozen=True)
class PackState:
    """What has been taken before a window begins."""

    places: Mapping[str, Place] = field(default_factory=dict)
    """Of each source that was ever drawn from."""
    owed_tok: Mapping[str, float] = field(default_factory=dict)
    """Tokens that each source is behind its share; negative: ahead."""
    carried: tuple[Keyed, ...] = ()
    """Pieces that did not fit."""

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> PackState:
        """What `to_json` wrote. Raises TypeError or KeyError for what it did not."""
        places = {str(name): Place(**place) for name, place in tree["places"].items()}
        carried = tuple((str(source), *map(int, rest)) for source, *rest in tree["carried"])
        return cls(places, dict(tree["owed_tok"]), carried)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Recipe:
    """What the samples of a window are made by."""

    shares: Mapping[str, float]
    """Source -> share of the tokens, adding up to 1."""
    context_tok: int
    pack: PackConfig
    seed: int

    def room(self, tokens: int) -> int:
        """Tokens that a piece takes up, its padding with it."""
        return -(-tokens // self.pack.align_tok) * self.pack.align_tok


def next_window(
    recipe: Recipe, corpora: Mapping[str, Corpus], state: PackState, samples: int
) -> tuple[list[Sample], PackState]:
    """So many samples, and the state behind them."""
    walks = {s: Walk(corpora[s], recipe.seed, s, state.places.get(s, Place())) for s in recipe.shares}
    owed = {source: state.owed_tok.get(source, 0.0) for source in recipe.shares}
    carried = list(_carried(recipe, corpora, state))
    if recipe.pack.how == "best_fit":
        room = samples * recipe.context_tok - sum(recipe.room(piece.tokens) for piece in carried)
        new = [piece for source in walks for piece in _share(recipe, walks[source], source, owed, room)]
        made, left = best_fit([carried, new], samples, recipe)
    else:
        made, left = _end_to_end(recipe, walks, owed, carried, samples)
    places = {**state.places, **{source: walk.place for source, walk in walks.items()}}
    return made, PackState(places, owed, tuple(keyed(piece, corpora) for piece in left))


def keyed(piece: Piece, corpora: Mapping[str, Corpus]) -> Keyed:
    """A piece as a checkpoint keeps it."""
    return piece.source, int(corpora[piece.source].key_d[piece.document]), piece.start, piece.end


def best_fit(pieces: Sequence[Sequence[Piece]], samples: int, recipe: Recipe) -> tuple[list[Sample], list[Piece]]:
    """(samples, what found no room); the first of `pieces` are placed before the others."""
    content: list[list[Piece]] = [[] for _ in range(samples)]
    spaces = [recipe.context_tok]  # sorted
    with_space: dict[int, list[int]] = defaultdict(list, {recipe.context_tok: list(range(samples))[::-1]})
    left: list[Piece] = []
    for group in pieces:
        for piece in sorted(group, key=lambda piece: -piece.tokens):
            room = recipe.room(piece.tokens)
            at = bisect.bisect_left(spaces, room)
            if at == len(spaces):
                left.append(piece)
                continue
            space = spaces[at]
            number = with_space[space].pop()
            if not with_space[space]:
                del spaces[at]
            content[number].append(piece)
            if space > room:
                if not with_space[space - room]:
                    bisect.insort(spaces, space - room)
                with_space[space - room].append(number)
    return list(content), left


def _share(recipe: Recipe, walk: Walk, source: str, owed: dict[str, float], room: int) -> Iterator[Piece]:
    """The next pieces of a source, for its share of the room and what it is behind."""
    owed[source] += recipe.shares[source] * max(room, 0)
    long, context = recipe.pack.long, recipe.context_tok
    while owed[source] > 0:
        document, start = walk.document()
        tokens = min(walk.left_tok, context)
        if long == "exact" and tokens < context:
            walk.leave()
            continue
        walk.take(tokens)
        if long == "truncate":
            walk.leave()
        owed[source] -= recipe.room(tokens)
        yield Piece(source, document, start, start + tokens)


def _end_to_end(
    recipe: Recipe, walks: Mapping[str, Walk], owed: dict[str, float], carried: Sequence[Piece], samples: int
) -> tuple[list[Sample], list[Piece]]:
    """Documents one after another, always of the source that is furthest behind, cut where a sample is full."""
    made: list[Sample] = []
    first = list(carried)[::-1]
    for _ in range(samples):
        sample: list[Piece] = []
        space = recipe.context_tok
        while space:
            if first:
                piece = first.pop()
                if piece.tokens > space:
                    first.append(piece._replace(start=piece.start + space))
                    piece = piece._replace(end=piece.start + space)
            else:
                source = max(owed, key=lambda name: owed[name] + recipe.shares[name])
                document, start = walks[source].document()
                tokens = min(walks[source].left_tok, space)
                walks[source].take(tokens)
                piece = Piece(source, document, start, start + tokens)
                for name, share in recipe.shares.items():
                    owed[name] += share * recipe.room(tokens)
                owed[source] -= recipe.room(tokens)
            sample.append(piece)
            space -= recipe.room(piece.tokens)
        made.append(sample)
    return made, first[::-1]


def _carried(recipe: Recipe, corpora: Mapping[str, Corpus], state: PackState) -> Iterator[Piece]:
    """What did not fit before, in pieces that fit into a sample of now; what is of a source no longer trained on, or of
    a document that is gone, is dropped."""
    for source, key, start, end in state.carried:
        if source in recipe.shares and (document := corpora[source].document_of(key)) >= 0:
            for at in range(start, end, recipe.context_tok):
                yield Piece(source, document, at, min(end, at + recipe.context_tok))


def dealt(samples: Sequence[Sample], steps: int, recipe: Recipe) -> list[list[Sample]]:
    """The samples of each step of a window: all steps have about the same work, and within one the hardest come first.

    So the ranks of a micro-batch, which takes neighbours, have about the same work too.
    """
    by_work = sorted(samples, key=lambda sample: -work(sample, recipe))
    found: list[list[Sample]] = [[] for _ in range(steps)]
    for at in range(0, len(by_work), steps):
        turn = by_work[at : at + steps]
        for step, sample in enumerate(turn if (at // steps) % 2 == 0 else turn[::-1]):
            found[step].append(sample)
    return found


def work(sample: Sample, recipe: Recipe) -> int:
    """Attention's work where it ends at documents: the sum of squared lengths."""
    return sum(recipe.room(piece.tokens) ** 2 for piece in sample)
