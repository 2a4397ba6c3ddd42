"""Where some rows look, found block by block and rank by rank, against dense attention rows in float64.

Half of the problems have queries and keys of small whole numbers, so that scores are exact and repeat: then the
position is the lowest one of the largest, to the token. (Keys that are equal but no whole numbers can differ in the
last bit of their scores: a matrix product may round by place.) Context parallelism is imitated here by reducing by hand
what each rank found, and done once with real all-reduces on gloo ranks, with gathers and their gradients.
Shapes: r rows, n query heads, g key heads, h head width, t keys.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lccp.measuring import taps
from megatron_lccp.measuring.taps import RowScores, over_context, pack, score_rows, unpack
from megatron_lccp.parallel.zigzag import local_chunks, local_positions
from megatron_lccp.training import health
from tests.distributed.ranks import run_ranks


class Problem:
    """Rows and keys, and the dense answer; whole numbers tie often and are exact."""

    def __init__(
        self, seed: int, rows: int, keys: int, groups: int, shared: int, width: int, whole_numbers: bool,
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        shape_q, shape_k = (rows, groups * shared, width), (keys, groups, width)
        if whole_numbers:
            self.query_rnh = torch.randint(-2, 3, shape_q, generator=g).float()
            self.key_tgh = torch.randint(-1, 2, shape_k, generator=g).float()
            self.key_tgh[keys // 2 :] = self.key_tgh[: keys - keys // 2].clone()  # all keys stand twice
            self.scale = 0.5
        else:
            self.query_rnh, self.key_tgh = torch.randn(shape_q, generator=g), torch.randn(shape_k, generator=g)
            self.scale = width**-0.5
        self.query_rnh, self.key_tgh = self.query_rnh.to(dtype), self.key_tgh.to(dtype)
        self.shared = shared
        self.position_r = torch.randint(0, keys, (rows,), generator=g)  # rows anywhere, before the span too
        a, b = torch.randint(0, keys + 1, (2,), generator=g).tolist()
        self.span = (min(a, b), max(a, b))

    def dense(self) -> tuple[np.ndarray, ...]:
        """(largest score, its lowest position, log-sum-exp, share inside the span), one loop over everything."""
        query, key = self.query_rnh.double().numpy(), self.key_tgh.double().numpy()
        rows, heads = query.shape[:2]
        best, where, lse, mass = (np.zeros((rows, heads)) for _ in range(4))
        for r in range(rows):
            for n in range(heads):
                scores = key[: self.position_r[r] + 1, n // self.shared] @ query[r, n] * self.scale
                weights = np.exp(scores - scores.max())
                best[r, n], lse[r, n] = scores.max(), scores.max() + math.log(weights.sum())
                where[r, n] = min(t for t, score in enumerate(scores) if score >= scores.max() - 1e-6)
                mass[r, n] = weights[self.span[0] : self.span[1]].sum() / weights.sum()
        return best, where, lse, mass

    def stretches(self, held: list[tuple[int, int]], cuts: list[float]) -> list[tuple[torch.Tensor, int]]:
        """The keys of `held`, cut further."""
        pieces = []
        for start, end in held:
            inner = sorted({start + int(cut * (end - start)) for cut in cuts} | {start, end})
            pieces += [(self.key_tgh[a:b], a) for a, b in zip(inner, inner[1:])]
        return pieces

    def score(self, held: list[tuple[int, int]], cuts: list[float]) -> RowScores:
        return score_rows(self.query_rnh, self.stretches(held, cuts), self.position_r, self.span, self.scale)

    def check(self, found: RowScores) -> None:
        best, where, lse, mass = self.dense()
        np.testing.assert_allclose(found.best_rn, best, atol=1e-5)
        np.testing.assert_array_equal(found.position_rn, where)
        np.testing.assert_allclose(found.lse_rn, lse, atol=2e-5)
        np.testing.assert_allclose(found.mass_rn, mass, atol=2e-5)
        assert found.position_rn.dtype == torch.int64 and found.best_rn.dtype == found.mass_rn.dtype == torch.float32


PROBLEMS = st.builds(
    Problem,
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    keys=st.integers(1, 60),
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    width=st.sampled_from([1, 2, 5, 16]),
    whole_numbers=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
CUTS = st.lists(st.floats(0, 1), max_size=4)


@settings(max_examples=80, deadline=None)
@given(problem=PROBLEMS, cuts=CUTS, block=st.sampled_from([1, 2, 3, 7, 4096]))
def test_rows_against_dense(problem, cuts, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taps, "BLOCK_TOK", block)
        problem.check(problem.score([(0, len(problem.key_tgh))], cuts))


@pytest.mark.parametrize("length_tok", [1, 7, 50, 150])
def test_largest_logit_against_dense(length_tok: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training health's, over several blocks of keys."""
    monkeypatch.setattr(health, "BLOCK_TOK", 7)
    row_r = np.linspace(0, length_tok - 1, min(health.SAMPLED_ROWS, length_tok)).round().astype(int)
    for seed in range(20):
        query_snh, key_sgh = (np.random.default_rng(seed).normal(size=(length_tok, heads, 8)) for heads in (4, 2))
        found = health.largest_logit(
            torch.tensor(query_snh), torch.tensor(key_sgh), 0.5, FakeGroup(1), (0, len(query_snh))
        )
        expected = max((key_sgh[: row + 1, n // 2] @ query_snh[row, n]).max() for row in row_r for n in range(4))
        assert float(found) == pytest.approx(0.5 * expected, rel=1e-5)


class FakeGroup:
    """A group whose all-reduces are done by hand."""

    def __init__(self, size: int):
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        assert self._size == 1
        return 0


def by_hand(monkeypatch: pytest.MonkeyPatch, found: list[RowScores]) -> RowScores:
    """`over_context` on every rank at once: the all-reduces of all ranks are collected, combined and handed back."""
    size, tape = len(found), []

    def record(tensor, op=torch.distributed.ReduceOp.SUM, group=None):
        mine.append(tensor.clone())
        if len(mine) <= len(tape):
            tensor.copy_(tape[len(mine) - 1])

    monkeypatch.setattr(taps.dist, "all_reduce", record)
    for step, combine in enumerate((torch.amax, torch.sum)):
        given_ = []
        for scores in found:
            mine: list[torch.Tensor] = []
            over_context(scores, FakeGroup(size))
            given_.append(mine[step])
            assert len(mine) == 2
        tape.append(combine(torch.stack(given_), 0))
    results = []
    for scores in found:
        mine = []
        results.append(over_context(scores, FakeGroup(size)))
    for other in results[1:]:
        for name in ("best_rn", "position_rn", "lse_rn", "lse_span_rn"):
            assert torch.equal(getattr(results[0], name), getattr(other, name))
    return results[0]


@settings(max_examples=60, deadline=None)
@given(problem=PROBLEMS, cuts=CUTS, size=st.sampled_from([1, 2, 4]), block=st.sampled_from([1, 5, 4096]))
def test_rows_of_all_ranks_together(problem, cuts, size, block):
    """Keys as zigzag ranks hold them. The last chunk of a sequence may be padding, which no rank scores: then some
    rank holds only keys after a row, or none at all."""
    keys = len(problem.key_tgh)
    length = -(-keys // (2 * size)) * 2 * size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taps, "BLOCK_TOK", block)
        found = []
        for rank in range(size):
            held = [(a, min(b, keys)) for a, b in local_chunks((0, length), rank, size) if a < keys]
            found.append(problem.score(held, cuts))
        problem.check(by_hand(patch, found) if size > 1 else over_context(found[0], FakeGroup(1)))


def test_ranks_without_keys():
    """Only the last rank holds the key that the rows see."""
    problem = Problem(1, 2, 1, 1, 1, 4, False)
    with pytest.MonkeyPatch.context() as patch:
        problem.check(by_hand(patch, [problem.score([], []), problem.score([], []), problem.score([(0, 1)], [])]))


def test_gaps_between_stretches():
    """Positions count, not places: keys 10 to 19 are not there."""
    problem = Problem(5, 4, 40, 2, 2, 8, False)
    problem.position_r, problem.span = torch.tensor([39, 25, 9, 21]), (5, 24)
    found = problem.score([(0, 10), (20, 40)], [])
    problem.key_tgh[10:20] = 0.0
    kept = [t for t in range(40) if not 10 <= t < 20]
    for r, row in enumerate(problem.position_r.tolist()):
        for n in range(4):
            scores = {t: (problem.key_tgh[t, n // 2] @ problem.query_rnh[r, n]).item() * problem.scale for t in kept}
            seen = {t: score for t, score in scores.items() if t <= row}
            assert found.position_rn[r, n] == max(seen, key=seen.get)
            whole = math.fsum(math.exp(score) for score in seen.values())
            inside = math.fsum(math.exp(score) for t, score in seen.items() if 5 <= t < 24)
            assert found.mass_rn[r, n].item() == pytest.approx(inside / whole, abs=1e-5)


def test_a_row_before_the_span_puts_nothing_there():
    problem = Problem(3, 3, 30, 1, 2, 8, False)
    problem.position_r, problem.span = torch.tensor([4, 19, 29]), (20, 25)
    mass = problem.score([(0, 30)], [0.5]).mass_rn
    assert (mass[:2] == 0).all() and (mass[2] > 0).all()
    problem.span = (7, 7)
    assert (problem.score([(0, 30)], []).mass_rn == 0).all()


@pytest.mark.parametrize("block", [1, 3, 4096])
def test_zero_ties_with_minus_zero(block, monkeypatch):
    """0.0 and -0.0 are the same score; the lower position wins, in a block, over blocks and over ranks."""
    monkeypatch.setattr(taps, "BLOCK_TOK", block)
    key = torch.tensor([-1.0, -0.0, 0.0, -0.0, -5.0]).view(5, 1, 1)
    query, at = torch.ones(1, 1, 1), torch.tensor([4])
    assert score_rows(query, [(key, 0)], at, (0, 5), 1.0).position_rn.item() == 1
    halves = [[(key[:1], 0), (key[4:], 4)], [(key[1:2], 1), (key[2:4], 2)]]
    found = [score_rows(query, keys, at, (1, 3), 1.0) for keys in halves]
    assert by_hand(monkeypatch, found).position_rn.item() == 1
    backwards = [score_rows(query, [(key[t : t + 1], t)], at, (0, 5), 1.0) for t in (2, 1, 3, 0, 4)]
    assert by_hand(monkeypatch, backwards).position_rn.item() == 1


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=True, allow_subnormal=True)


@settings(max_examples=300, deadline=None)
@given(pairs=st.lists(st.tuples(FLOATS, st.integers(0, 2**32 - 1)), min_size=2, max_size=12))
def test_packed_integers_are_in_order(pairs):
    """Larger score first, lower position among equals; and back again. Every fp32 but NaN."""
    score = torch.tensor([s for s, _ in pairs], dtype=torch.float32)
    position = torch.tensor([p for _, p in pairs])
    packed = pack(score, position)
    assert packed.dtype == torch.int64
    order = sorted(range(len(pairs)), key=lambda k: (score[k].item() + 0.0, -pairs[k][1]))
    for low, high in zip(order, order[1:]):
        same = score[low] == score[high] and pairs[low][1] == pairs[high][1]
        assert packed[low] == packed[high] if same else packed[low] < packed[high]
    again, where = unpack(packed)
    assert torch.equal(again, score) and torch.equal(where, position) and not torch.signbit(again[score == 0]).any()


def test_packed_extremes():
    tiny, largest = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    values = [-math.inf, -largest, -1.0, -tiny, -tiny / 2**23, 0.0, tiny / 2**23, tiny, 1.0, largest, math.inf]
    for position in (0, 1, 2**31, 2**32 - 1):
        packed = pack(torch.tensor(values), torch.full((len(values),), position))
        assert packed.tolist() == sorted(set(packed.tolist()))
        assert unpack(packed)[0].tolist() == values and (unpack(packed)[1] == position).all()


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 8), chunk=st.integers(1, 9))
def test_zigzag_covers_a_sequence_once(size, chunk):
    length = 2 * size * chunk
    held = [local_positions((0, length), rank, size).tolist() for rank in range(size)]
    assert sorted(position for rank in held for position in rank) == list(range(length))
    work = {sum(position + 1 for position in rank) for rank in held}
    assert len(work) == 1  # equal shares of causal attention
    for rank, mine in enumerate(held):
        expected = [t for t in range(length) if size == 1 or t // chunk in (rank, 2 * size - 1 - rank)]
        assert mine == expected == [t for a, b in local_chunks((0, length), rank, size) for t in range(a, b)]


def test_zigzag_takes_no_odd_length():
    assert local_chunks((0, 7), 0, 1) == [(0, 7)]
    with pytest.raises(AssertionError):
        local_chunks((0, 10), 0, 2)


@pytest.fixture(scope="module")
def on_ranks() -> list[dict]:
    return run_ranks(4, "parity_jobs.gathers", chunk=3, width=5, logit_rv=LOGITS, target_r=TARGETS)


LOGITS = np.random.default_rng(2).integers(-2, 3, (40, 10)).astype(np.float32)
"""Few values, so that the largest one often stands in several columns; 10 of 16, so that a rank has none of them."""
LOGITS[::2] += 1000  # whose exponentials no number holds
TARGETS = np.random.default_rng(3).integers(0, 10, 40)


@pytest.mark.parametrize("size", [2, 4])
def test_columns_of_all_ranks_together(on_ranks, size):
    """The lowest id on a tie, and losses over the tokens that exist."""
    logits = LOGITS.astype(np.float64)
    nll = scipy.special.logsumexp(logits, 1) - logits[np.arange(40), TARGETS]
    assert ((logits == logits.max(1, keepdims=True)).sum(1) > 1).sum() > 10
    for rank in range(size):
        assert on_ranks[rank][size]["best"].tolist() == logits.argmax(1).tolist()
        np.testing.assert_allclose(on_ranks[rank][size]["nll"], nll, atol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_gather_sequence_on_ranks(on_ranks, size):
    """The whole on every rank, in order; the gradient of a part is the sum of what all ranks want of it."""
    length = 2 * size * 3
    whole = np.arange(length * 5, dtype=np.float32).reshape(length, 5)
    wanted = sum((rank + 1.0) * np.arange(1.0, length + 1)[:, None] * np.ones(5) for rank in range(size))
    for rank in range(size):
        found = on_ranks[rank][size]
        np.testing.assert_array_equal(found["gathered"], whole)
        chunks = [k // 3 for k in range(length)]
        mine = [t for t in range(length) if chunks[t] in (rank, 2 * size - 1 - rank)]
        np.testing.assert_array_equal(found["gradient"], wanted[mine])


@pytest.mark.parametrize("size", [2, 4])
def test_over_context_on_ranks(on_ranks, size):
    for rank in range(4):
        for seed, found in on_ranks[rank][size]["scores"].items():
            problem = Problem(seed, 5, 12 * size, 2, 2, 8, whole_numbers=seed % 2 == 0)
            problem.check(RowScores(*(torch.as_tensor(x) for x in found)))


@pytest.mark.parametrize("size", [2, 4])
def test_attention_on_ranks(on_ranks, size):
    """With a softmax scale that is not the head's width, as MuP has it."""
    assert max(on_ranks[rank][size]["attention"] for rank in range(4)) < 1e-5


def test_ranks_agree(on_ranks):
    """Each rank hears what ranks 1 and 3 know: the sum, whether one of them, the lowest one's text or error."""
    for rank in range(4):
        found = on_ranks[rank]["all"]
        assert found["sum"] == [0, -1, -2, -3] and found["part"] == [-rank if k == rank else 0 for k in range(4)]
        assert found["any"] == [False, True, True, True] and found["first"] == [None, "b", ""]
        bad = ("JSONDecodeError", "bad: line 1 column 2 (char 1)")
        assert found["raised"] == [None, ("ValueError", "gone"), bad]
