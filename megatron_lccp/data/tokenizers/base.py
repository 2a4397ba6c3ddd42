"""What a tokenizer is here, and the ids and pieces that all of them agree on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

# The ids below are <unk>, <eod>, the line break and the 256 bytes in a tokenizer trained here.
FIRST_ORDINARY_ID = 259
EOD_PIECE = "<eod>"
# sentencepiece writes a space as this character and would read the character back as a space.
SPACE_MARK = "\u2581"


class Tokenizer:
    """Text <-> token ids, as the project uses it; made by `load_tokenizer`."""

    bos: int | None = None
    """Id of the token that a sequence to be measured begins with; None: it begins with its text."""

    def __init__(self, path: Path, sha256: str, vocab_size: int, eod: int):
        self.path, self.sha256 = path, sha256
        self.vocab_size = vocab_size
        """Ids are below this."""
        self.eod = eod
        """Id of the token after each document; text never encodes to it."""
        self.ordinary_size = vocab_size
        """Ids from FIRST_ORDINARY_ID on and below this are text's."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it stands within a longer one: no begin or end token, no space put in front.

        So texts that are put together from ids read as they would in one piece.
        """
        raise NotImplementedError

    def encode_document(self, text: str) -> list[int]:
        """Ids of the text as the tokenizer itself encodes it, which may put a space in front; no begin or end token."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode_document` of each text, on several threads."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; the end of a document is nothing, bytes that are not UTF-8 become U+FFFD.

        What `encode` made of a text comes back as it was, and of `encode_document` with the space in front.
        """
        raise NotImplementedError

    def id_of(self, token: str) -> int | None:
        """Id of a token by its own text, special ones too; None if there is none."""
        raise NotImplementedError

    def own_begin(self) -> list[int]:
        """Ids that the tokenizer itself puts before a text, as its files say; mostly one or none."""
        return []
