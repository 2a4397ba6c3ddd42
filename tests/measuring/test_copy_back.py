"""What CopyBack would run: drawn texts, lags, and copies that see the text and themselves alone.

What it measures is compared with full logits in tests/distributed/test_measuring.py, and over layouts in test_layouts.py.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_lccp.measuring.prefills import tokens_of
from megatron_lccp.monitors import CopyBack


def window_of(ids: int, vocab_size: int = 10**6, context_tok: int = 10**6, bos: int | None = None) -> SimpleNamespace:
    """A window whose tokenizer has so many ordinary ids."""
    tokenizer = SimpleNamespace(ordinary_size=259 + ids, bos=bos)
    return SimpleNamespace(tokenizer=tokenizer, vocab_size=vocab_size, context_tok=context_tok)


@pytest.mark.parametrize(
    ("fields", "lags"),
    [
        ({}, [64, 128, 256, 512, 992]),
        ({"longest_tok": 65536}, [64 * 2**k for k in range(10)] + [65504]),
        ({"longest_tok": 96}, [64]),
        ({"longest_tok": 97}, [64, 65]),
        ({"longest_tok": 64}, [32]),
        ({"longest_tok": 300, "segment_tok": 100}, [128, 200]),
        ({"lags_tok": (200, 40, 200)}, [40, 200]),
    ],
)
def test_lags(fields: dict, lags: list[int]) -> None:
    assert CopyBack(**fields).lags() == lags


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"segment_tok": 1}, "segment_tok and samples: should be at least 2 and 1, are 1 and 4"),
        ({"samples": 0}, "are 32 and 0"),
        ({"longest_tok": 63}, "longest_tok: should be at least 64, two segments, is 63"),
        (
            {"lags_tok": (31,)},
            "lags_tok: should be from 32, a segment, to 992, what longest_tok leaves room for, not 31",
        ),
        ({"lags_tok": (64, 993)}, "not 993"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        CopyBack(**fields)
    assert said in str(caught.value)


def test_texts_are_drawn_and_repeat_an_id_no_more_than_they_must() -> None:
    monitor = CopyBack(longest_tok=132, samples=3)
    for ids, most in ((100, 1), (60, 2), (64, 2)):
        texts = monitor.texts(window_of(ids))
        assert texts.shape == (3, 100) and 259 <= texts.min() and texts.max() < 259 + ids
        for text in texts:
            assert max(Counter(text.tolist()).values()) == most
        assert len({text.tobytes() for text in texts}) == 3
        assert np.array_equal(texts, monitor.texts(window_of(ids)))
    assert monitor.texts(window_of(500, vocab_size=400)).max() < 400  # a model may have fewer than the tokenizer
    other = CopyBack(longest_tok=132, samples=3, seed=4).texts(window_of(100))
    assert not np.array_equal(other, monitor.texts(window_of(100)))


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("share", [True, False])
def test_every_copy_sees_the_text_up_to_its_lag_and_itself(share: bool, bos: int | None) -> None:
    """At the positions that follow; each number is asked once, for the tokens of the segment but the first."""
    monitor = CopyBack(longest_tok=180, segment_tok=20, samples=2, share=share)
    window, begin = window_of(400, bos=bos), [] if bos is None else [bos]
    texts, lags = monitor.texts(window), monitor.lags(len(begin))
    assert lags == [64, 128, 160 - len(begin)]
    asked = {}
    for (prefill,) in monitor.work(window).planned:
        assert prefill.is_plain != share
        for tap in prefill.taps:
            segment = prefill.segment_of(tap)
            assert segment.start < tap.answer <= tap.end <= segment.end  # the row before the answer is in it too
            seen = [*segment.sees, (segment.start, tap.end)]
            ids = np.concatenate([prefill.tokens[a:b] for a, b in seen])
            places = np.concatenate([prefill.positions[a:b] for a, b in seen])
            assert np.array_equal(places, np.arange(len(places)))
            (number,) = tap.samples
            assert number not in asked
            asked[number] = (ids.tolist(), prefill.tokens[tap.answer : tap.end].tolist())
    for sample, text in enumerate(texts.tolist()):
        assert asked.pop(monitor.number(sample, 3)) == (begin + text[:20], text[1:20])
        for k, lag in enumerate(lags):
            assert asked.pop(monitor.number(sample, k)) == (begin + text[:lag] + text[:20], text[1:20])
    assert not asked


def test_a_plan_counts_one_text_for_all_lags() -> None:
    work = CopyBack(samples=3).work(window_of(2000))
    assert (work.cells, work.samples, work.times, work.look) == (5, 15, 1, False)
    planned, alone = (sum(map(tokens_of, trees)) for trees in (work.planned, work.alone))
    assert planned == 3 * (992 + 5 * 32) and alone == 3 * (64 + 128 + 256 + 512 + 992 + 5 * 32)


def test_what_it_says_against_a_model() -> None:
    assert list(CopyBack().check(window_of(64, context_tok=1024))) == []
    lines = list(CopyBack().check(window_of(63, context_tok=1023)))
    assert [line.partition(":")[0] for line in lines] == ["longest_tok", "segment_tok"]
    assert "of 1023; lower it" in lines[0] and "has 63; lower it" in lines[1]
    (line,) = CopyBack(lags_tok=(64, 992)).check(window_of(64, bos=1))
    assert line == "longest_tok: the begin token makes the longest sample 1025 tokens; raise it by 1"
    assert list(CopyBack().check(window_of(64, bos=1))) == [] == list(CopyBack(longest_tok=1025).check(window_of(64)))
