"""Documents that are made here: biographies with questions, and segments that come back.

In: the fields of a source. Out: text or token ids, the same every time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_lccp.config.tree import Source
from megatron_lccp.data.people.facts import (
    ATTRIBUTES,
    WORDS,
    Fact,
    Language,
    Style,
    draw_name,
    person_fact,
    question_text,
)
from megatron_lccp.data.tokenizers.base import FIRST_ORDINARY_ID

MOST = 1_000_000_000
"""Documents, or tokens of one; with more a preparation would not end."""


def require_counts(**counts: tuple[int, int]) -> None:
    """ValueError for a field whose number, the first of each pair, is less than the second, or more than MOST."""
    for field, (number, least) in counts.items():
        if not least <= number <= MOST:
            raise ValueError(f"{field}: should be {least} to {MOST:,}, is {number:,}")


@dataclass(frozen=True)
class Biographies(Source):
    """Documents of short biographies of invented people, and questions whose answers repeat a sentence of them.

    A person is a paragraph: an opening sentence, then one sentence for each attribute in a drawn order. A question
    about a person of the document is `Question: What is the hobby of NAME?` and, on the next line, `Answer: ` with the
    very sentence. No name is one that a needle uses.
    """

    count: int = 1000
    """How many documents."""
    people_per_document: int = 10
    """Biographies in one document, about 110 tokens each."""
    questions_per_document: int = 4
    """Questions in one document."""
    questions_at: Literal["end", "anywhere"] = "end"
    """end: after the last biography. anywhere: each after a drawn biography, about a person before it."""
    seed: int = 0
    """Another seed gives other people."""
    language: Language = "en"
    """en: English. zh: Chinese."""
    style: Style = "standard"
    """standard: one sentence per attribute. paraphrase: one of several. pronoun: people speak of themselves."""

    def __post_init__(self) -> None:
        require_counts(count=(self.count, 1), people_per_document=(self.people_per_document, 1),
                       questions_per_document=(self.questions_per_document, 0))  # fmt: skip

    def documents(self, vocab_size: int) -> Iterator[str]:
        for index in range(self.count):
            yield self._document(random.Random(f"biographies/{self.seed}/{index}"))

    def _document(self, rng: random.Random) -> str:
        words = WORDS[self.language]
        people: dict[str, list[Fact]] = {}
        while len(people) < self.people_per_document:
            name = draw_name(rng, False, self.language)
            attributes = rng.sample(ATTRIBUTES, len(ATTRIBUTES))
            people[name] = [
                person_fact(name, attribute, rng, self.language, self.style, turn=len(people) + place)
                for place, attribute in enumerate(attributes)
            ]
        asked: dict[int, list[Fact]] = {}
        last = len(people) - 1
        for _ in range(self.questions_per_document):
            after = last if self.questions_at == "end" else rng.randint(0, last)
            asked.setdefault(after, []).append(rng.choice(list(people.values())[rng.randint(0, after)]))
        text = ""
        for index, (name, facts) in enumerate(people.items()):
            text += "\n" if text else ""
            text += words.SPACE.join([words.OPENING.format(name=name)] + [fact.sentence for fact in facts])
            text += "".join(question_text(fact) + words.SPACE + fact.sentence for fact in asked.get(index, []))
        return text + "\n"


@dataclass(frozen=True)
class RepeatedSegments(Source):
    """Token ids: random segments that come back within the document, which teach a model to copy (induction).

    Each segment is new or one of the document's earlier ones; with few new ones almost every token can be copied.
    """

    count: int = 200
    """How many documents."""
    length_tok: int = 4096
    """Tokens of a document, without the end token."""
    segment_tok_min: int = 8
    """Tokens of the shortest segment."""
    segment_tok_max: int = 64
    """Tokens of the longest segment."""
    new_share: float = 0.5
    """Chance of a segment to be new; the first of a document always is."""
    first_id: int = FIRST_ORDINARY_ID
    """Ids from this on are drawn; the default leaves out special tokens and bytes of a tokenizer trained here."""
    seed: int = 0
    """Another seed gives other segments."""

    def __post_init__(self) -> None:
        require_counts(count=(self.count, 1), length_tok=(self.length_tok, 1), first_id=(self.first_id, 0))

    def documents(self, vocab_size: int) -> Iterator[list[int]]:
        if not 0 < self.segment_tok_min <= self.segment_tok_max:
            raise ValueError(f"RepeatedSegments.segment_tok_min: {self.segment_tok_min} should be 1..segment_tok_max")
        if self.first_id >= vocab_size:
            raise ValueError(f"RepeatedSegments.first_id: {self.first_id} leaves nothing of {vocab_size} ids")
        for index in range(self.count):
            rng = np.random.default_rng([self.seed, index])
            segments: list[np.ndarray] = []
            order: list[np.ndarray] = []
            length = 0
            while length < self.length_tok:
                if not segments or rng.random() < self.new_share:
                    size = int(rng.integers(self.segment_tok_min, self.segment_tok_max + 1))
                    segments.append(rng.integers(self.first_id, vocab_size, size))
                    order.append(segments[-1])
                else:
                    order.append(segments[int(rng.integers(len(segments)))])
                length += len(order[-1])
            yield np.concatenate(order)[: self.length_tok].tolist()
