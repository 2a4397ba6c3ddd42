"""The training documents of a source by their content, and the order in which each epoch goes through them.

In: tokenized files. Out: `Corpus`, and a `Place` in it that says what has been taken, whatever files hold the documents:
the order of an epoch is that of a hash of content, seed and epoch, so another layout of the same files goes on where the
old one stopped. Documents added meanwhile take their place in the order, those before it in the next epoch.

Shapes: d documents.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_lccp.files import write_whole

READ_AT_ONCE = 1 << 24
"""Tokens hashed between two looks at the file."""


@dataclass(frozen=True)
class Place:
    """How far a source has been gone through."""

    epoch: int = 0
    """From 0."""
    after: int = -1
    """Place in the epoch's order (a hash) of the last document that was begun; -1: none was."""
    copies: int = 0
    """How many with that hash were: equal documents share it."""
    left_tok: int = 0
    """Tokens of that document that are still to be taken."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents on disk."""

    key_d: np.ndarray
    """uint64: a hash of each document's tokens."""
    length_d: np.ndarray
    """Tokens of each document, its end token included."""
    _token: np.ndarray
    _start_d: np.ndarray

    def tokens(self, document: int, start: int, end: int) -> np.ndarray:
        """Some tokens of a document, as they are on disk."""
        first = self._start_d[document]
        return self._token[first + start : first + end]

    @functools.cached_property
    def by_key(self) -> tuple[np.ndarray, np.ndarray]:
        """(keys in order, the document of each): for those that know a document by its key alone."""
        order_d = np.argsort(self.key_d, kind="stable")
        return self.key_d[order_d], order_d

    def document_of(self, key: int) -> int:
        """A document with this key; -1 if there is none."""
        keys, documents = self.by_key
        at = int(np.searchsorted(keys, np.uint64(key)))
        return int(documents[at]) if at < len(keys) and keys[at] == np.uint64(key) else -1


class Order:
    """The documents of one epoch in turn."""

    def __init__(self, corpus: Corpus, seed: int, source: str, epoch: int):
        salt = hashlib.sha256(f"{seed}/{source}/{epoch}".encode()).digest()
        hash_d = _mixed(corpus.key_d ^ np.frombuffer(salt[:8], np.uint64)[0])
        self.document_d = np.argsort(hash_d, kind="stable").astype(np.uint32)
        self.hash_d = hash_d[self.document_d]

    def index_of(self, place: Place) -> int:
        """How many documents were begun: those before the place, and of equal ones as many as were."""
        if place.after < 0:
            return 0
        first, last = (int(np.searchsorted(self.hash_d, np.uint64(place.after), side)) for side in ("left", "right"))
        return min(first + place.copies, last)

    def place_at(self, index: int, epoch: int, left_tok: int) -> Place:
        """The place after `index` documents, of the last of which some tokens are left."""
        if index == 0:
            return Place(epoch)
        last = self.hash_d[index - 1]
        return Place(epoch, int(last), index - int(np.searchsorted(self.hash_d, last, "left")), left_tok)


class Walk:
    """Takes documents of a source one after another, through all epochs."""

    _order: Order

    def __init__(self, corpus: Corpus, seed: int, source: str, place: Place):
        self._corpus, self._seed, self._source = corpus, seed, source
        self._enter(place.epoch)
        self._index = self._order.index_of(place)
        self.left_tok = place.left_tok if self._index else 0
        """Tokens of the document at hand that are still to be taken."""

    def _enter(self, epoch: int) -> None:
        self._epoch, self._index, self.left_tok = epoch, 0, 0
        self._order = _order(self._corpus, self._seed, self._source, epoch)

    @property
    def place(self) -> Place:
        """Where it stands."""
        return self._order.place_at(self._index, self._epoch, self.left_tok)

    def document(self) -> tuple[int, int]:
        """(document at hand, how many of its tokens were taken); the next one if nothing is left of the last."""
        if not self.left_tok:
            if self._index == len(self._order.document_d):
                self._enter(self._epoch + 1)
            self._index += 1
            self.left_tok = int(self._corpus.length_d[self._order.document_d[self._index - 1]])
        document = int(self._order.document_d[self._index - 1])
        return document, int(self._corpus.length_d[document]) - self.left_tok

    def take(self, tokens: int) -> None:
        """So many tokens of the document at hand are taken."""
        assert 0 < tokens <= self.left_tok, (tokens, self.left_tok)
        self.left_tok -= tokens

    def leave(self) -> None:
        """What is left of the document at hand is not wanted."""
        self.left_tok = 0


@functools.lru_cache(maxsize=32)
def _order(corpus: Corpus, seed: int, source: str, epoch: int) -> Order:
    return Order(corpus, seed, source, epoch)


def lengths_of(prefix: str) -> Corpus:
    """The documents under a prefix, in an order that is drawn rather than of their content: for counting alone."""
    length_d = _lengths(IndexedDataset(prefix).index)
    key_d = np.random.default_rng(0).integers(0, 2**64, len(length_d), np.uint64)
    return Corpus(key_d, length_d, np.empty(0, np.int32), np.zeros(len(length_d), np.int64))


def _lengths(index: Any) -> np.ndarray:
    """A copy: the index closes its file when nobody holds it any more, whoever still looks into it."""
    return np.array(index.sequence_lengths, np.int64)


def open_corpus(prefix: str, keys: Path) -> Corpus:
    """The documents under a prefix of Megatron's files; their hashes are kept in the file `keys`.

    Raises OSError if it cannot be written, ValueError if it is damaged.
    """
    index = IndexedDataset(prefix).index
    length_d = _lengths(index)
    token = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
    start_d = np.concatenate([[0], np.cumsum(length_d)])[:-1]
    if not keys.exists():
        key_d = np.fromiter(_keys(token, start_d, length_d), np.uint64, len(length_d))
        write_whole(keys, lambda draft: draft.write_bytes(key_d.tobytes()))
    key_d = np.fromfile(keys, np.uint64)
    if len(key_d) != len(length_d):
        raise ValueError(f"{keys}: has {len(key_d)} hashes for {len(length_d)} documents; remove it")
    return Corpus(key_d, length_d, token, start_d)


def _keys(token: np.ndarray, start_d: np.ndarray, length_d: np.ndarray) -> Iterator[int]:
    for start, length in zip(start_d, length_d):
        state = hashlib.blake2b(digest_size=8)
        for at in range(start, start + length, READ_AT_ONCE):
            state.update(np.ascontiguousarray(token[at : min(at + READ_AT_ONCE, start + length)], np.int32).tobytes())
        yield int.from_bytes(state.digest(), "little")


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: a permutation of uint64 without any order left."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
