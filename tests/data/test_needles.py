"""Needle samples: exact by construction, and checked here from the outside."""

import copy
import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lccp.data.loader import heldout_tokens
from megatron_lccp.data.needles import Cell, NeedleSetSpec, _hash, _occurs, build_needle_set, encode_fact
from megatron_lccp.data.people import english
from megatron_lccp.data.people.facts import FAMILIES, question_text
from megatron_lccp.data.tokenizers.load import load_tokenizer

SPEC = NeedleSetSpec(families=("biography", "single"), lengths_tok=(256, 600), depths=(0.0, 0.3, 1.0), samples=9,
                     seed=3, haystacks=("files", "people"))  # fmt: skip


@pytest.fixture(scope="module")
def built(config, tokenizer):
    return build_needle_set(SPEC, tokenizer, lambda source: heldout_tokens(config, source))


def key(sample):
    return sample.family, sample.length_tok, sample.depth_cell, sample.sample


def test_the_grid_is_complete_and_in_order(built):
    expected = [(f, n, d, k) for f in SPEC.families for n in SPEC.lengths_tok for d in SPEC.depths for k in range(9)]
    assert [key(sample) for sample in built.samples] == expected


def test_a_sample_reads_as_it_should(built, tokenizer):
    """Question and answer, found in the decoded text; the needle sentence stands there once more and nowhere else."""
    for sample in built.samples:
        text = tokenizer.decode(sample.tokens)
        before, question, answer = (
            text.rpartition("\nQuestion: ")[0],
            *text.rpartition("\nQuestion: ")[2].split("\nAnswer:"),
        )
        assert question.endswith("?") and answer.endswith(".") and answer.startswith(" The ")
        assert before.count(answer) == 1
        assert tokenizer.decode(sample.tokens[slice(*sample.needle)]) == answer
        assert (
            tokenizer.encode(answer) == sample.tokens[slice(*sample.answer)].tolist()
        )  # as the model meets it in training
        name_and_value = tokenizer.decode(sample.tokens[slice(*sample.needle)][sample.content])
        template = tokenizer.decode(sample.tokens[slice(*sample.needle)][~sample.content])
        assert len(name_and_value) + len(template) == len(answer)
        assert template.startswith(" The ") and template.endswith(".") and "Answer" not in name_and_value
        if sample.family == "biography":
            assert " ".join(name_and_value.split()[:3]) in question and name_and_value.split()[-1] not in template


def test_training_joins_question_and_answer_to_the_same_ids(built, tokenizer):
    for sample in built.samples[::5]:
        end = tokenizer.decode(sample.tokens).rindex("\nQuestion: ")
        text = tokenizer.decode(sample.tokens)[end:]
        assert tokenizer.encode(text) == sample.tokens[-len(tokenizer.encode(text)) :].tolist()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(200, 900), min_size=1, max_size=3, unique=True),
    depths=st.lists(st.floats(0, 1), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 2**40),
    family=st.sampled_from(["biography", "single"]),
    hay_tok=st.integers(1, 2000),
)
def test_properties(tokenizer, lengths, depths, seed, family, hay_tok):
    hay = np.random.default_rng(seed).integers(259, tokenizer.vocab_size, hay_tok).astype(np.uint16)
    hay[:: max(2, hay_tok // 5)][1:] = tokenizer.eod
    spec = NeedleSetSpec((family,), tuple(lengths), tuple(depths), samples=2, seed=seed, haystacks=("hay",))
    made = build_needle_set(spec, tokenizer, {"hay": hay}.__getitem__)
    clean = hay[hay != tokenizer.eod].astype(np.int64)
    for sample in made.samples:
        tokens = sample.tokens
        assert tokens.dtype == np.int64 and len(tokens) == sample.length_tok and sample.length_tok in lengths
        (start, end), (a_start, a_end) = sample.needle, sample.answer
        assert start == sample.before_tok and a_end == len(tokens) and end - start == a_end - a_start > 5
        assert tokens[start:end].tolist() == tokens[a_start:a_end].tolist()
        assert len(sample.content) == end - start and sample.content.any() and not sample.content.all()
        question = tokenizer.encode(
            tokenizer.decode(tokens[:a_start])[tokenizer.decode(tokens[:a_start]).rindex("\nQuestion:") :]
        )
        assert end + sample.after_tok + len(question) == a_start
        hay_part = np.concatenate([tokens[:start], tokens[end : end + sample.after_tok]])
        assert len(hay_part) == sample.before_tok + sample.after_tok
        assert abs(sample.depth_cell - sample.depth) <= 0.5 / len(hay_part) + 1e-12
        assert tokenizer.eod not in tokens
        where = (np.arange(len(hay_part)) + _start(clean, hay_part)) % len(clean)
        assert np.array_equal(clean[where], hay_part)  # a stretch of the haystack, going round at its end
    again = build_needle_set(spec, tokenizer, {"hay": hay}.__getitem__)
    assert again.sha == made.sha and len(made.sha) == 12
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(made.samples, again.samples))
    other = build_needle_set(dataclasses.replace(spec, seed=seed + 1), tokenizer, {"hay": hay}.__getitem__)
    assert other.sha != made.sha


def _start(clean: np.ndarray, part: np.ndarray) -> int:
    """Where in the haystack a part begins, found by trying."""
    size = min(len(part), len(clean))
    for start in range(len(clean)):
        if np.array_equal(np.take(clean, np.arange(start, start + size), mode="wrap"), part[:size]):
            return start
    raise AssertionError("not of the haystack")


def test_cells_are_paired(built):
    """Equal index: one fact, one haystack; a longer sample goes on where the shorter ends."""
    groups: dict = {}
    for s in built.samples:
        (start, end), after_end = s.needle, s.needle[1] + s.after_tok
        hay = np.concatenate([s.tokens[:start], s.tokens[end:after_end]])
        groups.setdefault((s.family, s.sample), []).append(
            (s.tokens[start:end].tolist(), hay.tolist(), s.haystack, s.seed)
        )
    assert len(groups) == 18
    for members in groups.values():
        needle, longest, haystack, seed = max(members, key=lambda m: len(m[1]))
        assert len(members) == 6
        assert all(m[0] == needle and m[2:] == (haystack, seed) and m[1] == longest[: len(m[1])] for m in members)
    needles = {tuple(members[0][0]) for members in groups.values()}
    assert len(needles) == len({members[0][3] for members in groups.values()}) == 18 and {
        members[0][2] for members in groups.values()
    } == {"files", "people"}
    assert len({s.kind for s in built.samples if s.family == "biography"}) == 7
    assert len({s.kind for s in built.samples if s.family == "single"}) == 8


GRIDS = st.builds(
    NeedleSetSpec,
    families=st.lists(st.sampled_from(list(FAMILIES)), min_size=1, max_size=2, unique=True).map(tuple),
    lengths_tok=st.lists(st.integers(400, 900), min_size=1, max_size=3).map(tuple),
    depths=st.lists(st.floats(0, 1), min_size=1, max_size=4).map(tuple),
    samples=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    haystacks=st.just(("hay", "other")),
    lattice_tok=st.none() | st.integers(1, 1200),
    befores_tok=st.lists(st.integers(0, 700), min_size=1, max_size=3).map(tuple),
    afters_tok=st.lists(st.integers(0, 700), min_size=1, max_size=3).map(tuple),
)


@pytest.mark.parametrize("which", ["small", "bytes"])
@settings(max_examples=60, deadline=None)
@given(
    spec=GRIDS,
    drop=st.sampled_from(["depths", "befores", None]),
    hay_tok=st.integers(1, 900),
    bos=st.sampled_from([None, 1, 7]),
)
def test_all_cells_of_a_sample_share_one_haystack(tokenizer, which, spec, drop, hay_tok, bos):
    """What lets cells be measured together: tokens == begin + H[:b] + needle + H[b : b + a] + question + needle."""
    if which == "bytes":
        tokenizer = load_tokenizer("examples/tiny_moe/tokenizer.model")
    tokenizer, begin = copy.copy(tokenizer), [] if bos is None else [bos]
    tokenizer.bos = bos
    if drop is not None:
        empty = ("lengths_tok", "depths") if drop == "depths" else ("befores_tok", "afters_tok")
        spec = dataclasses.replace(spec, **dict.fromkeys(empty, ()))
    rng = np.random.default_rng(spec.seed)
    hays = {name: rng.integers(259, tokenizer.vocab_size, hay_tok).astype(np.uint16) for name in spec.haystacks}
    made = build_needle_set(spec, tokenizer, hays.__getitem__)
    cells = len(spec.lengths_tok) * len(spec.depths) + len(spec.befores_tok) * len(spec.afters_tok)
    assert len(made.samples) == len(spec.families) * cells * spec.samples
    groups: dict = {}
    for number, s in enumerate(made.samples):
        assert s.family == spec.families[number // (cells * spec.samples)] and s.sample == number % spec.samples
        groups.setdefault((s.family, s.sample), []).append(s)
    for (family, index), samples in groups.items():
        first = samples[0]
        needle, question = first.tokens[slice(*first.needle)], first.tokens[slice(*first.question)]
        assert first.tokens[: len(begin)].tolist() == begin
        fact = FAMILIES[family](index, random.Random(first.seed))
        assert tokenizer.decode(question) == question_text(fact) and tokenizer.decode(needle).strip() == fact.sentence
        longest = max(samples, key=lambda s: s.before_tok + s.after_tok)
        hay = np.concatenate(
            [longest.tokens[len(begin) : longest.needle[0]], longest.tokens[longest.needle[1] : longest.question[0]]]
        )
        for s, cell in zip(samples, spec.cells(len(begin) + 2 * len(needle) + len(question)), strict=True):
            before, after = s.before_tok, s.after_tok
            assert Cell(before, after, s.depth_cell) == cell
            rebuilt = np.concatenate([begin, hay[:before], needle, hay[before : before + after], question, needle])
            assert np.array_equal(s.tokens, rebuilt)
            start = len(begin) + before
            assert s.needle == (start, start + len(needle)) and s.answer[1] == s.length_tok
            assert s.begin_tok == len(begin)
            assert s.question == (s.answer[0] - len(question), s.answer[0]) and s.question[0] == s.needle[1] + after
            assert np.array_equal(s.null_question, first.null_question) and s.null_question.dtype == np.int64
            assert np.array_equal(s.content, first.content) and s.haystack == spec.haystacks[index % 2]
            assert s.depth == (before / (before + after) if before + after else 0.0)


@settings(max_examples=200, deadline=None)
@given(spec=GRIDS, fixed_tok=st.integers(20, 390))
def test_cells(spec, fixed_tok):
    cells = spec.cells(fixed_tok)
    by_depth = len(spec.lengths_tok) * len(spec.depths)
    asked = [(length, depth) for length in spec.lengths_tok for depth in spec.depths]
    for cell, (length, depth) in zip(cells, asked):
        hay, lattice = length - fixed_tok, spec.lattice_tok or 1
        assert cell.before_tok + cell.after_tok == hay and 0 <= cell.before_tok <= hay and cell.depth_cell == depth
        assert cell.before_tok % lattice == 0
        capped = cell.before_tok == hay // lattice * lattice < depth * hay
        assert capped or abs(cell.before_tok - depth * hay) <= lattice / 2 + 1e-9
    crossed = [Cell(before, after, None) for before in spec.befores_tok for after in spec.afters_tok]
    assert cells[by_depth:] == crossed
    for most_tok in {cell.before_tok + cell.after_tok for cell in crossed}:
        kept = dataclasses.replace(spec, most_tok=most_tok).cells(fixed_tok)
        assert kept == cells[:by_depth] + [c for c in crossed if c.before_tok + c.after_tok <= most_tok]


def test_a_grid_without_its_corner(tokenizer, config):
    """Both axes up to the longest haystack, as the paper's Figure 8."""
    heldout = {source: heldout_tokens(config, source) for source in SPEC.haystacks}
    axis = (0, 100, 200, 300)
    grid = {"lengths_tok": (), "depths": (), "befores_tok": axis, "afters_tok": axis, "most_tok": 300}
    made = build_needle_set(dataclasses.replace(SPEC, **grid), tokenizer, heldout.__getitem__)
    cells = [(b, a) for b in axis for a in axis if b + a <= 300]
    assert len(cells) == 10 and len(made.samples) == len(SPEC.families) * len(cells) * SPEC.samples
    assert {(s.before_tok, s.after_tok) for s in made.samples} == set(cells)


def test_a_lattice_makes_cells_share_what_is_before(tokenizer, built, config):
    heldout = {source: heldout_tokens(config, source) for source in SPEC.haystacks}
    depths = tuple(i / 10 for i in range(11))
    spec = dataclasses.replace(SPEC, lengths_tok=(256, 600, 900), depths=depths, lattice_tok=100)
    made = build_needle_set(spec, tokenizer, heldout.__getitem__)
    assert len(made.samples) == 2 * 3 * 11 * 9  # cells that coincide stay samples of their own
    assert {s.before_tok for s in made.samples} == set(range(0, 900, 100))
    assert {s.depth_cell for s in made.samples} == set(depths)
    assert {s.length_tok for s in made.samples} == {256, 600, 900}
    exact = build_needle_set(dataclasses.replace(SPEC, lattice_tok=1), tokenizer, heldout.__getitem__)
    assert exact.sha == built.sha


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("which", ["small", "bytes"])
def test_every_family_reads_as_it_should(family, which, tokenizer):
    if which == "bytes":
        tokenizer = load_tokenizer("examples/tiny_moe/tokenizer.model")
    hay = np.array(tokenizer.encode("The haystack goes on and on.\n" * 30), np.uint16)
    spec = NeedleSetSpec((family,), befores_tok=(0, 57), afters_tok=(0, 31), samples=30, haystacks=("hay",))
    made = build_needle_set(spec, tokenizer, {"hay": hay}.__getitem__)
    for s in made.samples:
        fact = FAMILIES[family](s.sample, random.Random(s.seed))
        needle = "".join(part for part, _ in fact.parts())
        before, after, question = (tokenizer.decode(s.tokens[slice(*at)]) for at in
                                   ((0, s.needle[0]), (s.needle[1], s.question[0]), s.question))  # fmt: skip
        assert question == question_text(fact)
        assert tokenizer.decode(s.tokens) == before + needle + after + question + needle
        null = "\nQuestion: N/A\nAnswer:" if fact.language == "en" else "\n问题：无\n答案："
        assert tokenizer.decode(s.null_question) == null and s.kind == fact.kind and s.depth_cell is None
    assert len({s.kind for s in made.samples}) == (8 if family.startswith("single") else 7)


def test_the_hash_is_of_what_is_measured(built, config, tokenizer):
    heldout = {source: heldout_tokens(config, source) for source in SPEC.haystacks}
    assert build_needle_set(SPEC, tokenizer, heldout.__getitem__).sha == built.sha
    for change in ({"seed": 4}, {"samples": 8}, {"depths": (0.0, 0.31, 1.0)}, {"lengths_tok": (256, 601)},
                   {"haystacks": ("files",)}, {"families": ("biography",)}, {"lattice_tok": 16},
                   {"befores_tok": (5,), "afters_tok": (9,)}):  # fmt: skip
        spec = dataclasses.replace(SPEC, **change)
        assert build_needle_set(spec, tokenizer, heldout.__getitem__).sha != built.sha
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(english, "NO_QUESTION", "None")
        assert build_needle_set(SPEC, tokenizer, heldout.__getitem__).sha != built.sha
    changed = {name: np.where(tokens == 300, 301, tokens) for name, tokens in heldout.items()}
    assert build_needle_set(SPEC, tokenizer, changed.__getitem__).sha != built.sha


def test_a_begin_token_stands_first_and_nowhere_else():
    """Tokens that begin or end documents are left out of haystacks; without one, samples are what they always were."""
    tokenizer = load_tokenizer("examples/tiny_moe/tokenizer.model")
    hay = np.tile(np.array([7, 300, 301, 302, tokenizer.eod], np.uint16), 99)
    spec = NeedleSetSpec(lengths_tok=(200,), depths=(0.0, 0.5), samples=1, haystacks=("hay",))
    plain = build_needle_set(spec, tokenizer, lambda name: hay)
    assert plain.sha == "19598e0b7235" and 7 in plain.samples[0].tokens
    begun = copy.copy(tokenizer)
    begun.bos = 7
    for s in build_needle_set(spec, begun, lambda name: hay).samples:
        assert s.tokens[0] == 7 and not {7, tokenizer.eod} & set(s.tokens[1:].tolist())
        assert len(s.tokens) == 200 and s.needle[0] == 1 + s.before_tok


def test_problems_are_named(built, config, tokenizer):
    heldout = {"files": heldout_tokens(config, "files")}
    spec = dataclasses.replace(SPEC, haystacks=("files",))
    least = max(
        2 * (s.needle[1] - s.needle[0]) + s.length_tok - 2 * (s.needle[1] - s.needle[0]) - s.before_tok - s.after_tok
        for s in built.samples
    )
    with pytest.raises(
        ValueError, match="lengths_tok: 30 has no room for a haystack; needle, question and answer of a"
    ):
        build_needle_set(dataclasses.replace(spec, lengths_tok=(300, 30)), tokenizer, heldout.__getitem__)
    tight = build_needle_set(dataclasses.replace(spec, lengths_tok=(least + 1,)), tokenizer, heldout.__getitem__)
    assert min(s.before_tok + s.after_tok for s in tight.samples) == 1
    with pytest.raises(ValueError, match=f"lengths_tok: {least} has no room"):
        build_needle_set(dataclasses.replace(spec, lengths_tok=(least,)), tokenizer, heldout.__getitem__)
    sample = tight.samples[0]
    there = {
        "files": np.concatenate([heldout["files"][:50], sample.tokens[slice(*sample.needle)], heldout["files"][50:60]])
    }
    with pytest.raises(ValueError, match="haystacks: the held-out tokens of 'files' hold the needle 'The .*' already"):
        build_needle_set(dataclasses.replace(spec, lengths_tok=(600,)), tokenizer, there.__getitem__)
    # what lies outside of the window a sample takes is no trouble
    short = dataclasses.replace(spec, lengths_tok=(), depths=(), befores_tok=(1,), afters_tok=(1,))
    assert build_needle_set(short, tokenizer, there.__getitem__).sha
    for nothing in (np.array([], np.uint16), np.full(3, tokenizer.eod, np.uint16)):
        with pytest.raises(ValueError, match="haystacks: source 'files' has no held-out tokens"):
            build_needle_set(spec, tokenizer, {"files": nothing}.__getitem__)


def test_every_field_of_a_sample_is_in_the_hash(built):
    sample = built.samples[0]
    changes = {
        "needle": (0, 1), "answer": (0, 1), "before_tok": 999, "after_tok": 999, "depth_cell": 0.7, "family": "other",
        "kind": "other", "sample": 99, "tokens": sample.tokens[::-1].copy(), "content": ~sample.content,
        "null_question": sample.null_question[1:],
    }  # fmt: skip
    hashes = {_hash([dataclasses.replace(sample, **{name: value})]) for name, value in changes.items()}
    assert len(hashes | {_hash([sample])}) == len(changes) + 1


@settings(max_examples=200, deadline=None)
@given(hay=st.lists(st.integers(0, 2), max_size=12), needle=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_a_needle_is_found_wherever_it_stands(hay, needle):
    there = any(hay[at : at + len(needle)] == needle for at in range(len(hay)))
    assert _occurs(np.array(needle), np.array(hay, np.int64)) == there


class Chunks:
    """A tokenizer whose tokens are so many bytes each, wherever words and characters end."""

    def __init__(self, size: int):
        self.size, self.ids = size, {}

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        chunks = [data[at : at + self.size] for at in range(0, len(data), self.size)]
        return [self.ids.setdefault(chunk, len(self.ids)) for chunk in chunks]

    def decode(self, ids: list[int]) -> str:
        return b"".join(list(self.ids)[k] for k in ids).decode(errors="replace")


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_content_is_every_token_with_a_byte_of_name_or_value(family, size):
    for index in range(8):
        fact = FAMILIES[family](index, random.Random(index))
        needle, content, _ = encode_fact(fact, Chunks(size))
        of_byte = [is_slot for part, is_slot in fact.parts() for _ in part.encode()]
        assert len(needle) == -(-len(of_byte) // size)
        assert content == [any(of_byte[at : at + size]) for at in range(0, len(of_byte), size)]


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"families": ("poem",)}, "families: 'poem' is none of biography, single, paraphrase, pronoun, biography_zh"),
        ({"haystacks": ()}, "haystacks: is empty"),
        ({"lengths_tok": ()}, "lengths_tok: is empty"),
        ({"depths": (0.5, 1.2)}, "samples and depths"),
        ({"depths": (-0.1,)}, "samples and depths"),
        ({"samples": 0}, "samples and depths"),
        ({"depths": ()}, "depths: is empty"),
        ({"lengths_tok": (), "depths": ()}, "lengths_tok: is empty; give lengths_tok and depths, or befores_tok and"),
        ({"befores_tok": (1,)}, "afters_tok: is empty"),
        ({"afters_tok": (1,)}, "befores_tok: is empty"),
        ({"lengths_tok": (), "befores_tok": (1,), "afters_tok": (1,)}, "lengths_tok: is empty"),
        ({"befores_tok": (1, -2), "afters_tok": (1,)}, "befores_tok and afters_tok: -2 is negative"),
        ({"lattice_tok": 0}, "lattice_tok: 0 is no number of tokens"),
        ({"befores_tok": (4, 9), "afters_tok": (7,), "most_tok": 10}, "most_tok: 10 leaves no cell; .* has 11 tokens"),
    ],
)
def test_a_wrong_spec_is_named(change, problem):
    with pytest.raises(ValueError, match=problem):
        dataclasses.replace(SPEC, **change)
