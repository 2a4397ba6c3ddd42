"""Facts: names nobody else has, sentences in turn, the same text for ever."""

import hashlib
import os
import random
import re
import subprocess
import sys
from string import Formatter

import pytest

from megatron_lccp.data.needles import encode_fact
from megatron_lccp.data.people import chinese, english
from megatron_lccp.data.people.facts import (
    ATTRIBUTES,
    FAMILIES,
    WORDS,
    Fact,
    draw_name,
    null_question_text,
    person_fact,
    question_text,
)
from megatron_lccp.data.sources.generated import Biographies
from megatron_lccp.data.tokenizers.load import load_tokenizer, train_tokenizer

BYTES = "examples/tiny_moe/tokenizer.model"  # trained on English and code: Chinese is bytes to it


def fact_of(family: str, index: int) -> Fact:
    return FAMILIES[family](index, random.Random(f"{family}{index}"))


def test_the_text_of_training_data_and_first_families_never_changes():
    """The shipped base model was trained on it; its needles were measured with these."""
    for source, pinned in (
        (Biographies(count=30), "e5e67fef4ff515c7"),
        (
            Biographies(count=30, questions_at="anywhere", seed=7, people_per_document=8, questions_per_document=6),
            "2382dbe4a2630d00",
        ),
    ):
        text = "\0".join(source.documents(1000))
        assert hashlib.sha256(text.encode()).hexdigest()[:16] == pinned
    digest = hashlib.sha256()
    for fact in (fact_of(family, index) for family in ("biography", "single") for index in range(60)):
        digest.update(repr((fact.kind, fact.sentence, fact.question, fact.parts())).encode())
    assert digest.hexdigest()[:16] == "13378cc829453389"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_fact_is_the_sum_of_its_parts(family):
    for index in range(90):
        fact = fact_of(family, index)
        space = "" if family.endswith("_zh") else " "
        assert "".join(text for text, _ in fact.parts()) == space + fact.sentence
        assert {text.strip() for text, slot in fact.parts() if slot} == {fact.name, fact.value}
        assert fact.name in fact.question and fact.value not in fact.question
        assert fact.sentence.count(fact.name) == fact.sentence.count(fact.value) == 1
        assert "{" not in fact.sentence + fact.question
        assert fact.language == ("zh" if family.endswith("_zh") else "en")
        assert re.search('[.。]["”]?$', fact.sentence) and re.search("[?？]$", fact.question)
        assert bool(re.search("[a-zA-Z]", fact.sentence)) == (fact.language == "en")


@pytest.mark.parametrize("family", ["single", "single_zh"])
def test_no_two_slots_hold_the_same_word(family):
    """No door is painted ochre and ochre."""
    for kind, join in (("soup", " with a little |加一点"), ("door", " and |和")):
        values = [
            FAMILIES[family](i, random.Random(i)).value.strip()
            for i in range(list(english.SINGLE).index(kind), 4000, 8)
        ]
        pairs = [re.split(join, value) for value in values]
        assert all(len(pair) == 2 and pair[0] != pair[1] for pair in pairs) and len(set(values)) > 200


def test_questions_as_the_model_meets_them():
    fact = fact_of("biography", 0)
    assert question_text(fact) == f"\nQuestion: What is the hobby of {fact.name}?\nAnswer:"
    assert null_question_text("en") == "\nQuestion: N/A\nAnswer:"
    fact = fact_of("pronoun_zh", 0)
    assert question_text(fact) == f"\n问题：{fact.name}的爱好是什么？\n答案："
    assert null_question_text("zh") == "\n问题：无\n答案："
    fact = Fact(
        "hobby", 'In the words of {name}: "My hobby is {value}."', "What is the hobby of {name}?", "A B C", "go"
    )
    assert fact.sentence == 'In the words of A B C: "My hobby is go."'


@pytest.mark.parametrize("language", list(WORDS))
def test_the_tables_of_a_language_are_complete(language):
    words = WORDS[language]
    assert list(words.STANDARD) == list(words.PARAPHRASE) == list(words.FIRST_PERSON) == list(ATTRIBUTES)
    assert set(words.VALUES) == set(words.STANDARD) | set(words.SINGLE) and len(words.SINGLE) == 8
    assert all(len(set(items)) == len(items) for items in words.LISTS.values())
    drawn = {slot for pattern in words.VALUES.values() for _, slot, _, _ in Formatter().parse(pattern) if slot}
    assert drawn == words.LISTS.keys() | {"person"}
    for attribute in ATTRIBUTES:
        other = words.PARAPHRASE[attribute]
        assert len(set(other)) == len(other) >= 6 and words.STANDARD[attribute][0] not in other
        assert len(set(words.FIRST_PERSON[attribute])) >= 4
        assert not any("{name}" in sentence for sentence in words.FIRST_PERSON[attribute])
    assert len(words.HEADERS) >= 3 and all("{name}" in header and "{said}" in header for header in words.HEADERS)


def test_english_slots_stand_where_tokens_begin():
    for tables in (english.PARAPHRASE, english.FIRST_PERSON, {"header": english.HEADERS}, english.SINGLE):
        for sentence in (sentence for sentences in tables.values() for sentence in sentences):
            for found in re.finditer(r"(^|.)\{\w+\}(.)", sentence):
                assert found[1] in ("", " ", '"') and found[2] in ' .,:"?', sentence


def test_sentences_take_turns():
    """Every attribute goes through all of its sentences, and a few samples have different ones already."""
    for family, sentences in (("paraphrase", 6), ("pronoun", 12), ("paraphrase_zh", 6), ("pronoun_zh", 12)):
        facts = [fact_of(family, index) for index in range(len(ATTRIBUTES) * sentences)]
        for attribute in ATTRIBUTES:
            assert len({fact.template for fact in facts if fact.kind == attribute}) == sentences
        assert [fact.kind for fact in facts[:7]] == list(ATTRIBUTES)
    assert len({fact_of("pronoun", index).template.split("{name}")[0] for index in range(3)}) == 3
    standard, other = (person_fact("A B C", "job", random.Random(3), "en", s, 5) for s in ("standard", "paraphrase"))
    assert standard.value == other.value and standard.question == other.question


@pytest.mark.parametrize("language", list(WORDS))
def test_names_of_needles_are_never_names_of_biographies(language):
    words = WORDS[language]
    last = [start + end for start in english.LAST_START for end in english.LAST_END]
    parts = (english.FIRST, english.MIDDLE, last) if language == "en" else words.NAME_PARTS
    assert all(len(part) == len(set(part)) >= 70 for part in parts)  # so different draws are different names
    rng = random.Random(5)
    for reserved in (True, False):
        drawn = {draw_name(rng, reserved, language) for _ in range(2000)}
        assert len(drawn) > 1950
        assert {is_reserved(name, language) for name in drawn} == {reserved}
    suffix = "" if language == "en" else "_zh"
    needles = {fact_of(f"{kind}{suffix}", index).name for kind in ("biography", "pronoun") for index in range(100)}
    assert all(is_reserved(name, language) for name in needles)
    founders = [fact for fact in (fact_of(f"single{suffix}", i) for i in range(80)) if fact.kind == "founder"]
    assert len(founders) == 10 and all(is_reserved(fact.value, language) for fact in founders)


@pytest.mark.parametrize("style", ["standard", "paraphrase", "pronoun"])
def test_biographies_hold_nobody_of_a_needle(style):
    for language, opening in (("en", r"few words about ([\w ]+)\."), ("zh", "介绍一下(.+?)。")):
        documents = list(Biographies(count=20, language=language, style=style).documents(0))
        people = [name for document in documents for name in re.findall(opening, document)]
        assert len(people) == 200 and not any(is_reserved(name, language) for name in people)


def is_reserved(name: str, language: str) -> bool:
    """The rule, worked out from the name alone."""
    if language == "zh":
        at = [chinese.SURNAMES.index(name[:-2]), chinese.GIVEN_FIRST.index(name[-2])]
        at.append(chinese.GIVEN_LAST.index(name[-1]))
    else:
        first, middle, family = name.split()
        start, end = next(
            (start, family.removeprefix(start))
            for start in english.LAST_START
            if family.startswith(start) and family.removeprefix(start) in english.LAST_END
        )
        at = [english.FIRST.index(first), english.MIDDLE.index(middle), english.LAST_START.index(start)]
        at.append(english.LAST_END.index(end))
    return sum(index * weight for index, weight in zip(at, (1, 3, 5, 7))) % 8 == 0


def test_no_chinese_name_ends_in_another():
    surnames = chinese.SURNAMES
    assert not [(a, b) for a in surnames for b in surnames if a != b and a.endswith(b)]
    assert {len(given) for given in chinese.GIVEN_FIRST + chinese.GIVEN_LAST} == {1}


@pytest.fixture(scope="module")
def tokenizers(tokenizer, tmp_path_factory):
    """Of English, of English and code where Chinese is bytes, of Chinese."""
    documents = list(Biographies(count=200, language="zh", style="paraphrase").documents(0))
    chinese = train_tokenizer(tmp_path_factory.mktemp("zh") / "zh.model", documents, 2500)
    return {"small": tokenizer, "bytes": load_tokenizer(BYTES), "chinese": chinese}


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("which", ["small", "bytes", "chinese"])
def test_content_is_name_and_value(family, which, tokenizers):
    tokenizer = tokenizers[which]
    for index in range(45):
        fact = fact_of(family, index)
        ids, content, question = encode_fact(fact, tokenizer)
        text = "".join(part for part, _ in fact.parts())
        assert len(ids) == len(content) and tokenizer.decode(ids) == text
        assert tokenizer.decode(question) == question_text(fact)
        runs, run = [], []
        for token, inside in [*zip(ids, content), (0, False)]:
            if inside:
                run.append(token)
            elif run:
                runs.append(tokenizer.decode(run))
                run = []
        slots = [part for part, is_slot in fact.parts() if is_slot]
        if which == "chinese":  # its tokens may hold the end of a name and what follows
            assert all(any(slot.strip() in run for run in runs) for slot in slots)
            assert not all(content)
        else:
            assert runs == slots
            by_parts = [token for part, _ in fact.parts() for token in tokenizer.encode(part)]
            assert by_parts == ids  # with such a tokenizer, slots are made of whole tokens


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_answer_has_the_ids_it_has_in_training(family, tokenizers):
    for which in ("small", "bytes", "chinese"):
        for index in range(0, 30, 3):
            fact = fact_of(family, index)
            ids, _, question = encode_fact(fact, tokenizers[which])
            text = question_text(fact) + WORDS[fact.language].SPACE + fact.sentence
            assert tokenizers[which].encode(text) == question + ids


SCRIPT = """
import hashlib, random
from megatron_lccp.data.people.facts import FAMILIES
from megatron_lccp.data.haystacks import bundled_tokens
from megatron_lccp.data.needles import NeedleSetSpec, build_needle_set
from megatron_lccp.data.tokenizers.load import load_tokenizer
tokenizer = load_tokenizer("examples/tiny_moe/tokenizer.model")
hays = {name: bundled_tokens(name, tokenizer, 3000) for name in ("bundled/biographies", "bundled/biographies_zh")}
spec = NeedleSetSpec(tuple(FAMILIES), (400, 700), (0.0, 0.6), 5, 3, tuple(hays), 32, (10,), (0, 30))
sha = build_needle_set(spec, tokenizer, hays.__getitem__).sha
print(sha, *(hashlib.sha256(hay.tobytes()).hexdigest()[:12] for hay in hays.values()))
"""


def test_processes_agree():
    """Sets of words in an order of the process would show here, and a change of the sample sets too."""
    found = set()
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
        found.add(done.stdout.strip())
    assert found == {"47d797a77b7b e713d03fb404 005c68781797"}
