"""A small tokenizer.json, and the same merges as a tiktoken file, as a model folder of the hub holds them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

END = "<|endoftext|>"
OTHER = "<|other|>"


def write_tokenizer_json(folder: Path, documents: Iterable[str], pattern: str, vocab_size: int) -> Path:
    """Byte pairs over text cut by `pattern`; the two special tokens come last, as in Llama 3 and Qwen3."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(documents, trainer)
    made.add_special_tokens([END, OTHER])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END}}))
    return folder / "tokenizer.json"


def write_tiktoken(folder: Path, tokenizer_json: Path) -> Path:
    """The merges of a tokenizer.json as ranks, which are its ids; named and described as Hunyuan's."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads(tokenizer_json.read_text())["model"]["vocab"]
    lines = []
    for token, rank in sorted(vocabulary.items(), key=lambda item: item[1]):
        lines.append(base64.b64encode(bytes(to_byte[c] for c in token)).decode() + f" {rank}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hy.tiktoken").write_text("\n".join(lines) + "\n")
    added = {str(len(lines)): {"content": END}, str(len(lines) + 1): {"content": OTHER}}
    config = {"tokenizer_class": "HYTokenizer", "eos_token": END, "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "hy.tiktoken"
