"""Which documents training never sees.

In: sources and the held-out share. Out: for each document, which side it is on. The side hangs on a hash of the
document (or of what its source's `split_key` makes of it), never on its place or on the name of its source: so what is
held out in one source is held out in all, as a file of a package and as part of the whole package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_lccp.config.tree import Document, Source
from megatron_lccp.data.manifest import Part

# So many candidates are remembered for a source that needs more held out than its share catches.
CANDIDATES = 1024


def key_hash(source: Source, document: Document) -> str:
    """Hexadecimal hash that decides the side of a document."""
    key = source.split_key(document)
    data = key.encode() if isinstance(key, str) else np.asarray(key, np.int64).tobytes()
    return hashlib.sha256(b"held-out split: " + data).hexdigest()


@dataclass(frozen=True)
class Moved:
    """Hashes whose documents are on the other side than their hash alone says."""

    heldout: frozenset[str] = frozenset()
    train: frozenset[str] = frozenset()

    @property
    def all(self) -> frozenset[str]:
        """Both."""
        return self.heldout | self.train

    def with_(self, more: Moved) -> Moved:
        """Those of both, each where `more` has it."""
        return Moved((self.heldout - more.train) | more.heldout, (self.train - more.heldout) | more.train)


def side(hashed: str, share: float, moved: Moved) -> Part:
    """The side of a document by its `key_hash`."""
    if hashed in moved.heldout or hashed in moved.train:
        return "heldout" if hashed in moved.heldout else "train"
    return "heldout" if _in_share(hashed, share) else "train"


def to_move(sources: dict[str, Source], share: float, vocab_size: int) -> Moved:
    """What has to change sides, because hashes alone hold out less than half of a source's share, or more than twice.

    A source of few documents (the packages of a library) may have nothing in the share, and one in which a book holds
    most of the text may have all of that in it. Then documents move, by length, until the share is met as nearly as
    whole documents allow; at least one stays on each side. This looks at all sources before any is tokenized, since
    what one of them holds out no other may train on. What the first source decides of a document the next ones keep.
    """
    moved = Moved()
    for name, source in sources.items():
        whole = caught = 0
        held: dict[str, int] = {}
        others: dict[str, int] = {}
        for document in _documents(source, vocab_size):
            hashed = key_hash(source, document)
            whole += len(document)
            here = held if side(hashed, share, moved) == "heldout" else others
            here[hashed] = here.get(hashed, 0) + len(document)
            if here is held:
                caught += len(document)
                if len(held) > 2 * CANDIDATES:  # the longest: those whose move counts
                    held = dict(sorted(held.items(), key=lambda item: -item[1])[:CANDIDATES])
            elif len(others) > 2 * CANDIDATES:
                others = {h: others[h] for h in sorted(others)[:CANDIDATES]}
        if caught == 0 and len(others) < 2:
            raise ValueError(f"data.sources.{name}: needs at least two different documents, one to hold out")
        moved = moved.with_(_moved_in(held, others, caught, share * whole, moved.all))
    return moved


def _moved_in(
    held: dict[str, int], others: dict[str, int], caught: int, wanted: float, decided: frozenset[str]
) -> Moved:
    """What has to move in a source that holds out `caught` where `wanted` was asked for."""
    out: set[str] = set()
    left = {hashed: length for hashed, length in held.items() if hashed not in decided}
    while caught > 2 * wanted and left and len(held) + len(others) > 1:
        hashed = min(left, key=lambda each: (abs(caught - left[each] - wanted), each))
        if abs(caught - left[hashed] - wanted) >= caught - wanted:
            break  # it is as near as it comes
        out.add(hashed)
        caught -= left.pop(hashed)
    into: set[str] = set()
    if caught < wanted / 2:
        free = {hashed: others[hashed] for hashed in sorted(others) if hashed not in decided}
        for hashed in list(free)[: len(others) + len(out) - 1]:  # one stays to train on
            if caught >= wanted:
                break
            if caught + free[hashed] <= 2 * wanted:
                into.add(hashed)
                caught += free.pop(hashed)
        if caught == 0 and free:  # all are too long
            into.add(min(free, key=lambda each: (free[each], each)))
    return Moved(frozenset(into), frozenset(out))


def holds_any(source: Source, hashes: frozenset[str], vocab_size: int) -> bool:
    """Whether a document of the source has one of the hashes."""
    return bool(hashes) and any(key_hash(source, d) in hashes for d in _documents(source, vocab_size))


def _documents(source: Source, vocab_size: int) -> Iterator[Document]:
    return (document for document in source.documents(vocab_size) if document)


def _in_share(hashed: str, share: float) -> bool:
    return int(hashed[:13], 16) < share * 16**13
