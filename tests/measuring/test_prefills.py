"""Shared prefills against the samples they stand for.

What every single token of a prefill sees, worked out from its segments, against the tokens and RoPE positions that it
has before it in its own sample; the cost in tokens against a forward for every sample.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_lccp.data.needles import NeedleSample, NeedleSetSpec
from megatron_lccp.measuring.flops import prefill_flops
from megatron_lccp.measuring.prefill_attention import why_no_rows, why_not_exact, why_not_shared
from megatron_lccp.measuring.prefills import Tree, deal, one_each, plain, shared, tokens_of
from megatron_lccp.measuring.taps import core_attentions
from megatron_lccp.model.shape import shape_of
from megatron_lccp.monitors import HeadAblation, InterferenceGrid, NeedleGrid, RetrievalHeads

Place = tuple[int, int]
"""(prefill of the tree, row in it)."""


def lay_out(
    before: int,
    after: int,
    hay: np.ndarray,
    needle,
    question,
    null_question,
    family: str = "f",
    index: int = 0,
    begin=(),
) -> NeedleSample:
    """begin | H[:before] | needle | H[before : before + after] | question | needle, spans counted by hand."""
    tokens = [*begin, *hay[:before], *needle, *hay[before : before + after], *question, *needle]
    start = len(begin) + before
    asked = start + len(needle) + after
    return NeedleSample(
        tokens=np.array(tokens, np.int64), needle=(start, start + len(needle)),
        question=(asked, asked + len(question)), answer=(asked + len(question), len(tokens)),
        content=np.ones(len(needle), bool), null_question=np.array(null_question, np.int64), before_tok=before,
        after_tok=after, depth_cell=None, family=family, kind="k", haystack="h", sample=index, seed=0,
    )  # fmt: skip


def one_fact(cells: Iterable[tuple[int, int]], sizes: tuple[int, int, int], fact: int, begin=()) -> list[NeedleSample]:
    """Samples of one fact in all cells; every token id of the fact is another, so that a wrong one shows."""
    cells = list(cells)
    ids = itertools.count(1000 * fact)
    needle, question, null = ([next(ids) for _ in range(size)] for size in sizes)
    hay = np.array([next(ids) for _ in range(max((b + a for b, a in cells), default=0))])
    return [lay_out(b, a, hay, needle, question, null, f"family{fact % 2}", fact // 2, begin) for b, a in cells]


SIZES = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6))
"""Tokens of needle, question and null question."""
TOK = st.integers(0, 25)


@st.composite
def crossed(draw: st.DrawFn) -> list[tuple[int, int]]:
    befores, afters = draw(st.lists(TOK, min_size=1, max_size=5)), draw(st.lists(TOK, min_size=1, max_size=4))
    return list(itertools.product(befores, afters))


@st.composite
def by_depth(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Lengths x depths on a lattice, through the grid of the package itself."""
    spec = NeedleSetSpec(
        lengths_tok=tuple(draw(st.lists(st.integers(21, 60), min_size=1, max_size=4))), haystacks=("h",),
        depths=tuple(draw(st.lists(st.floats(0, 1), min_size=1, max_size=5))),
        lattice_tok=draw(st.none() | st.integers(1, 20)),
    )  # fmt: skip
    return [(cell.before_tok, cell.after_tok) for cell in spec.cells(20)]


CELLS = st.lists(st.tuples(TOK, TOK), min_size=1, max_size=8) | crossed() | by_depth()


@st.composite
def sample_lists(draw: st.DrawFn) -> list[NeedleSample]:
    facts = draw(st.lists(st.tuples(CELLS, SIZES), min_size=1, max_size=3))
    begin = draw(st.sampled_from([(), (7777,)]))  # the same token in all samples, or none
    samples = [s for k, (cells, sizes) in enumerate(facts) for s in one_fact(cells, sizes, k, begin)]
    return draw(st.permutations(samples))


def all_seen(tree: Tree) -> dict[Place, list[Place]]:
    """Every token of a tree -> all tokens that it attends to, itself included, in the order they are handed over.

    Of earlier prefills only what is kept is there; what nothing sees any more is not kept.
    """
    seen: dict[Place, list[Place]] = {}
    kept: list[int] = []
    for number, prefill in enumerate(tree):
        assert prefill.start == sum(map(len, tree[:number])), "prefills follow on each other"
        kept.append(number)
        held = {place: (k, place - tree[k].start) for k in kept for place in range(tree[k].start, tree[k].end)}
        at, needed = prefill.start, {number}
        for segment in prefill.segments:
            assert segment.start == at < segment.end, "segments cover the prefill in order"
            at = segment.end
            assert all(0 <= start < end <= segment.start for start, end in segment.sees)
            before = [held[place] for start, end in segment.sees for place in range(start, end)]
            needed |= {k for k, _ in before}
            own = [held[place] for place in range(segment.start, segment.end)]
            for k, place in enumerate(own):
                seen[place] = before + own[: k + 1]
        assert at == prefill.end and len(prefill) == len(prefill.tokens) == len(prefill.positions)
        over = [k for k in kept if tree[k].keep_to <= prefill.end]
        assert all(k in needed for k in over), "nothing is kept longer than it is seen"
        kept = [k for k in kept if k not in over]
    assert not kept
    return seen


def assert_faithful(trees: Sequence[Tree], samples: Sequence[NeedleSample], null: bool) -> None:
    """Each sample is answered once, and what it is answered from is that sample and nothing else."""
    answers: Counter[int] = Counter()
    nulls: Counter[int] = Counter()
    # a forward for every sample has its null question in a sequence of its own
    starts = [[k for k, prefill in enumerate(tree) if prefill.start == 0] + [len(tree)] for tree in trees]
    for tree in (tree[a:b] for tree, firsts in zip(trees, starts) for a, b in pairwise(firsts)):
        seen = all_seen(tree)
        for places in seen.values():  # then a token's state is the one it has in its sample, by induction over layers
            row = places[-1]
            assert [tree[p].positions[r] for p, r in places] == list(range(len(places)))
            assert tree[row[0]].positions[row[1]] == len(places) - 1
            assert all(seen[place] == places[: k + 1] for k, place in enumerate(places))
        for number, prefill in enumerate(tree):
            assert prefill.tokens.dtype == prefill.positions.dtype == np.int64
            for tap in prefill.taps:
                segment = prefill.segment_of(tap)
                assert segment.start <= tap.question < tap.answer <= tap.end <= segment.end
                question, answer, end = (place - prefill.start for place in (tap.question, tap.answer, tap.end))
                whole = [tree[p].tokens[r] for p, r in seen[number, end - 1]]
                for k in tap.samples:
                    s = samples[k]
                    (nulls if tap.is_null else answers)[k] += 1
                    tail = s.null_question if tap.is_null else s.tokens[s.question[0] :]
                    assert whole == [*s.tokens[: s.question[0]], *tail]
                    assert prefill.positions[question] == s.question[0] and tap.needle == s.needle
                    if not tap.is_null:
                        assert [*prefill.positions[[answer, end - 1]]] == [s.answer[0], s.answer[1] - 1]
    assert answers == Counter(range(len(samples))) and nulls == Counter(range(len(samples)) if null else ())


def work_of(trees: Sequence[Tree]) -> float:
    """As `lccp measure --dry-run` counts it."""
    sizes = {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 1, "kv_channels": 8, "ffn_hidden_size": 8}
    return prefill_flops(shape_of(sizes), [prefill for tree in trees for prefill in tree], 9)


LIMIT = st.none() | st.integers(1, 70)
"""Tokens of a prefill."""


@settings(max_examples=200, deadline=None)
@given(samples=sample_lists(), null=st.booleans(), parts=st.integers(1, 5), limit=LIMIT)
def test_every_tap_sees_its_sample_and_nothing_else(samples, null, parts, limit):
    assert_faithful(shared(samples, null, parts, limit), samples, null)
    assert_faithful(one_each(samples, null), samples, null)


@settings(max_examples=200, deadline=None)
@given(samples=sample_lists(), null=st.booleans(), parts=st.integers(1, 5), limit=LIMIT)
def test_lengths_and_cost(samples, null, parts, limit):
    """A prefill is no longer than the limit or, if there is none, than the longest of its tree's samples would be with
    all the taps of its branch; then a tree with one place of the needle is one prefill. The limit costs no tokens, and
    sharing never costs more than not sharing: in every tree, the longest sample of the branch that starts last holds
    the shared prefix, the branch and a tap, and every other branch or tap is a part of another sample."""
    trees, each = shared(samples, null, parts, limit), one_each(samples, null)
    for tree in trees:
        mine = [samples[k] for prefill in tree for tap in prefill.taps for k in tap.samples]
        branches, longest, tap = [], 0, 0
        for before in {s.needle[0] for s in mine}:
            asked = {s.after_tok: s for s in mine if s.needle[0] == before}
            taps = [s.length_tok - s.question[0] for s in asked.values()]
            taps += [len(s.null_question) for s in asked.values()] * null
            branches.append(max(asked) + len(mine[0].content) + sum(taps))
            longest, tap = max(longest, before + branches[-1]), max(tap, *taps)
        room = limit or longest
        assert limit or len(branches) > 1 or len(tree) == 1
        assert max(map(len, tree)) <= max(room, tap)
        assert tokens_of(tree) == max(s.needle[0] for s in mine) + sum(branches)
        # any two in a row hold more than one could, but where a branch that is to be cut starts one
        assert sum(len(a) + len(b) <= room for a, b in pairwise(tree)) <= (len(branches) if limit else 0)
    assert tokens_of([p for tree in trees for p in tree]) <= tokens_of([p for tree in each for p in tree])
    assert work_of(trees) == work_of(shared(samples, null, parts))
    befores: dict[tuple[str, int], set[int]] = {}
    for s in samples:
        befores.setdefault((s.family, s.sample), set()).add(s.before_tok)
    wanted = -(-parts // len(befores))  # trees of a fact, if its needle stands in so many places
    assert len(trees) == sum(min(wanted, len(places)) for places in befores.values())


@settings(max_examples=150, deadline=None)
@given(samples=sample_lists(), null=st.booleans(), limit=st.integers(1, 70))
def test_what_is_kept_is_a_sample_and_a_few_prefills(samples, null, limit):
    """At every moment, however many branches there are."""
    for tree in shared(samples, null, 1, limit):
        longest = max(samples[k].length_tok for prefill in tree for tap in prefill.taps for k in tap.samples)
        for prefill in tree:
            kept = [p for p in tree if p.end <= prefill.start < p.keep_to]
            assert tokens_of(kept) <= longest + 2 * max(map(len, tree))


@settings(max_examples=100, deadline=None)
@given(samples=sample_lists(), null=st.booleans(), parts=st.integers(1, 5), replicas=st.integers(1, 6))
def test_deal_loses_nothing_and_keeps_trees_together(samples, null, parts, replicas):
    trees = shared(samples, null, parts)
    dealt = deal(trees, replicas)
    assert len(dealt) == replicas
    ids = [id(prefill) for mine in dealt for prefill in mine]
    assert sorted(ids) == sorted(id(prefill) for tree in trees for prefill in tree)
    for tree in trees:
        (mine,) = (one for one in dealt if any(prefill is tree[0] for prefill in one))
        first = next(k for k, prefill in enumerate(mine) if prefill is tree[0])
        assert all(a is b for a, b in zip(mine[first : first + len(tree)], tree, strict=True))
    sizes = [tokens_of(tree) for prefill in deal(trees, 1)[0] for tree in trees if prefill is tree[0]]
    assert sizes == sorted(sizes, reverse=True)  # so that the last ones even out
    loads = [tokens_of(mine) for mine in dealt]
    assert max(loads) - min(loads) <= max(map(tokens_of, trees))


def test_one_cell_is_an_ordinary_sequence():
    (sample,) = one_fact([(7, 5)], (3, 2, 4), 0)
    ((prefill,),) = shared([sample])
    assert prefill.is_plain and np.array_equal(prefill.tokens, sample.tokens) and not prefill.keep_to
    ((same,),) = shared([sample, sample])  # cells that coincide are asked once
    assert same.taps[0].samples == (0, 1) and len(same) == sample.length_tok
    (tree,) = shared([sample], null=True)
    assert tokens_of(tree) == sample.length_tok + 4
    (tree,) = shared([sample], prefill_tok=6)
    assert [len(prefill) for prefill in tree] == [6, 6, 3, 5] and tree[0].is_plain  # question and answer are one


def test_plain_is_a_causal_sequence():
    prefill = plain([5, 6, 7, 8], 3, (1, 4))
    assert prefill.is_plain and prefill.positions.tolist() == [0, 1, 2, 3] and prefill.taps[0].samples == (3,)
    assert not prefill.taps[0].is_null and (prefill.taps[0].answer, prefill.taps[0].end) == (1, 4)


@pytest.mark.parametrize(
    "kind, wrong, problem",
    [
        (NeedleGrid, {"prefill_tok": 0}, "prefill_tok: should be at least 1, or null .* is 0"),
        (InterferenceGrid, {"befores_tok": (-1,)}, "befores_tok and afters_tok: -1 is negative"),
        (RetrievalHeads, {"families": ("poem",)}, "families: 'poem' is none of"),
        (HeadAblation, {"depths": (1.5,)}, "samples and depths: should be"),
        (HeadAblation, {"haystacks": ()}, "haystacks: is empty"),
        (HeadAblation, {"random_draws": -1}, "random_draws: should be at least 0, is -1"),
        (RetrievalHeads, {"scores": ()}, "scores: is empty"),
    ],
)
def test_a_monitor_that_can_measure_nothing_is_not_made(kind, wrong, problem):
    """Not found out in a window, where it would be one error among the events of a long run."""
    with pytest.raises(ValueError, match=problem):
        kind(**{"haystacks": ("h",), **wrong})


def model_of(layers: Sequence[bool] = (True,), rope: type = RotaryEmbedding, **fields) -> GPTModel:
    """The shell of a model, of which only its layers are looked at, with core attention or without."""
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    for name, value in fields.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    model = GPTModel.__new__(GPTModel)
    torch.nn.Module.__init__(model)
    model.config, model.decoder = config, torch.nn.Module()
    vars(model)["rotary_pos_emb"] = rope.__new__(rope)
    model.decoder.layers = [
        SimpleNamespace(
            config=config, layer_number=1,
            self_attention=SimpleNamespace(core_attention=torch.nn.Identity()) if attends else torch.nn.Identity(),
        )
        for attends in layers
    ]  # fmt: skip
    return model


@pytest.mark.parametrize(
    "fields, exact",
    [
        ({"moe_expert_capacity_factor": 1.0}, True),  # without experts it says nothing
        ({"moe_expert_capacity_factor": 1.0, "num_moe_experts": 2}, False),
        ({"moe_input_jitter_eps": 0.1}, False),
        ({"moe_router_force_load_balancing": True}, False),
        ({"fp8": "hybrid"}, False),
        ({"softmax_scale": 0.3, "num_moe_experts": 2, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.1}, True),
    ],
    ids=str,
)
def test_where_a_token_depends_on_more_than_it_sees_nothing_is_shared(fields, exact):
    """Heads can be scored nevertheless."""
    models = [model_of(**fields)]
    assert (why_not_exact(models[0].config) is None) == (why_not_shared(models) is None) == exact
    assert why_no_rows(models) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"multi_latent_attention": True},
        {"window_size": (16, 0)},
        {"softmax_type": "learnable"},
        {"cuda_graph_impl": "local"},
    ],
    ids=str,
)
def test_attention_that_query_and_key_do_not_tell(fields):
    models = [model_of(**fields)]
    assert why_no_rows(models) and why_no_rows(models) == why_not_shared(models)


@pytest.mark.parametrize("fields, scale", [({}, 8**-0.5), ({"kv_channels": 16}, 0.25), ({"softmax_scale": 0.3}, 0.3)])
def test_softmax_scale_of_a_layer(fields, scale):
    ((layer, _, found),) = core_attentions([model_of(**fields)])
    assert (layer, found) == (0, scale)


def test_every_chunk_is_looked_at():
    """Other positions than RoPE cannot be shared; of a layer without core attention, as Mamba's, heads are not seen."""
    usual, other = model_of(), model_of(rope=type("Other", (RotaryEmbedding,), {}))
    assert why_not_shared([usual, usual]) is None and why_no_rows([usual, other]) is None
    assert "RoPE" in why_not_shared([usual, other])
    assert "no core attention" in why_no_rows([usual, model_of(layers=(True, False))])


K64 = 65536


def weightless(cells: Iterable[tuple[int, int]]) -> list[NeedleSample]:
    """Samples of one fact with needle 25, question 20 and answer 25, whose token ids take no memory."""
    samples = []
    for before, after in cells:
        asked = before + 25 + after
        samples.append(
            NeedleSample(
                tokens=np.broadcast_to(np.int64(1), asked + 45), needle=(before, before + 25),
                question=(asked, asked + 20), answer=(asked + 20, asked + 45), content=np.ones(25, bool),
                null_question=np.ones(12, np.int64), before_tok=before, after_tok=after, depth_cell=None, family="f",
                kind="k", haystack="h", sample=0, seed=0,
            )
        )  # fmt: skip
    return samples


def grid_of_the_paper() -> list[tuple[int, int]]:
    depths = tuple(k / 10 for k in range(11))
    lengths = tuple(4096 * k for k in range(1, 17))
    spec = NeedleSetSpec(lengths_tok=lengths, depths=depths, haystacks=("h",), lattice_tok=4096)
    return [(cell.before_tok, cell.after_tok) for cell in spec.cells(70)]


def triangle() -> list[tuple[int, int]]:
    axis = tuple(range(0, K64 + 1, 4096))
    spec = NeedleSetSpec(befores_tok=axis, afters_tok=axis, haystacks=("h",), most_tok=K64)
    return [(cell.before_tok, cell.after_tok) for cell in spec.cells(70)]


@pytest.mark.parametrize("cells, count, least", [(grid_of_the_paper(), 176, 10.1), (triangle(), 153, 10.6)])
def test_tokens_saved_at_64k(cells, count, least):
    samples = weightless(cells)
    assert len(samples) == count
    (tree,) = shared(samples)
    taps = {before: {after for b, after in cells if b == before} for before, _ in cells}
    unavoidable = max(taps) + sum(25 + max(afters) + 45 * len(afters) for afters in taps.values())
    assert tokens_of(tree) == unavoidable
    assert sum(s.length_tok for s in samples) / unavoidable >= least
    assert max(map(len, tree)) <= 1.02 * max(s.length_tok for s in samples)  # a branch from 0, with its taps
    assert sorted(k for prefill in tree for tap in prefill.taps for k in tap.samples) == list(range(count))
