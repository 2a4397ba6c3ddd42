"""Which files a tokenizer is made of, and what they say without the library that reads them.

In: a path, as `data.tokenizer.path` gives it. Out: `TokenizerFiles`: the kind, the special tokens and the token that
ends documents, from the JSON files that Hugging Face keeps beside a tokenizer, and one SHA-256 over all of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_lccp.files import is_device

# How text is cut before byte pairs are merged: no tiktoken file says it, the class in tokenizer_config.json does.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SINGLE_DIGITS, THREE_DIGITS = rf"{_WORDS}\p{{N}}{_REST}", rf"{_WORDS}\p{{N}}{{1,3}}{_REST}"
PATTERNS = {"HYTokenizer": SINGLE_DIGITS, "QWenTokenizer": SINGLE_DIGITS, "PreTrainedTokenizerFast": THREE_DIGITS}
# Hunyuan's special tokens follow its ranks in this order; 127957 ranks make the 128167 tokens of its config.json.
HUNYUAN_SPECIAL = ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>") + tuple(
    f"<|extra_{n}|>" for n in range(205)
)

Kind = Literal["sentencepiece", "huggingface", "tiktoken"]


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer on disk."""

    kind: Kind
    path: Path
    """The file with the vocabulary."""
    sha256: str
    """Of the file, the end token and what is used of those beside it; of a sentencepiece model whose own end token is
    taken, of the file alone. The begin token is no part of it: it makes no other ids of a text."""
    end: str | int | None = None
    """The token that ends documents, by text or id; None: a sentencepiece model names its own."""
    begins: bool | None = None
    """Whether tokenizer_config.json says that a begin token is added; None: it says nothing."""
    begin: str | None = None
    """The begin token that is named beside it."""
    special: dict[str, int] = field(default_factory=dict)
    """Special tokens of a tiktoken file; empty if they follow its ranks as Hunyuan's do."""
    pattern: str | None = None
    """How a tiktoken file's text is cut."""


def find_tokenizer(path: str | Path, end_token: str | None = None) -> TokenizerFiles:
    """What a sentencepiece model, a tokenizer.json, a tiktoken file, or a folder with one of them is.

    `end_token` takes the place of the files' eos_token, and of a sentencepiece model's own end. Raises ValueError for a
    path that is none of these, and for files that do not say what is needed.
    """
    path = _main_file(Path(path))
    if is_device(path):
        raise ValueError(f"{path}: the tokenizer cannot be read: is a device or a pipe; name a file")
    kind: Kind
    special: dict[str, int]
    pattern: str | None
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with path.open("rb") as stream:
            first = stream.readline(200)
    except OSError as error:
        raise ValueError(f"{path}: the tokenizer cannot be read: {error.strerror}") from error
    if path.suffix == ".json":
        kind, special, pattern = "huggingface", {}, None
    elif path.suffix == ".tiktoken" or re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\r?\n?", first):
        kind, (special, pattern) = "tiktoken", _tiktoken_extras(path)
    else:
        if end_token is not None:
            digest = hashlib.sha256(json.dumps([digest, end_token]).encode()).hexdigest()
        return TokenizerFiles("sentencepiece", path, digest, end_token, *_begin_token(path))
    end = end_token if end_token is not None else _end_token(path)
    everything = hashlib.sha256(json.dumps([digest, end, sorted(special.items()), pattern]).encode()).hexdigest()
    return TokenizerFiles(kind, path, everything, end, *_begin_token(path), special=special, pattern=pattern)


def _main_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for pattern in ("tokenizer.json", "*.tiktoken", "tokenizer.model"):
        if len(found := sorted(path.glob(pattern))) == 1:
            return found[0]
    raise ValueError(f"{path}: expected a tokenizer.json, one *.tiktoken or a tokenizer.model in it")


def _beside(path: Path, name: str) -> dict[str, Any]:
    """A JSON file in the tokenizer's folder; empty if it is not there."""
    file = path.with_name(name)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: is no object of JSON")
    return found


def _special_token(path: Path, role: str) -> str | None:
    """The token that a file beside it names for a role such as eos_token."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _beside(path, name).get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def _begin_token(path: Path) -> tuple[bool | None, str | None]:
    """(is one added, which)."""
    added = _beside(path, "tokenizer_config.json").get("add_bos_token")
    return added if isinstance(added, bool) else None, _special_token(path, "bos_token")


def _end_token(path: Path) -> str | int:
    if (token := _special_token(path, "eos_token")) is not None:
        return token
    for name in ("config.json", "generation_config.json"):
        number = _beside(path, name).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            return number
    raise ValueError(f"{path}: no file beside it has an eos_token; name one with data.tokenizer.end_token")


def _tiktoken_extras(path: Path) -> tuple[dict[str, int], str]:
    """(special tokens, pattern)."""
    config = _beside(path, "tokenizer_config.json")
    name = config.get("tokenizer_class", "HYTokenizer" if path.name == "hy.tiktoken" else None)
    pattern = config.get("pat_str", PATTERNS.get(str(name)))
    if not isinstance(pattern, str):
        raise ValueError(
            f"{path}: how it cuts text is not known: tokenizer_class in tokenizer_config.json beside it is {name!r}, "
            f"not one of {', '.join(PATTERNS)}; give its regular expression there as pat_str"
        )
    try:
        added = {token["content"]: int(number) for number, token in config.get("added_tokens_decoder", {}).items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path.with_name('tokenizer_config.json')}: added_tokens_decoder: {error!r}") from error
    if not added and name != "HYTokenizer":
        raise ValueError(f"{path}: tokenizer_config.json beside it has no added_tokens_decoder, the special tokens")
    return added, pattern
