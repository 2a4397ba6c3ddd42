"""Tokenizers of the model hub behind the project's interface: `tokenizers` files and tiktoken files.

In: `TokenizerFiles`. Out: a `Tokenizer`. No token is put around a text, and text that looks like a special token stays
text. The libraries come with the extra `convert`.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import json
import re
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from megatron_lccp.data.tokenizers.base import FIRST_ORDINARY_ID, Tokenizer
from megatron_lccp.data.tokenizers.files import HUNYUAN_SPECIAL, TokenizerFiles

LONG_BLANK = re.compile(r"(\s{20000})")
"""A longer run of white space is encoded in pieces: tiktoken's regular expressions overflow their stack on it."""


_STEPS = {"normalizer", "pre_tokenizer", "decoder", "normalizers", "pretokenizers", "decoders"}
"""Where a tokenizer.json has steps that may put a space in front: its parts, and what a sequence calls its own."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json."""

    def __init__(self, files: TokenizerFiles):
        tokenizers = _library("tokenizers", files)
        try:
            self._fast = tokenizers.Tokenizer.from_file(str(files.path))
        except Exception as error:  # the library raises nothing more exact
            raise ValueError(f"{files.path}: is not a tokenizer.json: {' '.join(str(error).split())}") from error
        tree = json.loads(self._fast.to_str())
        within = _without_prefix(tree)
        self._within = self._fast if within == tree else tokenizers.Tokenizer.from_str(json.dumps(within))
        for fast in (self._fast, self._within):
            fast.encode_special_tokens = True  # as ordinary text
            fast.no_padding()
            fast.no_truncation()
        added = self._fast.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        self._vocabulary = self._fast.get_vocab(with_added_tokens=True)
        size, end = max(self._vocabulary.values()) + 1, _end_id(files, self._vocabulary)
        super().__init__(files.path, files.sha256, size, end)
        self.ordinary_size = _ordinary_size(special.values(), self.vocab_size)
        self._files = files

    def encode(self, text: str) -> list[int]:
        return self._within.encode(text, add_special_tokens=False).ids

    def encode_document(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode_document` of each text; the library chooses its threads itself (RAYON_NUM_THREADS)."""
        return [found.ids for found in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._within.decode([int(i) for i in ids], skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        return self._vocabulary.get(token)

    def own_begin(self) -> list[int]:
        """The tokens that its template puts before a text, as transformers has it; or what add_bos_token beside it says."""
        found = self._fast.encode("a")
        return found.ids[: found.special_tokens_mask.index(0)] or _named_begin(self, self._files)


class TiktokenTokenizer(Tokenizer):
    """A file of base64-encoded byte sequences and their ranks."""

    def __init__(self, files: TokenizerFiles):
        tiktoken = _library("tiktoken", files)
        ranks = _ranks(files)
        special = files.special or {token: len(ranks) + n for n, token in enumerate(HUNYUAN_SPECIAL)}
        if both := sorted(set(special.values()) & set(ranks.values())):
            raise ValueError(f"{files.path}: id {both[0]} is a rank of the file and a special token")
        try:
            self._encoding = tiktoken.Encoding(
                files.path.name, pat_str=files.pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except ValueError as error:
            raise ValueError(f"{files.path}: cannot be used: {' '.join(str(error).split())}") from error
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._known = {token.decode(errors="replace"): rank for token, rank in ranks.items()} | special
        self._files = files
        super().__init__(files.path, files.sha256, self._encoding.n_vocab, _end_id(files, self._known))
        self.ordinary_size = _ordinary_size(special.values(), self.vocab_size)

    def encode(self, text: str) -> list[int]:
        return [i for part in LONG_BLANK.split(text) for i in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        if any(LONG_BLANK.search(text) for text in texts):
            return [self.encode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode(errors="replace")

    def id_of(self, token: str) -> int | None:
        return self._known.get(token)

    def own_begin(self) -> list[int]:
        """What add_bos_token beside it says; the file itself adds nothing."""
        return _named_begin(self, self._files)


def _without_prefix(tree: Any) -> Any:
    """The tree of a tokenizer.json that puts no space before a text, and takes none away when it decodes; the same tree
    if it never did. Steps that stand in no sequence become None."""
    if isinstance(tree, list):
        return [step for step in map(_without_prefix, tree) if step is not None]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get("type")
    if kind == "Prepend" or (kind == "Strip" and tree.get("start") and "content" in tree):
        return {**tree, "start": 0} if kind == "Strip" and tree.get("stop") else None
    if kind == "Metaspace":
        return {**tree, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**tree, "add_prefix_space": False}
    steps = {name: _without_prefix(tree[name]) for name in _STEPS & tree.keys()}
    return {**tree, **steps}


def _named_begin(tokenizer: Tokenizer, files: TokenizerFiles) -> list[int]:
    """The begin token that is named beside the file, if it is said that one is added."""
    if not files.begins or files.begin is None:
        return []
    number = tokenizer.id_of(files.begin)
    return [] if number is None else [number]


def _library(name: str, files: TokenizerFiles) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{files.path}: needs the package {name}; pip install 'megatron_lccp[convert]'") from error


def _ranks(files: TokenizerFiles) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(files.path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{files.path}: line {number} is no base64 sequence and rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{files.path}: its ranks are not 0 to {len(ranks) - 1}, each once")
    return ranks


def _end_id(files: TokenizerFiles, vocabulary: dict[str, int]) -> int:
    if isinstance(files.end, int):
        return files.end
    if files.end not in vocabulary:
        raise ValueError(f"{files.path}: has no token {files.end!r} to end documents; see data.tokenizer.end_token")
    return vocabulary[files.end]


def _ordinary_size(special: Iterable[int], vocab_size: int) -> int:
    return min((number for number in special if number > FIRST_ORDINARY_ID), default=vocab_size)
