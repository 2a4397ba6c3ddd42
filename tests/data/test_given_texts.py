"""Files of texts by name, and all of them as one; no more of a long one is read as tokens than is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_lccp.data.given_texts import ALL, CHARACTERS_PER_TOKEN, GivenTexts
from megatron_lccp.data.haystacks import bundled_tokens
from megatron_lccp.data.tokenizers.load import load_tokenizer
from tests.distributed.ranks import ROOT

pytestmark = pytest.mark.once


def test_each_file_is_a_text_and_all_together_are_one(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ROOT / "examples/tiny_moe/tokenizer.model")
    book, lines = tmp_path / "book.txt", tmp_path / "l[1].jsonl"
    book.write_text("It was a dark night. " * 400)
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")))
    other = tmp_path / "other"
    other.mkdir()
    (other / "book.md").write_text("Another.")
    given = GivenTexts([str(book), str(lines), str(other / "book.md")])
    names = (str(book), "l[1]", str(other / "book.md"))
    assert given.names == names and len(set(given.sha256().values())) == 3
    one, two = (tokenizer.encode(text) for text in ("one", "two"))
    ids = [*one, tokenizer.eod, *two, tokenizer.eod]
    assert given.tokens(tokenizer, "l[1]", 1000).tolist() == ids
    assert given.tokens(tokenizer, "l[1]", 1).tolist() == ids[: len(one) + 1]
    whole = given.tokens(tokenizer, ALL, 10**6)
    assert (whole == tokenizer.eod).sum() == 4 and len(whole) > len(tokenizer.encode(book.read_text()))
    some = given.tokens(tokenizer, names[0], 10)
    assert 10 < len(some) <= CHARACTERS_PER_TOKEN * 10
    assert np.array_equal(some[:-2], whole[: len(some) - 2])  # the last word may be cut
    assert np.array_equal(
        given.tokens(tokenizer, "bundled/stdlib", 50), bundled_tokens("bundled/stdlib", tokenizer, 50)
    )


def test_what_is_no_text_is_said(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ROOT / "examples/tiny_moe/tokenizer.model")
    with pytest.raises(ValueError, match=r"--text: absent.txt is no file"):
        GivenTexts(["absent.txt"])
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    given = GivenTexts([str(tmp_path / "b.txt")])
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        given.tokens(tokenizer, "b", 1)
    with pytest.raises(ValueError, match=r"'c' is no text; there are b, text, bundled/stdlib"):
        given.tokens(tokenizer, "c", 1)
