"""Haystacks that need no prepared data: library code and generated biographies, for trying a model at once.

In: a name of BUNDLED, a tokenizer, how much text. Out: token ids laid out as held-out tokens are, each document with
its end token. The biographies are the same everywhere; the code is that of the running Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from megatron_lccp.data.people.facts import Language
from megatron_lccp.data.sources.generated import MOST, Biographies
from megatron_lccp.data.sources.stdlib import PythonStdlib
from megatron_lccp.data.tokenizers.base import Tokenizer


def _biographies(language: Language) -> Iterator[str]:
    # people of another seed than a run's own, and no questions, which would show how to answer
    return Biographies(count=MOST, questions_per_document=0, seed=2604, language=language).documents(0)


BUNDLED: dict[str, Callable[[], Iterator[str]]] = {
    "bundled/stdlib": lambda: PythonStdlib().documents(0),
    "bundled/biographies": lambda: _biographies("en"),
    "bundled/biographies_zh": lambda: _biographies("zh"),
}


def bundled_tokens(name: str, tokenizer: Tokenizer, at_least_tok: int) -> np.ndarray:
    """Ids of the first documents with `at_least_tok` tokens of text or more, end tokens not counted: [tokens], int32.

    Fewer if there are no more; only the library ends. More text begins with the same ids. Raises ValueError for an
    unknown name.
    """
    if name not in BUNDLED:
        raise ValueError(f"haystacks: {name!r} is none of {', '.join(BUNDLED)}")
    return joined_tokens(BUNDLED[name](), tokenizer, at_least_tok)


def joined_tokens(texts: Iterable[str], tokenizer: Tokenizer, at_least_tok: int) -> np.ndarray:
    """The same of any documents."""
    ids: list[int] = []
    for documents, text in enumerate(texts, start=1):
        ids += tokenizer.encode_document(text) + [tokenizer.eod]
        if len(ids) - documents >= at_least_tok:
            break
    return np.array(ids, dtype=np.int32)
