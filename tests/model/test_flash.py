"""Attention in parts against dense attention in float64 under an explicit mask: outputs, log-sum-exps and gradients.

The mask is written key by key from what each query is told to see; the dense side repeats grouped heads and knows no
parts. Shapes: b batch, n query heads, g key/value heads, s queries, t keys, h head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_lccp.model.attention import NormAfterRope, PortableAttention
from megatron_lccp.model.flash import AttendParts, attend_parts, merge

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, by far where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one attention."""

    batch: int
    groups: int
    shared: int
    """Query heads of each key/value head."""
    width: int
    seed: int
    dtype: torch.dtype

    def draw(self, tokens: int, heads: int, number: int, size: float = 1.0) -> torch.Tensor:
        """[b, heads, tokens, h]"""
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        return (size * torch.randn(self.batch, heads, tokens, self.width, generator=generator)).to(self.dtype)

    def query(self, tokens: int, size: float = 1.0) -> torch.Tensor:
        return self.draw(tokens, self.groups * self.shared, 0, size)

    def key(self, tokens: int, number: int = 1) -> torch.Tensor:
        return self.draw(tokens, self.groups, number)


SHAPES = st.builds(
    Shape,
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    shared=st.integers(1, 4),
    width=st.sampled_from([1, 3, 8, 16, 40, 64, 128]),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
)


def dense(query, key, value, mask_st, scale):
    """(out, log-sum-exp) in float64; mask_st is True where query s sees key t."""
    q, k, v = (x.double() for x in (query, key, value))
    times = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, head // times] for head in range(q.shape[1])], 1) for x in (k, v))
    score = torch.einsum("bnsh,bnth->bnst", q, k) * scale
    score = score.masked_fill(~mask_st, -torch.inf)
    return torch.softmax(score, -1) @ v, torch.logsumexp(score, -1)


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=times * TOLERANCE[dtype] * scale)


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    queries=st.integers(1, 70),
    seen=st.lists(st.integers(1, 90), max_size=4),
    causal_at=st.none() | st.integers(0, 4),
    scale=st.floats(0.05, 2.0),
)
def test_attend_parts(shape, queries, seen, causal_at, scale):
    """Any number of stretches that all queries see, and among them, at any place, one that is causal."""
    sizes = [(tokens, False) for tokens in seen]
    if causal_at is not None or not sizes:
        sizes.insert(min(causal_at or 0, len(sizes)), (queries, True))
    query = shape.query(queries)
    parts = [(shape.key(t, 2 * k + 1), shape.key(t, 2 * k + 2), causal) for k, (t, causal) in enumerate(sizes)]
    out, lse = attend_parts(query, parts, scale)
    all_see, causally = torch.ones(queries, 1, dtype=torch.bool), torch.ones(queries, queries).tril().bool()
    mask = torch.cat([causally if causal else all_see.expand(queries, t) for t, causal in sizes], 1)
    expected = dense(query, *(torch.cat([part[k] for part in parts], 2) for k in (0, 1)), mask, scale)
    assert out.dtype == shape.dtype and out.shape == query.shape and lse.dtype == torch.float32
    close(out, expected[0], shape.dtype)
    close(lse, expected[1], torch.float32, times=4)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, queries=st.integers(1, 40), a=st.integers(1, 40), b=st.integers(1, 40), far=st.floats(-400, 400))
def test_merge(shape, queries, a, b, far):
    """Two disjoint sets of keys, one of which may outweigh the other beyond what an exponential can hold."""
    query = shape.query(queries)
    query[..., 0] = far
    keys, values = shape.key(a + b), shape.key(a + b, 2)
    keys[:, :, :a, 0], keys[:, :, a:, 0] = 1.0, -1.0
    seen = torch.ones(queries, a + b, dtype=torch.bool)
    whole, lse = dense(query, keys, values, seen, 1.0)
    halves = [dense(query, keys[:, :, cut], values[:, :, cut], seen[:, cut], 1.0) for cut in (slice(a), slice(a, None))]
    (out_a, lse_a), (out_b, lse_b) = ((out.to(shape.dtype), part.float()) for out, part in halves)
    merged, merged_lse = merge(out_a, lse_a, out_b, lse_b)
    assert merged.dtype == shape.dtype and merged.isfinite().all()
    # a log-sum-exp of some hundreds is known to 2^-16 in fp32, and the weights with it
    close(merged, whole, shape.dtype, times=5)
    weights = ((part.double() - lse).exp()[..., None] for part in (lse_a, lse_b))
    exact = sum(out.double() * weight for out, weight in zip((out_a, out_b), weights))
    once = torch.finfo(shape.dtype).eps / 2  # the sum is rounded, not its parts
    assert ((merged.double() - exact).abs() <= 1.01 * once * exact.abs() + 2e-4).all()
    torch.testing.assert_close(merged_lse.double(), lse, rtol=1e-6, atol=1e-4)


def test_merge_with_nothing():
    """A log-sum-exp of -inf stands for no keys."""
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    nothing, minus_inf = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for merged, merged_lse in (merge(out, lse, nothing, minus_inf), merge(nothing, minus_inf, out, lse)):
        torch.testing.assert_close(merged, out)
        torch.testing.assert_close(merged_lse, lse)


def test_no_keys_is_an_error():
    with pytest.raises(AssertionError, match="no keys"):
        attend_parts(torch.ones(1, 1, 2, 4), [], 1.0)


@st.composite
def layouts(draw: st.DrawFn):
    """(queries, keys, stretches, mask): stretches of queries in order, of whom each stands somewhere among the keys,
    sees itself causally, and of what is before it some disjoint pieces, in any order."""
    keys = draw(st.integers(1, 90))
    places = draw(st.lists(st.tuples(st.integers(0, keys - 1), st.integers(1, 40)), min_size=1, max_size=4))
    at, stretches, masks = 0, [], []
    for start, size in places:
        end = min(start + size, keys)
        mask = torch.zeros(end - start, keys, dtype=torch.bool)
        mask[:, start:end] = torch.ones(end - start, end - start).tril().bool()
        cuts = sorted(draw(st.sets(st.integers(0, start), max_size=5)))
        pieces = [piece for piece in zip(cuts, cuts[1:]) if draw(st.booleans())]
        parts = draw(st.permutations([(start, end, True)] + [(a, b, False) for a, b in pieces]))
        for a, b in pieces:
            mask[:, a:b] = True
        stretches.append((at, at + end - start, list(parts)))
        masks.append(mask)
        at += end - start
    return at, keys, stretches, torch.cat(masks)


def assert_gradients(shape: Shape, queries: int, keys: int, stretches, mask, scale: float) -> None:
    query, key, value = shape.query(queries), shape.key(keys), shape.key(keys, 2)
    grad = shape.draw(queries, shape.groups * shape.shared, 3)
    ours = [x.clone().requires_grad_() for x in (query, key, value)]
    theirs = [x.double().requires_grad_() for x in (query, key, value)]
    # as Megatron-Core hands them over: [s, b, n, h] seen through a permutation
    handed = [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in ours]
    out = AttendParts.apply(*handed, stretches, scale)
    expected, _ = dense(*theirs, mask, scale)
    close(out, expected, shape.dtype)
    out.backward(grad)
    expected.backward(grad.double())
    for mine, other in zip(ours, theirs):
        assert mine.grad.dtype == shape.dtype
        close(mine.grad, other.grad, shape.dtype, times=3)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, layout=layouts(), scale=st.floats(0.05, 1.0))
def test_forward_and_gradients(shape, layout, scale):
    assert_gradients(shape, *layout, scale)


@pytest.mark.parametrize("queries_alone", [True, False])
def test_gradients_are_summed_in_fp32(queries_alone):
    """512 equal shares, of which a sum in BF16 would lose the second half: 256 + 1 is 256 there.

    Either each query is a stretch of its own, and the gradients of two keys and values are the sums; or every key is a
    part of its own, and that of a query is.
    """
    few, many = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 512, 2)
    if queries_alone:  # scores are 0: attention is 1/2, and d score = 1/2 (d attention - its mean) = 1/4 or -1/4
        query, key, value = many, few.clone(), few
        query[..., 1], value[:, :, 0] = 1, 0.5
        stretches = [(k, k + 1, [(0, 2, False)]) for k in range(512)]
        expected = [None, torch.tensor([[0.0, 128], [0, -128]]), torch.full((2, 2), 256.0)]
    else:  # keys and values are (0, 1) and (0, -1) in turn: each part gives +1/512
        query, key, value = few[:, :, :1], many, many
        key[..., 1] = torch.tensor([1.0, -1.0]).repeat(256)
        stretches = [(0, 1, [(k, k + 1, False) for k in range(512)])]
        expected = [torch.tensor([[0.0, 1.0]]), None, None]
    given_ = [x.bfloat16().requires_grad_() for x in (query, key, value)]
    AttendParts.apply(*given_, stretches, 1.0).sum().backward()
    for x, wanted in zip(given_, expected):
        if wanted is not None:
            torch.testing.assert_close(x.grad[0, 0].float(), wanted, rtol=2**-6, atol=2**-6)


class Seen(torch.nn.Module):
    """A core attention that only remembers what it was given."""

    def __init__(self, **_unused):
        super().__init__()

    def forward(self, *given_):
        self.given = given_


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, tokens=st.integers(1, 40), scale=st.none() | st.floats(0.05, 1.0), epsilon=st.floats(1e-6, 1.0))
def test_core_attention_of_a_layer(shape, tokens, scale, epsilon):
    """The softmax scale is the head's width unless the configuration has another; queries and keys have their norms."""
    heads = shape.groups * shape.shared
    config = TransformerConfig(
        num_layers=1, hidden_size=heads, num_attention_heads=heads, num_query_groups=shape.groups,
        kv_channels=shape.width, layernorm_epsilon=epsilon, attention_dropout=0.0, use_cpu_initialization=True,
        params_dtype=shape.dtype, bf16=shape.dtype is torch.bfloat16,
    )  # fmt: skip
    q, k, v = shape.query(tokens), shape.key(tokens), shape.key(tokens, 2)
    handed = [x.permute(2, 0, 1, 3) for x in (q, k, v)]
    core = PortableAttention(config, 1, AttnMaskType.causal, softmax_scale=scale)
    mask = torch.ones(tokens, tokens).tril().bool()
    expected, _ = dense(q, k, v, mask, shape.width**-0.5 if scale is None else scale)
    close(core(*handed), expected.permute(2, 0, 1, 3).flatten(2), shape.dtype)

    normed = NormAfterRope(config, 1, inner=Seen)
    for x, norm, number in zip(handed, (normed.q_layernorm, normed.k_layernorm), (4, 5)):
        assert norm.weight.dtype == shape.dtype
        norm.weight.data = shape.draw(1, 1, number)[0, 0, 0]
    normed(*handed)
    for x, norm, found in zip(handed, (normed.q_layernorm, normed.k_layernorm), normed.inner.given):
        x = x.double()
        close(found, x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * norm.weight.double(), shape.dtype)
    assert normed.inner.given[2] is handed[2]


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, half=st.integers(1, 12), size=st.sampled_from([1, 2, 4]), data=st.data())
def test_a_context_parallel_rank(shape, half, size, data):
    """The two zigzag chunks of a rank; plain causal attention of its rows over the whole sequence."""
    rank, length = data.draw(st.integers(0, size - 1)), 2 * size * half
    chunks = [(k * half, (k + 1) * half) for k in (rank, 2 * size - 1 - rank)]
    stretches = [
        (i * half, (i + 1) * half, [(0, start, False)] * (start > 0) + [(start, end, True)])
        for i, (start, end) in enumerate(chunks)
    ]
    rows = torch.tensor([position for start, end in chunks for position in range(start, end)])
    mask = torch.arange(length) <= rows[:, None]
    assert_gradients(shape, 2 * half, length, stretches, mask, shape.width**-0.5)
