"""The five scores of a head against plain loops written from their definitions, and heads whose score is known.

A head is a list of positions that it looks at, one for each answer row; what the model says is made up. Then which
sets of heads HeadAblation sets to zero.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lccp.data.needles import NeedleSample
from megatron_lccp.measuring.found import Found, Look
from megatron_lccp.measuring.head_scores import HEAD_SCORES, head_score, head_scores
from megatron_lccp.measuring.runs import Work
from megatron_lccp.monitors import RetrievalHeads, head_ablation
from megatron_lccp.monitors.head_ablation import HeadAblation
from tests.measuring.own_scores import NeedleOutput


def sample_of(hay, needle, content, before: int) -> NeedleSample:
    """hay[:before] | needle | the rest | question 90 91 | needle"""
    tokens = np.array([*hay[:before], *needle, *hay[before:], 90, 91, *needle], np.int64)
    asked, size = len(hay) + len(needle), len(needle)
    return NeedleSample(
        tokens=tokens, needle=(before, before + size), question=(asked, asked + 2), answer=(asked + 2, len(tokens)),
        content=np.array(content, bool), null_question=np.array([92, 93, 94]), before_tok=before,
        after_tok=len(hay) - before, depth_cell=None, family="f", kind="k", haystack="h", sample=0, seed=0,
    )  # fmt: skip


def found_of(position_LNr, written, masses=None) -> Found:
    position_LNr = np.array(position_LNr, np.int64)
    heads = position_LNr.shape[:2]
    answer, question, null = masses if masses is not None else np.zeros((3, *heads))
    look = Look(position_LNr, np.array(answer), np.array(question))
    return Found(np.zeros(len(written)), np.array(written, np.int64), look, np.array(null))


def by_the_loop(sample: NeedleSample, found: Found) -> dict[str, np.ndarray]:
    """Each score, head by head and token by token."""
    (low, high), answer = sample.needle, sample.tokens[sample.answer[0] : sample.answer[1]].tolist()
    layers, heads, rows = found.look.position_LNr.shape
    needle, written = sample.tokens[low:high].tolist(), found.best_r.tolist()
    scores = {metric: np.zeros((layers, heads)) for metric in list(HEAD_SCORES)}
    left, overlap = list(needle), 0
    for token in written[:50]:
        if token in left:
            left.remove(token)
            overlap += 1
    for layer in range(layers):
        for head in range(heads):
            copied = content = as_written = 0
            for r in range(rows):
                at = int(found.look.position_LNr[layer, head, r])
                if low <= at < high:
                    copied += sample.tokens[at] == answer[r]
                    content += bool(sample.tokens[at] == answer[r] and sample.content[r])
                    as_written += bool(r < 50 and sample.tokens[at] == written[r])
            scores["retrieval_score"][layer, head] = copied / len(answer)
            scores["content_score"][layer, head] = content / max(sum(sample.content), 1)
            scores["wu2024"][layer, head] = as_written / len(needle)
            scores["needle_mass"][layer, head] = found.look.answer_mass_LN[layer, head]
            null = found.null_mass_LN[layer, head]
            scores["mass_minus_null"][layer, head] = found.look.question_mass_LN[layer, head] - null
    if not any(sample.content):
        del scores["content_score"]
    if not overlap / len(needle) > 0.5:
        del scores["wu2024"]
    return scores


@settings(max_examples=300, deadline=None)
@given(data=st.data(), size=st.integers(1, 9) | st.integers(45, 70), seed=st.integers(0, 2**32 - 1))
def test_scores_against_loops(data, size, seed):
    """Few token ids, so that they repeat within the needle and in the haystack."""
    rng = np.random.default_rng(seed)
    ids = data.draw(st.integers(1, 6))
    hay = rng.integers(0, ids, data.draw(st.integers(0, 12)))
    needle = rng.integers(0, ids, size)
    content = rng.random(size) < data.draw(st.sampled_from([0, 0.5, 1]))
    sample = sample_of(hay, needle, content, data.draw(st.integers(0, len(hay))))
    follows = sample.needle[0] + np.arange(size)  # a head that copies, and looks elsewhere at times
    position = np.where(rng.random((2, 3, size)) < 0.5, follows, rng.integers(0, sample.length_tok, (2, 3, size)))
    written = np.where(
        rng.random(size) < data.draw(st.sampled_from([0.2, 0.5, 0.9])), needle, rng.integers(0, 99, size)
    )
    found = found_of(position, written, rng.random((3, 2, 3)))
    measured, expected = head_scores(sample, found, list(HEAD_SCORES)), by_the_loop(sample, found)
    assert measured.keys() == expected.keys()
    for metric, score in expected.items():
        np.testing.assert_allclose(measured[metric], score, atol=1e-9, err_msg=metric)
        assert measured[metric].shape == (2, 3)
    (only,) = head_scores(sample, found, ["needle_mass"]).items()
    assert only[0] == "needle_mass" and np.array_equal(only[1], found.look.answer_mass_LN)


def test_an_installed_package_ships_scores(tmp_path, monkeypatch):
    """By an entry point, under a short name; one that is written wrongly is refused with what was meant."""
    package = tmp_path / "their_scores-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: their-scores\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[megatron_lccp.head_scores]\nbrought = tests.measuring.own_scores:NeedleOutput\n"
    )
    with pytest.raises(ValueError, match="scores: 'brought' is no score of heads"):
        head_score("brought")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(head_score("brought"), NeedleOutput)
    monitor = RetrievalHeads(haystacks=("a",), scores=("brought", "retrieval_score"))
    assert [metric.name for metric in monitor.metrics] == ["needle_output", "retrieval_score"]
    with pytest.raises(ValueError, match="did you mean brought?"):
        RetrievalHeads(haystacks=("a",), scores=("brougth",))


def test_metrics_are_those_of_the_scores_that_are_asked_for():
    monitor = RetrievalHeads(haystacks=("a",), scores=("wu2024",))
    assert monitor.metric("wu2024").bounds == (0.0, 1.0) and RetrievalHeads.metrics == ()
    with pytest.raises(ValueError, match="does not declare 'needle_mass'"):
        monitor.metric("needle_mass")
    assert dataclasses.replace(monitor, scores=("needle_mass",)).metric("needle_mass").unit == "share"


HAY, NEEDLE = [1, 2, 3, 4, 5, 10, 12], [10, 11, 12, 13]
CONTENT = [True, False, False, True]


def planted() -> tuple[NeedleSample, np.ndarray]:
    """Needle at 3 to 6: tokens 1 2 3 [10 11 12 13] 4 5 10 12 90 91 [10 11 12 13]."""
    sample = sample_of(HAY, NEEDLE, CONTENT, 3)
    assert sample.tokens.tolist() == [1, 2, 3, 10, 11, 12, 13, 4, 5, 10, 12, 90, 91, 10, 11, 12, 13]
    heads = [
        [3, 4, 5, 6],  # copies
        [4, 5, 6, 7],  # one ahead: the row's own token, not the one to come
        [3, 4, 9, 10],  # half in the needle, half at the same ids in the haystack
        [9, 4, 10, 16],  # only the second in the needle; the last at the answer itself
        [2, 7, 2, 7],  # just outside
    ]
    return sample, np.array([heads])


def test_planted_heads():
    sample, position = planted()
    scores = head_scores(sample, found_of(position, NEEDLE), ("retrieval_score", "content_score", "wu2024"))
    assert scores["retrieval_score"].tolist() == [[1.0, 0.0, 0.5, 0.25, 0.0]]
    assert scores["content_score"].tolist() == [[1.0, 0.0, 0.5, 0.0, 0.0]]
    assert scores["wu2024"].tolist() == scores["retrieval_score"].tolist()  # greedy decoding gives the sentence


def test_a_token_that_the_needle_holds_twice():
    """Looking at either place counts: both hold the token."""
    sample = sample_of([1, 2], [7, 8, 7], [True] * 3, 1)
    scores = head_scores(sample, found_of([[[3, 2, 1], [1, 1, 1], [2, 2, 2]]], [7, 8, 7]), ("retrieval_score",))
    np.testing.assert_allclose(scores["retrieval_score"], [[1, 2 / 3, 1 / 3]])


def test_content_needs_content():
    sample = sample_of(HAY, NEEDLE, [False] * 4, 3)
    assert head_scores(sample, found_of([[[3, 4, 5, 6]]], NEEDLE), ("content_score", "needle_mass")).keys() == {
        "needle_mass"
    }


@pytest.mark.parametrize(
    "written, score",
    [
        ([10, 11, 12, 0], 0.75),  # three of four come right, and the head looks at them
        ([10, 11, 0, 0], None),  # half is not more than half
        ([13, 12, 11, 10], 0.0),  # all words, in another order: counts, but the head does not look at those
        ([11, 11, 11, 11], None),  # a word counts as often as the needle has it
        ([10, 11, 12, 12], 0.75),
    ],
)
def test_wu2024_counts_what_would_be_written(written, score):
    """`retrieval_score` does not ask what the model would write."""
    sample, _ = planted()
    found = found_of([[[3, 4, 5, 6]]], written)
    measured = head_scores(sample, found, ("wu2024", "retrieval_score"))
    assert measured["retrieval_score"].tolist() == [[1.0]]
    assert "wu2024" not in measured if score is None else measured["wu2024"].tolist() == [[score]]


def test_wu2024_stops_after_fifty_tokens():
    needle = list(range(100, 180))
    sample = sample_of([1, 2, 3], needle, [True] * 80, 2)
    position = [[np.arange(2, 82), np.where(np.arange(80) < 50, 0, np.arange(2, 82))]]
    scores = head_scores(sample, found_of(position, needle), ("wu2024", "retrieval_score"))
    np.testing.assert_allclose(scores["wu2024"], [[50 / 80, 0.0]])
    np.testing.assert_allclose(scores["retrieval_score"], [[1.0, 30 / 80]])
    needle = list(range(100, 200))  # 50 of 100 is not more than half: such a needle never counts
    sample = sample_of([1], needle, [True] * 100, 1)
    assert head_scores(sample, found_of([[np.arange(1, 101)]], needle), ("wu2024",)) == {}


def test_mass_minus_null_is_what_the_question_adds():
    sample, position = planted()
    masses = np.array([[[0.9] * 5], [[0.5, 0.4, 0.3, 0.2, 0.1]], [[0.5, 0.1, 0.4, 0.0, 0.1]]])
    scores = head_scores(sample, found_of(position, NEEDLE, masses), ("mass_minus_null", "needle_mass"))
    np.testing.assert_allclose(scores["mass_minus_null"], [[0.0, 0.3, -0.1, 0.2, 0.0]], atol=1e-12)
    assert (scores["needle_mass"] == 0.9).all()


def ablation(**fields) -> HeadAblation:
    return HeadAblation(haystacks=("code",), **fields)


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(1, 4),
    heads=st.integers(1, 6),
    seed=st.integers(0, 1000),
    draws=st.integers(1, 3),
    data=st.data(),
)
def test_sets_of_heads(layers, heads, seed, draws, data):
    """The best are the best, ties by layer and head; random ones are as many others; the same ones every time."""
    if layers * heads < 2:
        return
    score = np.random.default_rng(seed).integers(0, 5, (layers, heads)) / 4
    top = tuple(data.draw(st.lists(st.integers(1, layers * heads // 2), min_size=1, max_size=2, unique=True)))
    monitor = ablation(top=top, random_draws=draws, seed=seed)
    sets = monitor.sets(score)
    assert list(sets) == [name for k in top for name in (f"top{k}", *(f"random{k}.{d}" for d in range(draws)))]
    everything = [(layer, head) for layer in range(layers) for head in range(heads)]
    ranked = sorted(everything, key=lambda at: (-score[at], at))
    for k in top:
        assert sets[f"top{k}"] == ranked[:k]
        for draw in range(draws):
            drawn = sets[f"random{k}.{draw}"]
            assert len(set(drawn)) == len(drawn) == k and set(drawn) <= set(ranked[k:])
    assert ablation(top=top, random_draws=draws, seed=seed).sets(score) == sets


def test_random_heads_differ_by_seed_and_draw():
    score = np.zeros((8, 8))
    drawn = [
        tuple(ablation(top=(5,), random_draws=4, seed=seed).sets(score)[f"random5.{draw}"])
        for seed in range(3)
        for draw in range(4)
    ]
    assert len(set(drawn)) == len(drawn)
    others = {at for heads in drawn for at in heads}
    assert len(others) > 25  # not the same few


def test_named_heads_and_no_others():
    sets = ablation(top=(), heads=((1, 2), (0, 0))).sets(np.zeros((2, 3)))
    assert sets == {"named": [(0, 0), (1, 2)]}
    sets = ablation(top=(5,), random_draws=0).sets(np.arange(6.0).reshape(2, 3))
    assert sets == {"top5": [(1, 2), (1, 1), (1, 0), (0, 2), (0, 1)]}  # no control, no need of others


def test_a_plan_counts_the_whole_model_and_every_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head_ablation, "work_of", lambda *_: Work(1, 1, [], []))
    for monitor in (ablation(top=(), heads=((0, 0),)), ablation(top=(1, 2), random_draws=2, heads=((0, 0), (1, 2)))):
        assert monitor.work(None).times == 1 + len(monitor.sets(np.zeros((2, 3))))


@pytest.mark.parametrize("at", [(2, 0), (0, 3), (-1, 0), (0, -1)])
def test_a_head_that_is_not_there(at):
    with pytest.raises(ValueError, match=r"heads: \(.*\) is not in a model of 2 layers with 3 heads"):
        ablation(top=(), heads=((0, 0), at)).sets(np.zeros((2, 3)))


@pytest.mark.parametrize("random_draws, top", [(1, 4), (2, 6), (1, 5)])
def test_too_few_heads_for_a_control(random_draws, top):
    with pytest.raises(ValueError, match=f"top: {top} of 6 heads leave fewer than {top} others to draw from"):
        ablation(top=(top,), random_draws=random_draws).sets(np.zeros((2, 3)))


def test_more_heads_than_there_are():
    """Without a control too: a set must not be called top10 and hold 6 heads."""
    with pytest.raises(ValueError, match="top: 10"):
        ablation(top=(10,), random_draws=0).sets(np.zeros((2, 3)))
