"""Text <-> token ids.

In: the files of a tokenizer (sentencepiece, Hugging Face's `tokenizers`, tiktoken), or documents to train one on. Out:
a `Tokenizer` that gives text back, exactly or, where its files say so (Qwen's: NFC), up to Unicode normalisation. One
that puts a space before every text (Llama 2, Mistral v0.1) does so for documents alone, whose text has it then.
Trained here, by sentencepiece: byte-pair pieces over unchanged text, no dummy prefix, bytes for unknown characters,
single digits, and a line break that is always its own token. So the ids of a text are the ids of its parts wherever a
part begins with a space or a line break, which is what lets needle samples be built from ids.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_lccp.config.tree import TokenizerConfig
from megatron_lccp.data.tokenizers.base import EOD_PIECE, SPACE_MARK, Tokenizer
from megatron_lccp.data.tokenizers.files import TokenizerFiles, find_tokenizer
from megatron_lccp.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megatron_lccp.files import write_whole

TRAINING_BYTES = 6_000_000
TRAINING_BYTES_PER_DOCUMENT = 100_000
# Text that decoding has to give back; no character in it is one that Unicode normalisation (NFC) would change.
PROBE = " a  b\n\tc 10 \u2581\u00e9\u65e5"


def load_tokenizer(path: str | Path, end_token: str | None = None, bos: str = "none") -> Tokenizer:
    """Read a sentencepiece model, a tokenizer.json, a tiktoken file, or a folder with one of them.

    `end_token` ends documents in place of the one that the files name; `bos` is as in data.tokenizer.bos. Raises
    ValueError if the file is missing or damaged, if the tokenizer changes text by more than Unicode normalisation and a
    space in front of documents, or if there are no such tokens.
    """
    files = find_tokenizer(path, end_token)
    if files.kind == "sentencepiece":
        tokenizer: Tokenizer = SentencePieceTokenizer(files)
    else:
        from megatron_lccp.data.tokenizers import hub  # its libraries need not be installed

        kinds = {"huggingface": hub.HuggingFaceTokenizer, "tiktoken": hub.TiktokenTokenizer}
        tokenizer = kinds[files.kind](files)
    if not 0 <= tokenizer.eod < tokenizer.vocab_size:
        raise ValueError(f"{files.path}: ends documents with {tokenizer.eod}, has ids 0 to {tokenizer.vocab_size - 1}")
    if isinstance(files.end, str) and tokenizer.eod in tokenizer.encode(f"a{files.end}a"):
        raise ValueError(f"{files.path}: {files.end!r} in a text would end the document; it should be a special token")
    within, document = (tokenizer.decode(encode(PROBE)) for encode in (tokenizer.encode, tokenizer.encode_document))
    if not (_same(within, PROBE) and (_same(document, PROBE) or _same(document, f" {PROBE}"))):
        raise ValueError(
            f"{files.path}: does not give text back unchanged; it should have identity normalisation, no whitespace "
            "removal and byte fallback"
        )
    tokenizer.bos = _begin(tokenizer, files, bos)
    return tokenizer


def configured_tokenizer(given: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a configuration; raises as `load_tokenizer`."""
    return load_tokenizer(given.path, given.end_token, given.bos)


def _same(found: str, text: str) -> bool:
    """Whether a text came back. Layouts of Llama 2 write a space as SPACE_MARK, and give both back as a space."""
    return found.replace(SPACE_MARK, " ") == text.replace(SPACE_MARK, " ")


def _begin(tokenizer: Tokenizer, files: TokenizerFiles, bos: str) -> int | None:
    """Id of the token that `bos` means: none, eod, auto or a token's text."""
    if bos == "none":
        return None
    if bos == "eod":
        return tokenizer.eod
    if bos == "auto":
        own = tokenizer.own_begin()
        if len(own) > 1:
            raise ValueError(f"{files.path}: begins a text with {len(own)} tokens; name one with data.tokenizer.bos")
        return own[0] if own else tokenizer.eod
    number = tokenizer.id_of(bos)
    if number is None:
        raise ValueError(f"{files.path}: has no token {bos!r} to begin with; see data.tokenizer.bos")
    if number in tokenizer.encode(f"a{bos}a"):
        raise ValueError(f"{files.path}: {bos!r} is a token of text; data.tokenizer.bos should be a special token")
    return number


class ForeignTokenizer:
    """A tokenizer of another library behind the few things that samples need."""

    bos: int | None = None
    """Id of the token that a sequence to be measured begins with; None: it begins with its text."""

    def __init__(self, encode: Callable, decode: Callable, eod: int, vocab_size: int):
        self._encode, self._decode, self.eod, self.vocab_size = encode, decode, eod, vocab_size

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return [int(i) for i in self._encode(text)]

    encode_document = encode

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""
        return self._decode([int(i) for i in ids])


def as_tokenizer(given: Any, bos: str = "none") -> Tokenizer | ForeignTokenizer:
    """A path as `load_tokenizer` takes it, one of our tokenizers, Hugging Face's or Megatron's, as samples use it.

    `bos` as in data.tokenizer.bos; one of ours has its own already. Raises ValueError for anything else, and for one
    that has no end token or puts tokens of its own around a text.
    """
    if isinstance(given, (str, Path)):
        return load_tokenizer(given, bos=bos)
    if isinstance(given, (Tokenizer, ForeignTokenizer)):
        return given
    if hasattr(given, "eos_token_id") and hasattr(given, "encode"):  # transformers
        encode = partial(given.encode, add_special_tokens=False)
        decode = partial(given.decode, clean_up_tokenization_spaces=False)
        found = ForeignTokenizer(encode, decode, given.eos_token_id, len(given))
    elif hasattr(given, "tokenize") and hasattr(given, "eod"):  # Megatron
        found = ForeignTokenizer(given.tokenize, given.detokenize, given.eod, given.vocab_size)
    else:
        raise ValueError(
            f"tokenizer: {type(given).__name__} is neither a path nor an object with encode and eos_token_id (Hugging "
            "Face) or tokenize and eod (Megatron)"
        )
    if found.eod is None:
        raise ValueError(f"tokenizer: {type(given).__name__} has no end token (eos_token_id or eod); set one")
    # twice, for a space that is put in front of a text is taken from the front of what is decoded
    if found.decode(2 * found.encode("\nA b.")) != 2 * "\nA b.":
        raise ValueError(
            f"tokenizer: {type(given).__name__} does not give text back unchanged; turn off what it adds around a text "
            "(a begin token, a space in front), or give the path of its files, of which that is known"
        )
    found.bos = _foreign_begin(given, found, bos)
    return found


def _foreign_begin(given: Any, found: ForeignTokenizer, bos: str) -> int | None:
    """`_begin` for a tokenizer of another library."""
    if bos == "none":
        return None
    if bos == "eod":
        return found.eod
    if hasattr(given, "convert_tokens_to_ids"):  # transformers
        if bos == "auto":
            ids, own = given.encode("a"), found.encode("a")
            added = ids[: next(at for at in range(len(ids)) if ids[at : at + len(own)] == own)]
        else:
            added = [] if (number := given.get_vocab().get(bos)) is None else [number]
    else:
        number = None
        with contextlib.suppress(NotImplementedError):  # so do Megatron's tokenizers say that they have none
            number = getattr(given, "bos", None)
        added = [number] if bos == "auto" and isinstance(number, int) and number >= 0 else []
    if len(added) == 1:
        return int(added[0])
    if added or bos != "auto":
        raise ValueError(f"tokenizer: {type(given).__name__} has no one token that bos={bos!r} means; give eod or none")
    return found.eod


def train_tokenizer(path: str | Path, documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train on the first TRAINING_BYTES of the documents and write `path`, whole or not at all.

    `vocab_size` counts all pieces. The same documents give the same file. Raises ValueError where the documents are too
    few for the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_training_lines(documents)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            required_chars=SPACE_MARK,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=[EOD_PIECE],
            user_defined_symbols=["\n"],
            max_sentence_length=TRAINING_BYTES_PER_DOCUMENT,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data.tokenizer.vocab_size: {vocab_size} pieces cannot be trained: {reason}") from error
    path = Path(path)
    write_whole(path, lambda draft: draft.write_bytes(model.getvalue()))
    return load_tokenizer(path)


def _training_lines(documents: Iterable[str]) -> list[str]:
    """Lines of the first documents; a long document gives its beginning only, so that it does not crowd out others."""
    lines: list[str] = []
    room = TRAINING_BYTES
    for document in documents:
        text = document.encode()[: min(TRAINING_BYTES_PER_DOCUMENT, room)].decode(errors="ignore")
        # sentencepiece leaves out lines with a NUL, and would take the space mark for a space
        lines += [line for line in text.replace("\0", "").replace(SPACE_MARK, "").split("\n") if line.strip()]
        room -= len(text.encode())
        if room <= 0:
            break
    return lines
