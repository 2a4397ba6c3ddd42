"""Sentencepiece models as a Tokenizer: those trained here, and those of Llama 2, Mistral v0.1 and their kin."""

from __future__ import annotations

from collections.abc import Sequence

import sentencepiece

from megatron_lccp.data.tokenizers.base import EOD_PIECE, SPACE_MARK, Tokenizer
from megatron_lccp.data.tokenizers.files import TokenizerFiles

NO_DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 0])
"""Behind a model: normalizer_spec { add_dummy_prefix: false }, as field 3 of ModelProto and field 3 of NormalizerSpec
(sentencepiece_model.proto). Of a field that comes twice the last counts, so all else stays as the model has it."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model."""

    def __init__(self, files: TokenizerFiles):
        self._begins = files.begins
        try:
            model = files.path.read_bytes() or b"empty"  # an empty model is no error to sentencepiece
            self._own = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(f"{files.path}: is not a sentencepiece model") from error
        self._space_mark_ids = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        super().__init__(files.path, files.sha256, self._pieces.vocab_size(), self._end(files))

    def _end(self, files: TokenizerFiles) -> int:
        """The piece that was named, or <eod>, or the model's own end of a sentence."""
        if files.end is None:
            found = [self._pieces.piece_to_id(EOD_PIECE), self._pieces.eos_id()]
            if ends := [number for number in found if number >= 0 and self._pieces.is_control(number)]:
                return ends[0]
            raise ValueError(
                f"{files.path}: has neither {EOD_PIECE} nor a piece of its own to end documents with; name a control "
                "piece with data.tokenizer.end_token"
            )
        number = self.id_of(str(files.end))
        if number is None or not self._pieces.is_control(number):
            raise ValueError(
                f"{files.path}: has no control piece {files.end!r} to end documents; see data.tokenizer.end_token"
            )
        return number

    def encode(self, text: str) -> list[int]:
        return self._joined(self._pieces, text)

    def encode_document(self, text: str) -> list[int]:
        return self._joined(self._own, text)

    def _joined(self, first_pieces: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
        first, *rest = text.split(SPACE_MARK)
        ids = first_pieces.encode(first)
        for part in rest:
            ids += self._space_mark_ids + self._pieces.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        ids = self._own.encode(list(texts), num_threads=threads)
        return [self.encode_document(text) if SPACE_MARK in text else own for text, own in zip(texts, ids)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._pieces.decode([int(i) for i in ids])

    def id_of(self, token: str) -> int | None:
        number = self._pieces.piece_to_id(token)
        return number if self._pieces.id_to_piece(number) == token else None

    def own_begin(self) -> list[int]:
        """The model's begin of a sentence, unless tokenizer_config.json beside it says that none is added."""
        number = self._pieces.bos_id()
        return [number] if number >= 0 and self._begins is not False else []
