"""Facts about invented people and places: what biographies teach and what needles hide.

In: a seeded `random.Random`. Out: `Fact`s, each one sentence and the question it answers; the answer repeats the
sentence word for word. Names come in two disjoint sets (`reserved`): training biographies use no name of a needle.
Words and sentences are in `names` (English) and `names_zh` (Chinese), which hold the same tables.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from string import Formatter
from types import ModuleType
from typing import Literal

from megatron_lccp.data.people import chinese, english

# Of all combinations of the parts of a name, one in this many is kept for needles.
RESERVED_ONE_IN = 8

Language = Literal["en", "zh"]
Style = Literal["standard", "paraphrase", "pronoun"]
WORDS: dict[Language, ModuleType] = {"en": english, "zh": chinese}
ATTRIBUTES = tuple(english.STANDARD)


@dataclass(frozen=True)
class Fact:
    """A sentence with two slots, {name} and {value}, and the question it answers, with the slot {name}."""

    kind: str
    """Attribute of the person, or kind of the single fact."""
    template: str
    """The sentence; in the style `pronoun` who says it, too."""
    question_template: str
    """The question, the same for all templates of a kind."""
    name: str
    """Who or where."""
    value: str
    """What is asked for."""
    language: Language = "en"
    """Language of all of it."""

    @property
    def sentence(self) -> str:
        return self.template.format(name=self.name, value=self.value)

    @property
    def question(self) -> str:
        return self.question_template.format(name=self.name)

    def parts(self) -> list[tuple[str, bool]]:
        """(text, is it a slot) in order, joined SPACE + sentence. A space begins a part, as it begins a token."""
        parts: list[tuple[str, bool]] = []
        space = WORDS[self.language].SPACE
        for literal, slot, _, _ in Formatter().parse(self.template):
            text = space + literal
            space = " " if slot and text.endswith(" ") else ""
            parts.append((text[:-1] if space else text, False))
            if slot:
                parts.append((space + getattr(self, slot), True))
                space = ""
        return [part for part in parts if part[0]]


def question_text(fact: Fact) -> str:
    """What stands before the answer, in training and in needle samples alike."""
    return WORDS[fact.language].QUESTION.format(question=fact.question)


def null_question_text(language: Language) -> str:
    """A question that asks nothing: what attention to a needle is compared with."""
    return WORDS[language].QUESTION.format(question=WORDS[language].NO_QUESTION)


def draw_name(rng: random.Random, reserved: bool, language: Language = "en") -> str:
    """Name of a person; `reserved` chooses between the needles' names and everybody else's."""
    words = WORDS[language]
    while True:
        at = [rng.randrange(len(part)) for part in words.NAME_PARTS]
        scattered = sum((2 * place + 1) * index for place, index in enumerate(at)) % RESERVED_ONE_IN
        if (scattered == 0) == reserved:
            return words.NAME.format(*(part[index] for part, index in zip(words.NAME_PARTS, at)))


def _value(kind: str, rng: random.Random, language: Language) -> str:
    """The slots of a pattern of VALUES, drawn from left to right; from one list no word is taken twice."""
    text = ""
    taken: set[tuple[str, str]] = set()
    for literal, slot, _, _ in Formatter().parse(WORDS[language].VALUES[kind]):
        text += literal
        if slot == "person":
            text += draw_name(rng, reserved=True, language=language)
        elif slot:
            word = rng.choice(WORDS[language].LISTS[slot])
            while (slot, word) in taken:
                word = rng.choice(WORDS[language].LISTS[slot])
            taken.add((slot, word))
            text += word
    return text


def person_fact(
    name: str, attribute: str, rng: random.Random, language: Language = "en", style: Style = "standard", turn: int = 0
) -> Fact:
    """One attribute of a person, its value drawn. A style of several sentences goes through them by `turn`.

    standard: 'The hobby of NAME is VALUE.' paraphrase: another sentence that says it. pronoun: NAME says it, 'My hobby
    is VALUE.', and who speaks is part of the fact. The question is the same in all styles.
    """
    words = WORDS[language]
    template, question = words.STANDARD[attribute]
    if style == "paraphrase":
        template = _by_turn(words.PARAPHRASE[attribute], turn)
    elif style == "pronoun":
        template = _by_turn(words.HEADERS, turn).replace("{said}", _by_turn(words.FIRST_PERSON[attribute], turn))
    return Fact(attribute, template, question, name, _value(attribute, rng, language), language)


def _by_turn(sentences: tuple[str, ...], turn: int) -> str:
    return sentences[turn % len(sentences)]


def biography_fact(index: int, rng: random.Random, language: Language = "en", style: Style = "standard") -> Fact:
    """A fact about a person no training biography knows; attributes, and then their sentences, take turns by index."""
    rounds, place = divmod(index, len(ATTRIBUTES))
    name = draw_name(rng, reserved=True, language=language)
    return person_fact(name, ATTRIBUTES[place], rng, language, style, turn=rounds + place)


def single_fact(index: int, rng: random.Random, language: Language = "en") -> Fact:
    """A lone fact about a city, unlike anything around it; the kinds take turns by index."""
    words = WORDS[language]
    kind = list(words.SINGLE)[index % len(words.SINGLE)]
    city = rng.choice(words.CITIES)
    template, question = words.SINGLE[kind]
    return Fact(kind, template, question, city, _value(kind, rng, language), language)


# A family of needles makes one from the sample's index and its generator.
FAMILIES: dict[str, Callable[[int, random.Random], Fact]] = {
    "biography": biography_fact,
    "single": single_fact,
    "paraphrase": partial(biography_fact, style="paraphrase"),
    "pronoun": partial(biography_fact, style="pronoun"),
    "biography_zh": partial(biography_fact, language="zh"),
    "single_zh": partial(single_fact, language="zh"),
    "paraphrase_zh": partial(biography_fact, language="zh", style="paraphrase"),
    "pronoun_zh": partial(biography_fact, language="zh", style="pronoun"),
}
