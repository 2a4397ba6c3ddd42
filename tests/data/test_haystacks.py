"""Bundled haystacks: documents with end tokens, the same for every user."""

import hashlib
import re

import numpy as np
import pytest

from megatron_lccp.data.haystacks import BUNDLED, bundled_tokens
from megatron_lccp.data.needles import NeedleSetSpec, build_needle_set
from megatron_lccp.data.sources.stdlib import PythonStdlib


@pytest.mark.parametrize("name", list(BUNDLED))
def test_text_of_whole_documents(name, tokenizer):
    tokens = bundled_tokens(name, tokenizer, 5000)
    documents = [tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.eod) + 1)]
    assert documents.pop() == "" and tokens.dtype == np.int32 and tokens[-1] == tokenizer.eod
    assert (tokens != tokenizer.eod).sum() >= 5000
    without_last = len(tokenizer.encode("".join(documents[:-1])))
    assert without_last < 5000
    longer = bundled_tokens(name, tokenizer, 60_000)
    assert np.array_equal(longer[: len(tokens)], tokens) and len(longer) > len(tokens)
    assert np.array_equal(bundled_tokens(name, tokenizer, 5000), tokens)
    assert not any("Question:" in text or "问题：" in text for text in documents) or name == "bundled/stdlib"


def test_what_each_holds(tokenizer):
    text = {name: tokenizer.decode(bundled_tokens(name, tokenizer, 4000)) for name in BUNDLED}
    first = next(iter(PythonStdlib().documents(0)))
    assert text["bundled/stdlib"].startswith(first)
    assert text["bundled/biographies"].count("A few words about ") % 10 == 0
    assert re.match("下面简单介绍一下.{3,4}。", text["bundled/biographies_zh"])
    # the same under every version of Python
    pinned = {"bundled/biographies": "6839cff42fe3", "bundled/biographies_zh": "31bd301d841f"}
    for name, sha in pinned.items():
        documents = BUNDLED[name]()
        ten = "\0".join(next(documents) for _ in range(10))
        assert hashlib.sha256(ten.encode()).hexdigest()[:12] == sha


def test_the_library_ends(tokenizer, monkeypatch):
    monkeypatch.setitem(BUNDLED, "bundled/stdlib", lambda: iter(["one\n", "two\n"]))
    tokens = bundled_tokens("bundled/stdlib", tokenizer, 10**9)
    assert tokenizer.decode(tokens) == "one\ntwo\n" and (tokens == tokenizer.eod).sum() == 2


def test_an_unknown_name_is_named(tokenizer):
    with pytest.raises(
        ValueError, match="haystacks: 'bundled/poems' is none of bundled/stdlib, bundled/biographies, b"
    ):
        bundled_tokens("bundled/poems", tokenizer, 10)


def test_needles_lie_in_them(tokenizer):
    spec = NeedleSetSpec(("biography", "pronoun_zh"), (600,), (0.5,), samples=6, haystacks=tuple(BUNDLED))
    made = build_needle_set(spec, tokenizer, lambda name: bundled_tokens(name, tokenizer, 2000))
    assert {sample.haystack for sample in made.samples} == set(BUNDLED) and len(made.samples) == 12
