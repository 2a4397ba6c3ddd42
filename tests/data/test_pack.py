"""Packing: no token lost or twice, whatever the lengths; documents whole where they fit; the mixture that was asked for."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_lccp.config.tree import PackConfig
from megatron_lccp.data.corpus import Corpus, Place, Walk
from megatron_lccp.data.pack import PackState, Recipe, Sample, dealt, next_window, work


def corpus_of(lengths: Sequence[int], first_key: int = 0) -> Corpus:
    """Documents whose tokens count up, each by its own number."""
    length_d = np.array(lengths, np.int64)
    start_d = np.concatenate([[0], np.cumsum(length_d)])[:-1]
    rng = np.random.default_rng(first_key)
    return Corpus(rng.integers(0, 2**63, len(lengths)).astype(np.uint64), length_d, np.arange(length_d.sum()), start_d)


def recipe_of(shares: dict[str, float], context_tok: int, **pack) -> Recipe:
    return Recipe(shares, context_tok, PackConfig(**{"align_tok": 1, **pack}), 7)


def windows(
    recipe: Recipe, corpora: dict[str, Corpus], samples: int, count: int
) -> list[tuple[list[Sample], PackState]]:
    state, found = PackState(), []
    for _ in range(count):
        made, state = next_window(recipe, corpora, state, samples)
        found.append((made, state))
    return found


def times_taken(made: Sequence[Sample], corpora: dict[str, Corpus], state: PackState) -> dict[str, np.ndarray]:
    """How often each token was taken; of a source, in the order of its file."""
    taken = {name: np.zeros(int(corpus.length_d.sum()), int) for name, corpus in corpora.items()}
    pieces = [piece for sample in made for piece in sample]
    pieces += [(source, corpora[source].document_of(key), start, end) for source, key, start, end in state.carried]
    for source, document, start, end in pieces:
        first = corpora[source]._start_d[document]
        taken[source][first + start : first + end] += 1
    return taken


@pytest.mark.parametrize("how", ["best_fit", "concat"])
def test_no_token_is_lost_or_twice(how: str) -> None:
    rng = np.random.default_rng(0)
    for number in range(500):
        context = int(rng.integers(4, 65)) * 4
        align = int(rng.choice([1, 2, 4]))
        lists = [np.maximum(rng.lognormal(rng.uniform(1, 5), 1, rng.integers(1, 40)), 1).astype(int) for _ in range(2)]
        corpora = {name: corpus_of(lengths, number * 2 + k) for k, (name, lengths) in enumerate(zip("ab", lists))}
        share = float(rng.uniform(0.1, 0.9))
        recipe = recipe_of({"a": share, "b": 1 - share}, context, how=how, align_tok=align)
        made: list[Sample] = []
        for more, state in windows(recipe, corpora, int(rng.integers(1, 9)), 6):
            made += more
            for sample in more:
                assert sum(recipe.room(piece.tokens) for piece in sample) <= context
            for name, taken in times_taken(made, corpora, state).items():
                place = state.places[name]
                # whole epochs, and of the running one each token at most once
                assert set(np.unique(taken)) <= {place.epoch, place.epoch + 1}, (number, name)
                walk = Walk(corpora[name], 7, name, place)
                begun = walk._order.document_d[: walk._index]
                expected = corpora[name].length_d[begun].sum() - walk.left_tok
                assert (taken == place.epoch + 1).sum() == expected, (number, name)


def test_a_window_is_made_again_from_its_state_as_json() -> None:
    rng = np.random.default_rng(1)
    corpora = {"a": corpus_of(rng.integers(1, 300, 200)), "b": corpus_of(rng.integers(1, 20, 900), 1)}
    for how in ("best_fit", "concat"):
        recipe = recipe_of({"a": 0.7, "b": 0.3}, 64, how=how)
        found = windows(recipe, corpora, 8, 12)
        for (_, state), (after, _) in zip(found, found[1:]):
            again = PackState.from_json(json.loads(json.dumps(state.to_json())))
            assert next_window(recipe, corpora, again, 8)[0] == after


def test_other_files_of_the_same_documents_go_on_with_the_same_text() -> None:
    rng = np.random.default_rng(2)
    one = corpus_of(rng.integers(1, 100, 300))
    order = rng.permutation(300)
    start_d = np.concatenate([[0], np.cumsum(one.length_d[order])])[:-1]
    text = np.concatenate([one.tokens(d, 0, one.length_d[d]) for d in order])
    other = Corpus(one.key_d[order], one.length_d[order], text, start_d)
    recipe = recipe_of({"a": 1.0}, 64)

    def texts(made: Sequence[Sample], corpus: Corpus) -> list[list[int]]:
        return [[t for p in sample for t in corpus.tokens(p.document, p.start, p.end)] for sample in made]

    _, state = next_window(recipe, {"a": one}, PackState(), 9)
    here, there = (next_window(recipe, {"a": corpus}, state, 9) for corpus in (one, other))
    assert texts(here[0], one) == texts(there[0], other) and here[1] == there[1]


def test_the_mixture_changes_with_the_next_window_and_places_go_on() -> None:
    corpora = {name: corpus_of([50] * 400, k) for k, name in enumerate("abc")}
    first = recipe_of({"a": 0.75, "b": 0.25}, 100)
    made, state = next_window(first, corpora, PackState(), 40)
    taken = Counter(piece.source for sample in made for piece in sample)
    assert taken == {"a": 60, "b": 20}
    then = dataclasses.replace(first, shares={"b": 0.5, "c": 0.5})
    more, after = next_window(then, corpora, state, 40)
    both = times_taken([*made, *more], corpora, after)
    assert Counter(piece.source for sample in more for piece in sample) == {"b": 40, "c": 40}
    assert both["b"].max() == 1 and both["b"].sum() == 60 * 50 and after.places["a"] == state.places["a"]


def test_equal_documents_are_all_taken() -> None:
    corpus = Corpus(np.full(5, 3, np.uint64), np.full(5, 4, np.int64), np.arange(20), np.arange(0, 20, 4))
    walk, seen = Walk(corpus, 0, "a", Place()), []
    for _ in range(5):
        document, _ = walk.document()
        seen.append(document)
        walk.take(4)
        walk = Walk(corpus, 0, "a", walk.place)  # as a resume would
    assert sorted(seen) == [0, 1, 2, 3, 4] and walk.place.epoch == 0
    walk.document()
    assert walk.place.epoch == 1


def published(tokens: float, rng: np.random.Generator) -> dict[str, Corpus]:
    """75 % long documents by the tokens of each length that OLMo 3 published of its PDFs above 32K, 25 % of about 1.2K."""
    buckets = ((15, 6.1), (16, 4.5), (17, 3.2), (18, 2.4), (19, 1.7), (20, 1.8))
    long: list[np.ndarray] = []
    for power, weight in buckets:
        mean = 2**power / np.log(2)
        count = max(1, int(0.75 * tokens * weight / 19.7 / mean))
        long.append(np.exp2(rng.uniform(power, power + 1, count)).astype(int))
    short = np.maximum(rng.lognormal(np.log(1200) - 0.5, 1, int(0.25 * tokens / 1200)), 16).astype(int)
    return {"long": corpus_of(np.concatenate(long), 1), "short": corpus_of(short, 2)}


def test_published_lengths_at_64k() -> None:
    """What best fit saves: documents that would fit are not cut, next to nothing is padded, and more is seen together."""
    corpora = published(2e8, np.random.default_rng(0))
    found = {}
    for how in ("concat", "best_fit"):
        recipe = recipe_of({"long": 0.75, "short": 0.25}, 65536, how=how)
        made = [sample for more, _ in windows(recipe, corpora, 256, 8) for sample in more]
        pieces = [piece for sample in made for piece in sample]
        length = {name: corpora[name].length_d for name in corpora}
        tokens = np.array([piece.tokens for piece in pieces])
        whole = np.array([length[p.source][p.document] for p in pieces])
        fits = whole <= 65536
        found[how] = {
            "padding": 1 - tokens.sum() / (len(made) * 65536),
            "cut though it fits": (tokens * (tokens < whole))[fits].sum() / tokens[fits].sum(),
            "more than 32K of its own before it": np.maximum(tokens - 32768, 0).sum() / tokens.sum(),
            "work": sum(work(sample, recipe) for sample in made) / (len(made) * 65536**2),
            "long": sum(p.tokens for p in pieces if p.source == "long") / tokens.sum(),
        }
    concat, best = found["concat"], found["best_fit"]
    assert best["padding"] < 1e-3 and concat["padding"] == 0
    assert best["cut though it fits"] == 0 and 0.3 < concat["cut though it fits"] < 0.5
    assert best["more than 32K of its own before it"] > 1.15 * concat["more than 32K of its own before it"]
    assert concat["work"] < best["work"] < 0.75
    assert abs(best["long"] - 0.75) < 2e-3 and abs(concat["long"] - 0.75) < 2e-3
    print(found)


def test_steps_of_a_window_have_the_same_work() -> None:
    corpora = published(2e7, np.random.default_rng(0))
    recipe = recipe_of({"long": 0.75, "short": 0.25}, 65536)
    made, _ = next_window(recipe, corpora, PackState(), 256)
    steps = dealt(made, 4, recipe)
    assert sorted(map(id, made)) == sorted(id(sample) for step in steps for sample in step)
    of_step = [sum(work(sample, recipe) for sample in step) for step in steps]
    assert max(of_step) < 1.02 * min(of_step)


def test_long_documents_three_ways() -> None:
    corpora = {"a": corpus_of([250] * 8 + [30] * 8)}
    pieces = {}
    for long in ("fragment", "truncate", "exact"):
        made = [s for more, _ in windows(recipe_of({"a": 1.0}, 100, long=long), corpora, 10, 3) for s in more]
        pieces[long] = Counter((p.tokens, p.start) for sample in made for p in sample)
    assert pieces["fragment"].keys() == {(100, 0), (100, 100), (50, 200), (30, 0)}
    assert pieces["truncate"].keys() == {(100, 0), (30, 0)}
    assert pieces["exact"].keys() == {(100, 0), (100, 100)}
