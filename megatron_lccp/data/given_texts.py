"""Texts that a command is given as files, beside those that come with the package.

In: paths of UTF-8 text, JSON lines or .jsonl.gz. Out: token ids by the name of a text.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from megatron_lccp.config.tree import Source
from megatron_lccp.data.haystacks import BUNDLED, bundled_tokens, joined_tokens
from megatron_lccp.data.sources.files import JsonLines, TextFiles
from megatron_lccp.data.tokenizers.base import Tokenizer
from megatron_lccp.files import file_sha256

ALL = "text"
"""Name of all files together, one after another: where needles are hidden."""
CHARACTERS_PER_TOKEN = 16
"""More than any text has: of a long document no more is encoded than is asked for."""


class GivenTexts:
    """Each file is a text by its name without the ending, or by its path where two have the same."""

    def __init__(self, paths: Sequence[str]):
        """Raises ValueError for a path that is no file."""
        if absent := [path for path in paths if not Path(path).is_file()]:
            raise ValueError(f"--text: {absent[0]} is no file; name UTF-8 text, or JSON lines with a field `text`")
        stems = [Path(path).name.partition(".")[0] or path for path in paths]
        count = Counter([*stems, ALL])
        names = [stem if count[stem] == 1 else path for stem, path in zip(stems, paths)]
        self.paths = dict(zip(names, paths))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the files."""
        return tuple(self.paths)

    def sha256(self) -> dict[str, str]:
        """Of each file, by its text's name."""
        return {name: file_sha256(Path(path)) for name, path in self.paths.items()}

    def tokens(self, tokenizer: Tokenizer, name: str, at_least_tok: int) -> np.ndarray:
        """Ids of a text, each document with its end token: at least so many if it has them. [tokens], int32.

        Raises ValueError for a name that is neither a file's, nor all of them, nor bundled, and for what is no text.
        """
        if name in BUNDLED:
            return bundled_tokens(name, tokenizer, at_least_tok)
        if name in self.paths:
            chosen = [self.paths[name]]
        elif name == ALL and self.paths:
            chosen = list(self.paths.values())
        else:
            known = [*self.paths, *[ALL] * bool(self.paths), *BUNDLED]
            raise ValueError(f"{name!r} is no text; there are {', '.join(known)}; give files by --text")
        most = CHARACTERS_PER_TOKEN * at_least_tok
        texts = (text[:most] for text in chain.from_iterable(map(_documents, chosen)))
        return joined_tokens(texts, tokenizer, at_least_tok)


def _documents(path: str) -> Iterator[str]:
    lines = path.endswith((".jsonl", ".jsonl.gz"))
    source: Source = (JsonLines if lines else TextFiles)(glob=glob.escape(path))
    yield from (str(text) for text in source.documents(0))
