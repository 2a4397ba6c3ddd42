"""Facts about invented people and places: what biographies teach and what needles hide.

In: a seeded `random.Random`. Out: `Fact`s, each one sentence and the question it answers; the answer repeats the
sentence word for word. Names come in two disjoint sets (`reserved`): training biographies use no name of a needle.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from string import Formatter

from megatron_lccp.data import names

# Of all first x middle x last combinations, one in this many is kept for needles.
RESERVED_ONE_IN = 8


@dataclass(frozen=True)
class Fact:
    """One sentence with two slots, {name} and {value}, and the question it answers, with the slot {name}."""

    kind: str
    template: str
    question_template: str
    name: str
    value: str

    @property
    def sentence(self) -> str:
        return self.template.format(name=self.name, value=self.value)

    @property
    def question(self) -> str:
        return self.question_template.format(name=self.name)

    def parts(self) -> list[tuple[str, bool]]:
        """(text, is it a slot) in order, joined " " + sentence. A space begins a part, as it begins a token."""
        parts: list[tuple[str, bool]] = []
        space = " "
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
    return f"\nQuestion: {fact.question}\nAnswer:"


def draw_name(rng: random.Random, reserved: bool) -> str:
    """First, middle and last name; `reserved` chooses between the needles' names and everybody else's."""
    while True:
        i, j = rng.randrange(len(names.FIRST)), rng.randrange(len(names.MIDDLE))
        k, m = rng.randrange(len(names.LAST_START)), rng.randrange(len(names.LAST_END))
        if (_scatter(i, j, k, m) == 0) == reserved:
            return f"{names.FIRST[i]} {names.MIDDLE[j]} {names.LAST_START[k]}{names.LAST_END[m]}"


def _scatter(i: int, j: int, k: int, m: int) -> int:
    return (i + 3 * j + 5 * k + 7 * m) % RESERVED_ONE_IN


def _date(rng: random.Random) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(names.MONTHS)} {rng.randint(1930, 2005)}"


def _school(rng: random.Random) -> str:
    return f"{rng.choice(names.LAST_START)}{rng.choice(names.LAST_END)} {rng.choice(names.SCHOOLS)}"


# Attribute -> what it is called in a sentence, and how its value is drawn.
ATTRIBUTES: dict[str, tuple[str, Callable[[random.Random], str]]] = {
    "hobby": ("hobby of {name}", lambda rng: rng.choice(names.HOBBIES)),
    "birthday": ("date of birth of {name}", _date),
    "birthplace": ("birthplace of {name}", lambda rng: rng.choice(names.CITIES)),
    "school": ("school that {name} attended", _school),
    "field": ("field that {name} studied", lambda rng: rng.choice(names.FIELDS)),
    "job": ("occupation of {name}", lambda rng: rng.choice(names.JOBS)),
    "work_city": ("city where {name} works", lambda rng: rng.choice(names.CITIES)),
}


def person_fact(name: str, attribute: str, rng: random.Random) -> Fact:
    """One attribute of a person, its value drawn: 'The hobby of NAME is VALUE.'"""
    subject, draw = ATTRIBUTES[attribute]
    return Fact(attribute, "The " + subject + " is {value}.", "What is the " + subject + "?", name, draw(rng))


def biography_fact(index: int, rng: random.Random) -> Fact:
    """A fact about a person no training biography knows; the attributes take turns by index."""
    return person_fact(draw_name(rng, reserved=True), list(ATTRIBUTES)[index % len(ATTRIBUTES)], rng)


# Kind -> sentence, question, and how the value is drawn; {name} is a city.
SINGLE: dict[str, tuple[str, str, Callable[[random.Random], str]]] = {
    "afternoon": (
        "The best way to spend a rainy afternoon in {name} is to {value}.",
        "What is the best way to spend a rainy afternoon in {name}?",
        lambda rng: rng.choice(names.PASTIMES),
    ),
    "password": (
        "The password to the old library of {name} is {value}.",
        "What is the password to the old library of {name}?",
        lambda rng: f"{rng.choice(names.COLOURS)} {rng.choice(names.THINGS)}",
    ),
    "soup": (
        "The secret of the fish soup that they serve in {name} is {value}.",
        "What is the secret of the fish soup that they serve in {name}?",
        lambda rng: f"{rng.choice(names.SPICES)} with a little {rng.choice(names.SPICES)}",
    ),
    "ferry": (
        "The last ferry from {name} to the island leaves at {value}.",
        "When does the last ferry from {name} to the island leave?",
        lambda rng: f"{rng.randint(13, 23)}:{rng.randint(10, 59)}",
    ),
    "key": (
        "The key to the observatory above {name} lies under the {value}.",
        "Where does the key to the observatory above {name} lie?",
        lambda rng: f"{rng.choice(names.COLOURS)} {rng.choice(names.THINGS)}",
    ),
    "door": (
        "The oldest door in {name} was painted {value}.",
        "How was the oldest door in {name} painted?",
        lambda rng: f"{rng.choice(names.COLOURS)} and {rng.choice(names.COLOURS)}",
    ),
    "steps": (
        "The number of steps up to the bell tower of {name} is {value}.",
        "What is the number of steps up to the bell tower of {name}?",
        lambda rng: str(rng.randint(101, 989)),
    ),
    "founder": (
        "The puppet theatre of {name} was founded by {value}.",
        "Who founded the puppet theatre of {name}?",
        lambda rng: draw_name(rng, reserved=True),
    ),
}


def single_fact(index: int, rng: random.Random) -> Fact:
    """A lone fact about a city, unlike anything around it; the kinds take turns by index."""
    kind = list(SINGLE)[index % len(SINGLE)]
    sentence, question, draw = SINGLE[kind]
    return Fact(kind, sentence, question, rng.choice(names.CITIES), draw(rng))


FAMILIES: dict[str, Callable[[int, random.Random], Fact]] = {"biography": biography_fact, "single": single_fact}
