"""What monitors ask for before anything is run: how much text, and names under which results are kept in a journal.

A window here gives made-up text and remembers; nothing is run.
"""

from __future__ import annotations

import contextlib
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_lccp.data.needles import NeedleSet
from megatron_lccp.data.tokenizers.load import load_tokenizer
from megatron_lccp.measuring import needles
from megatron_lccp.measuring.found import Found
from megatron_lccp.measuring.head_scores import chosen_scores
from megatron_lccp.measuring.journal import FileJournal
from megatron_lccp.measuring.needles import needle_set, run_samples
from megatron_lccp.measuring.prefills import tokens_of
from megatron_lccp.measuring.runs import run_trees
from megatron_lccp.monitors import CorpusPPL, InterferenceGrid, NeedleGrid, corpus_ppl
from tests.measuring.own_scores import OWN

TOKENS = {"a": np.arange(259, 900), "b": np.arange(300, 1000)}


class Window:
    """Texts of a few hundred tokens; `asked` has how many were wanted."""

    sketch = False

    def __init__(self) -> None:
        self.cache: dict[Any, Any] = {"can share": True}
        self.groups = SimpleNamespace(dp=SimpleNamespace(size=lambda: 1))
        self.tokenizer = load_tokenizer("examples/tiny_moe/tokenizer.model")
        self.asked: list[int] = []

    def text(self, name: str, at_least_tok: int) -> np.ndarray:
        self.asked.append(at_least_tok)
        return TOKENS[name]

    def row(self, *_arguments: Any, **_where: Any) -> None:
        pass


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(name, what, look, questions) of all that is to be run; the answer is the same for everything."""
    found: list[tuple[Any, ...]] = []

    def run_trees(window, trees, name, what, look=False, questions=False, scores=()):
        found.append((name, what, look, questions))
        return {k: Found(np.zeros(3), np.zeros(3)) for k in range(len(trees))}

    for module in (needles, corpus_ppl):
        monkeypatch.setattr(module, "run_trees", run_trees)
        monkeypatch.setattr(module, "agreed", contextlib.nullcontext)
    return found


def test_sequences_of_a_corpus_are_as_long_and_as_many_as_asked():
    """Two monitors of other sizes share a window's cache, and no sequences."""
    window = Window()
    for corpus, length, count in product("ab", (10, 20), (2, 3)):
        found = CorpusPPL(length_tok=length, sequences=count).sequences_in(window, corpus)
        assert found.shape == (count, length)
        assert (found[0, 0], found[-1, -1]) == (TOKENS[corpus][0], TOKENS[corpus][count * (length - 1)])
        assert window.asked[-1] > count * (length - 1)


def test_samples_have_text_of_their_own():
    """A text of any length is asked for as much as all samples of the longest cell take."""
    window, common = Window(), {"haystacks": ("a",), "samples": 3}
    needle_set(window, NeedleGrid(lengths_tok=(300, 500), depths=(0.5,), **common))
    needle_set(window, InterferenceGrid(befores_tok=(7, 400), afters_tok=(20, 300), **common))
    assert window.asked[0] >= 3 * 500 and window.asked[1] >= 3 * 700
    needle_set(window, NeedleGrid(lengths_tok=(300, 500), depths=(0.5,), **common))
    assert len(window.asked) == 2  # built once


def test_results_of_corpora_are_kept_apart(kept):
    window = Window()
    for length, count in product((10, 20), (2, 3)):
        list(CorpusPPL(corpora=("a", "b"), length_tok=length, sequences=count).measure(window))
    assert len(set(kept)) == len(kept) == 8


def test_results_of_needles_are_kept_apart(kept, monkeypatch):
    """By samples, by what is read off them, and by the heads that are set to zero."""
    grid = NeedleGrid(lengths_tok=(300,), depths=(0.5,), samples=1, haystacks=("a",))
    for sha, heads, label in product(
        "xy", ((), ("needle_mass",), ("mass_minus_null",), OWN[:1], OWN), ("", "without [(0, 1)]")
    ):
        made = needle_set(Window(), grid)
        monkeypatch.setattr(needles, "needle_set", lambda *_, made=made, sha=sha: NeedleSet(made.samples, sha))
        run_samples(Window(), grid, chosen_scores(heads), label)
        assert kept[-1][2:] == (bool(heads), "mass_minus_null" in heads)
    assert len({(name, what) for name, what, *_ in kept}) == len(kept) == 20


def test_a_journal_knows_what_was_run_by_name_and_samples():
    keys: list[str] = []
    one = SimpleNamespace(size=lambda: 1)
    journal = SimpleNamespace(read=lambda key: keys.append(key) or {}, batches=lambda trees, prefills: [])
    window = SimpleNamespace(journal=journal, groups=SimpleNamespace(pp=one, dp=one))
    for name, what in product("ab", ("x", "y")):
        assert run_trees(window, [], name, what) == {}
    assert len(set(keys)) == 4


def test_batches_are_all_the_work_in_order():
    for sizes in product((1, 2, 5), repeat=4):
        trees = [[number] * size for number, size in enumerate(sizes)]
        batches = list(FileJournal("unused").batches(trees, 4))
        assert [tree for batch in batches for tree in batch] == trees and all(batches)
        assert all(sum(map(len, batch[:-1])) < 4 for batch in batches)


def test_a_plan_counts_cells_samples_and_tokens():
    """Of corpora each is a cell; fields may be lists, as YAML has them."""
    corpora = CorpusPPL(corpora=("a", "b"), length_tok=20, sequences=3).work(Window())
    assert (corpora.cells, corpora.samples) == (2, 6)
    grid = dict(lengths_tok=[300, 500], depths=[0.25, 0.5], samples=3, haystacks=["a"], lattice_tok=60)
    shared, alone = (NeedleGrid(share=share, **grid).work(Window()) for share in (True, False))
    assert (shared.cells, shared.samples) == (alone.cells, alone.samples) == (4, 12)
    tokens = [sum(map(tokens_of, trees)) for trees in (shared.planned, shared.alone, alone.planned, alone.alone)]
    assert tokens[0] < tokens[1] == tokens[2] == tokens[3] == 3 * 2 * (300 + 500)
