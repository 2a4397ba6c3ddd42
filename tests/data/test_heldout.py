"""The held-out split: enough on each side, and the same side for the same document."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lccp.config.tree import Source
from megatron_lccp.data.heldout import CANDIDATES, forced_heldout, holds_any, key_hash, side


@dataclass(frozen=True)
class Sized(Source):
    """Documents of the given lengths."""

    lengths: tuple[int, ...]
    name: str = ""

    def documents(self, vocab_size: int) -> Iterator[str]:
        for index, length in enumerate(self.lengths):
            yield f"{self.name} {index} ".ljust(length, ".")


def heldout_length(source: Sized, share: float, forced: frozenset[str]) -> tuple[int, int]:
    """(characters held out, all characters)."""
    documents = list(source.documents(0))
    heldout = [d for d in documents if side(key_hash(source, d), share, forced) == "heldout"]
    return sum(map(len, heldout)), sum(map(len, documents))


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([20, 30, 100, 5000]), min_size=2, max_size=40),
    share=st.sampled_from([0.01, 0.03, 0.1, 0.3]),
    name=st.text("abc", max_size=3),
)
def test_at_least_half_of_the_share_is_held_out_and_something_is_trained_on(lengths, share, name):
    source = Sized(tuple(lengths), name)
    forced = forced_heldout({"s": source}, share, 0)
    heldout, whole = heldout_length(source, share, forced)
    unforced, _ = heldout_length(source, share, frozenset())
    assert 0 < heldout
    assert heldout < whole or unforced == whole
    assert heldout >= share * whole / 2 or _trained_on(source, share, forced) == 1
    if unforced >= share * whole / 2:
        assert not forced
    else:
        assert heldout - unforced <= share * whole + max(lengths)
        assert heldout >= share * whole or _trained_on(source, share, forced) == 1


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_of_many_documents_is_held_out_by_their_hash_alone(share):
    heldout, whole = heldout_length(Sized((20,) * 20_000), share, frozenset())
    assert heldout / whole == pytest.approx(share, rel=0.25)


def _trained_on(source: Sized, share: float, forced: frozenset[str]) -> int:
    return sum(side(key_hash(source, d), share, forced) == "train" for d in source.documents(0))


def test_more_documents_than_are_remembered():
    """Thousands of tiny documents and none in the share: the first hash of all is taken."""
    for name in "abcd":
        source = Sized((12,) * (5 * CANDIDATES), name)
        hashes = sorted(key_hash(source, d) for d in source.documents(0))
        assert side(hashes[0], 1e-6, frozenset()) == "train"
        assert forced_heldout({"s": source}, 1e-6, 0) == {hashes[0]}


def test_every_copy_of_a_document_counts():
    """5 copies of one are 5 % of the text: enough for a share of 4 %, whichever comes first."""

    @dataclass(frozen=True)
    class Copies(Sized):
        def documents(self, vocab_size: int) -> Iterator[str]:
            yield from [*super().documents(vocab_size)] * 5

    sources = [Copies((20,) * 20, name) for name in "abcdefgh"]
    caught_none = [s for s in sources if heldout_length(s, 0.04, frozenset())[0] == 0]
    assert caught_none
    for source in caught_none:
        assert len(forced_heldout({"s": source}, 0.04, 0)) == 1


def test_what_is_forced_in_one_source_is_held_out_in_all():
    one, other = Sized((20, 20, 20)), Sized((20,) * 500)
    forced = forced_heldout({"one": one}, 1e-6, 0)
    assert len(forced) == 1 and holds_any(other, forced, 0) and not holds_any(Sized((21,) * 9), forced, 0)
    assert [side(key_hash(other, d), 1e-6, forced) for d in other.documents(0)].count("heldout") == 1
    assert not holds_any(other, frozenset(), 0)


@pytest.mark.parametrize("lengths", [(), (20,), (0, 20)])
def test_one_document_cannot_be_split(lengths):
    source = Sized(lengths) if lengths != (0, 20) else _same_twice()
    with pytest.raises(
        ValueError, match=r"data\.sources\.few: needs at least two different documents, one to hold out"
    ):
        forced_heldout({"few": source}, 1e-6, 0)


def _same_twice() -> Source:
    class Same(Source):
        def documents(self, vocab_size: int) -> Iterator[list[int]]:
            yield [5, 6]
            yield []
            yield [5, 6]

    return Same()
