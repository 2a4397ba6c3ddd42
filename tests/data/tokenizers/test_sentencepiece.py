"""The tokenizer gives any text back, and a text's ids are the ids of its parts at spaces and line breaks."""

import re

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lccp.data.tokenizers.base import FIRST_ORDINARY_ID
from megatron_lccp.data.tokenizers.load import load_tokenizer, train_tokenizer

# letters of several scripts, sentencepiece's own marks, control characters, and strings that look like its pieces
NASTY = st.sampled_from(
    ["\u2581", "\u2581\u2581", "\u2585", "\u2047", "\ufffd", "\0", "<eod>", "<unk>", "<0x0A>", "\r\n", "\t", "    "]
    + ["\n\n", "\u00e9", "\u65e5\u672c", "\U0001f600", "e\u0301", "\ufeff", "123", "a"]
)


@settings(max_examples=300, deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.lists(NASTY, max_size=12).map("".join)))
def test_any_text_comes_back_and_never_holds_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(isinstance(i, int) and 1 < i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch([text, "x"], threads=2) == [ids, tokenizer.encode("x")]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab1.:_\n \u00e9", max_size=40))
def test_ids_of_a_text_are_the_ids_of_its_parts(tokenizer, text):
    parts = re.findall(r"\n| *[^ \n]*", text)
    assert "".join(parts) == text
    assert tokenizer.encode(text) == [i for part in parts for i in tokenizer.encode(part)]


def test_words_are_pieces_and_line_breaks_are_a_token_of_their_own(tokenizer):
    assert len(tokenizer.encode("        return self")) <= 3
    assert tokenizer.encode("\n\n") == [2, 2] and tokenizer.eod == 1
    assert tokenizer.decode(range(FIRST_ORDINARY_ID - 2, FIRST_ORDINARY_ID)) == "\ufffd\ufffd"  # the last two bytes
    assert tokenizer.decode([FIRST_ORDINARY_ID]).isascii()


def test_training_is_repeatable_and_whole(tmp_path):
    documents = [f"def function_{i}(value):\n    return value * {i} + 299 - 299\n" for i in range(300)]
    first = train_tokenizer(tmp_path / "deep" / "a.model", documents, 330)
    second = train_tokenizer(tmp_path / "b.model", documents, 330)
    assert len(first.encode(" 299")) == 4 and len(first.encode("return")) == 1
    assert first.sha256 == second.sha256 and first.vocab_size == 330 and first.eod == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.model"]
    with pytest.raises(ValueError, match="data.tokenizer.vocab_size: 50000 pieces"):
        train_tokenizer(tmp_path / "c.model", documents, 50_000)
    assert not (tmp_path / "c.model").exists()


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="missing.model: the tokenizer cannot be read: No such file"):
        load_tokenizer(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(ValueError, match="text.model: is not a sentencepiece model"):
        load_tokenizer(tmp_path / "text.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(ValueError, match="empty.model: is not a sentencepiece model"):
        load_tokenizer(tmp_path / "empty.model")


@pytest.mark.parametrize(
    "options, problem",
    [
        ({"eos_id": -1}, "has neither <eod> nor a piece of its own to end documents with"),
        ({}, "does not give text back unchanged"),
        ({"control_symbols": ["<eod>"]}, "does not give text back unchanged"),
    ],
)
def test_a_model_that_changes_text_is_refused(tmp_path, options, problem):
    with open(tmp_path / "plain.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([f"some words {chr(97 + i % 26)}{i}" for i in range(500)]),
            model_writer=file, model_type="bpe", vocab_size=60, minloglevel=2, **options,
        )  # fmt: skip
    with pytest.raises(ValueError, match=problem):
        load_tokenizer(tmp_path / "plain.model")
