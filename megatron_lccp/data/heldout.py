"""Which documents training never sees.

In: sources and the held-out share. Out: for each document, which side it is on. The side hangs on a hash of the
document (or of what its source's `split_key` makes of it), never on its place or on the name of its source: so what is
held out in one source is held out in all, as a file of a package and as part of the whole package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

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


def side(hashed: str, share: float, forced: frozenset[str]) -> Part:
    """The side of a document by its `key_hash`."""
    return "heldout" if hashed in forced or _in_share(hashed, share) else "train"


def forced_heldout(sources: dict[str, Source], share: float, vocab_size: int) -> frozenset[str]:
    """Hashes held out though they are not in the share, because a source has too little there.

    A source of few documents (the packages of a library) may have nothing or next to nothing in the share: less than
    half of what it should be, by length. Then its next hashes are added until it is reached. This looks at all
    sources before any is tokenized, since what one of them holds out no other may train on.
    """
    forced: set[str] = set()
    for name, source in sources.items():
        whole = caught = 0
        others: dict[str, int] = {}
        for document in _documents(source, vocab_size):
            hashed = key_hash(source, document)
            whole += len(document)
            if _in_share(hashed, share):
                caught += len(document)
                continue
            others[hashed] = others.get(hashed, 0) + len(document)
            if len(others) > 2 * CANDIDATES:
                others = {h: others[h] for h in sorted(others)[:CANDIDATES]}
        if caught == 0 and len(others) < 2:
            raise ValueError(f"data.sources.{name}: needs at least two different documents, one to hold out")
        if caught < share * whole / 2:
            for hashed in sorted(others)[:-1]:  # the last one stays to train on
                if caught >= share * whole:
                    break
                forced.add(hashed)
                caught += others[hashed]
    return frozenset(forced)


def holds_any(source: Source, hashes: frozenset[str], vocab_size: int) -> bool:
    """Whether a document of the source has one of the hashes."""
    return bool(hashes) and any(key_hash(source, d) in hashes for d in _documents(source, vocab_size))


def _documents(source: Source, vocab_size: int) -> Iterator[Document]:
    return (document for document in source.documents(vocab_size) if document)


def _in_share(hashed: str, share: float) -> bool:
    return int(hashed[:13], 16) < share * 16**13
