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

    def __init__(self, path: Path, sha256: str, vocab_size: int, eod: int):
        self.path, self.sha256 = path, sha256
        self.vocab_size = vocab_size
        """Ids are below this."""
        self.eod = eod
        """Id of the token after each document; text never encodes to it."""
        self.ordinary_size = vocab_size
        """Ids from FIRST_ORDINARY_ID on and below this are text's."""

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no begin or end token, nothing put in front."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; the end of a document is nothing, bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError
