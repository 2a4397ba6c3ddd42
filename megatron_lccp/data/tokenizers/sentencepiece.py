"""Sentencepiece models as a Tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import sentencepiece

from megatron_lccp.data.tokenizers.base import EOD_PIECE, SPACE_MARK, Tokenizer
from megatron_lccp.data.tokenizers.files import TokenizerFiles


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model."""

    def __init__(self, files: TokenizerFiles):
        try:
            model = files.path.read_bytes() or b"empty"  # an empty model is no error to sentencepiece
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{files.path}: is not a sentencepiece model") from error
        self._space_mark_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        eod = self._pieces.piece_to_id(EOD_PIECE)
        if not self._pieces.is_control(eod):
            raise ValueError(f"{files.path}: has no control piece {EOD_PIECE} to end documents with")
        super().__init__(files.path, files.sha256, self._pieces.vocab_size(), eod)

    def encode(self, text: str) -> list[int]:
        first, *rest = text.split(SPACE_MARK)
        ids = self._pieces.encode(first)
        for part in rest:
            ids += self._space_mark_ids + self._pieces.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        ids = self._pieces.encode(list(texts), num_threads=threads)
        return [self.encode(text) if SPACE_MARK in text else own for text, own in zip(texts, ids)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.decode([int(i) for i in ids])
