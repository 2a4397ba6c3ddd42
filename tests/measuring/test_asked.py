"""What monitors ask for before anything is run: how much text, and names under which results are kept in a journal.

A window here gives made-up text and remembers; nothing is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from megatron_lccp.measuring.needles import Measured, needle_rows, needle_set, run_samples
from megatron_lccp.measuring.pace import Pace
from megatron_lccp.measuring.prefills import tokens_of
from megatron_lccp.measuring.runs import run_trees
from megatron_lccp.measuring.window import EvalWindow
from megatron_lccp.monitors import CorpusPPL, HeadAblation, InterferenceGrid, NeedleGrid, RetrievalHeads, corpus_ppl
from megatron_lccp.schema import Every, Monitor
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
        self.said: list[str] = []

    def caution(self, monitor: Any, why: str) -> None:
        self.said.append(f"{monitor.name}: {why}")

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


def test_a_sample_that_is_not_what_it_claims_says_so(kept):
    """Text that goes round, fewer sequences than asked for; nothing where there is enough."""
    window = Window()
    for length in (641, 720):
        grid = NeedleGrid(lengths_tok=(300, length), depths=(0.5,), samples=2, haystacks=("b", "a"), share=False)
        run_samples(window, grid)
        list(CorpusPPL(corpora=("a",), length_tok=length // 2, sequences=2).measure(window))
    longest = max(s.before_tok + s.after_tok for s in needle_set(window, grid).samples if s.haystack == "a")
    assert window.said == [
        f"NeedleGrid: a has 641 held-out tokens, and the longest sample takes {longest} of them: its text comes "
        f"{longest / 641:.1f} times in it; raise data.heldout_share, give the source more documents or name a longer one "
        "in haystacks",
        "CorpusPPL: a has held-out text for 1 of 2 sequences",
    ]


def test_a_needle_that_has_no_room_is_refused_beforehand():
    """By every monitor of needles, and in a plan, which only has a stand-in, by none."""
    window, cells = Window(), dict(lengths_tok=(40, 300), depths=(0.5,), haystacks=("a",))
    for monitor in (NeedleGrid(**cells), RetrievalHeads(**cells), HeadAblation(**cells, top=())):
        window.layers, window.heads, window.sketch = 2, 2, False
        (line,) = monitor.check(window)
        assert line.startswith("lengths_tok: 40 has no room for a haystack; needle, question and answer of a biography")
        fixed_tok = int(line.split()[-2])
        fits = dataclasses.replace(monitor, lengths_tok=(fixed_tok + 1,))
        assert not list(fits.check(window)) and list(dataclasses.replace(fits, lengths_tok=(fixed_tok,)).check(window))
        with pytest.raises(ValueError, match="no room for a haystack"):
            needle_set(window, monitor)
        window.sketch = True
        assert not list(monitor.check(window))


@pytest.mark.parametrize("right", [(), (0,), (1, 2), (0, 1, 2, 3)])
def test_names_and_values_have_scores_of_their_own(right):
    """Beside those of the whole sentence: NLL over content tokens, and whether each of them is the most likely."""
    window = Window()
    window.row = lambda monitor, metric, value, n, **where: (monitor.metric(metric).name, value, n)
    grid = NeedleGrid(lengths_tok=(300,), depths=(0.5,), samples=1, haystacks=("a",))
    made = needle_set(window, grid)
    content = np.array([False, True, True, False])
    sample = dataclasses.replace(
        made.samples[0], tokens=np.array([5, 6, 7, 8] * 2), needle=(0, 4), answer=(4, 8), content=content
    )
    best = np.array([token if k in right else 0 for k, token in enumerate((5, 6, 7, 8))])
    found = Found(np.array([4.0, 1.0, 2.0, 5.0]), best)
    rows = {
        name: (value, n) for name, value, n in needle_rows(window, grid, Measured(NeedleSet((sample,), "x"), [found]))
    }
    assert rows == {
        "answer_nll": (3.0, 4), "exact": (float(len(right) == 4), 4), "content_nll": (1.5, 2),
        "content_exact": (float({1, 2} <= set(right)), 2),
    }  # fmt: skip
    bare = dataclasses.replace(sample, content=np.zeros(4, bool))
    assert len(list(needle_rows(window, grid, Measured(NeedleSet((bare,), "x"), [found])))) == 2


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
    window = SimpleNamespace(journal=journal, groups=SimpleNamespace(pp=one, dp=one), pace=Pace())
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


@dataclasses.dataclass(frozen=True)
class Doubtful(Monitor):
    """Says that its samples are few, and may fail after that."""

    fails: bool = False
    every: Every = Every(steps=1)

    def measure(self, window: EvalWindow) -> list[Any]:
        window.caution(self, "few samples")
        window.caution(self, "few samples")
        if self.fails:
            raise ValueError("no text")
        return []


def test_a_caution_is_an_event_once_a_run(monkeypatch):
    """Of the first window whose rows it is about; one process here, so nothing is gathered."""
    monkeypatch.setattr("megatron_lccp.measuring.window.first_text", lambda text: text)
    tokenizer = load_tokenizer("examples/tiny_moe/tokenizer.model")
    window = EvalWindow(
        engine=SimpleNamespace(why_not_shared=lambda: None), run="r", tokenizer=tokenizer, config_hash="", stage="s",
        step=0, tokens=0, text=lambda name, at_least_tok: TOKENS["a"],
    )  # fmt: skip
    events: list[tuple[str, str]] = []
    for fails in (True, False, False):
        window.measure([Doubtful(fails)], lambda *event: events.append(event))
    assert events == [("monitor_error", "Doubtful: ValueError: no text"), ("sample", "Doubtful: few samples")]
