"""FlashAttention's kernels in plain PyTorch, so that Transformer Engine's context parallelism can run on CPU ranks.

In: Transformer Engine, imported. Out, while `flash_attention_on_cpu` is open: it finds FlashAttention 2.7, and all
that is around the kernels (rings, all-gathers, all-to-alls, order of chunks, corrections, backward) is its own.
Written from the definition of attention, apart from megatron_lccp/model/flash.py.

Shapes: b batch, s queries, t keys, n query heads, g key/value heads, h head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


def forward(q_bsnh, k_btgh, v_btgh, *, softmax_scale, causal, window_size_left, window_size_right, softcap, **_):
    """(out [b, s, n, h], log-sum-exp [b, n, s], none, random state), as `_flash_attn_forward` returns them."""
    assert softcap == 0.0
    scores = _scores(q_bsnh, k_btgh, softmax_scale, causal, (window_size_left, window_size_right))
    out = torch.einsum("bnst,btnh->bsnh", scores.softmax(-1), _repeated(v_btgh, q_bsnh))
    return out.contiguous(), scores.logsumexp(-1), None, torch.empty(2, dtype=torch.uint8)


def backward(
    dout_bsnh, q_bsnh, k_btgh, v_btgh, out_bsnh, lse_bns, dq, dk, dv,
    *, softmax_scale, causal, window_size_left, window_size_right, softcap, **_,
):  # fmt: skip
    """Gradients into dq, dk, dv, given output and log-sum-exp of the whole attention that these keys are a part of."""
    assert softcap == 0.0
    scores = _scores(q_bsnh, k_btgh, softmax_scale, causal, (window_size_left, window_size_right))
    share = (scores - lse_bns[..., None]).exp()
    key, value = _repeated(k_btgh, q_bsnh), _repeated(v_btgh, q_bsnh)
    towards = torch.einsum("bsnh,btnh->bnst", dout_bsnh, value) - (dout_bsnh * out_bsnh).sum(-1).mT[..., None]
    dscores = share * towards * softmax_scale
    dq.copy_(torch.einsum("bnst,btnh->bsnh", dscores, key))
    for gradient, of_heads in (
        (dk, torch.einsum("bnst,bsnh->btnh", dscores, q_bsnh)),
        (dv, torch.einsum("bnst,bsnh->btnh", share, dout_bsnh)),
    ):
        gradient.copy_(of_heads.unflatten(2, (gradient.shape[2], -1)).sum(3))


def _scores(q_bsnh, k_btgh, scale: float, causal: bool, window: tuple[int, int]) -> torch.Tensor:
    """[b, n, s, t], -inf where a query may not look; the last query stands over the last key."""
    scores = torch.einsum("bsnh,btnh->bnst", q_bsnh, _repeated(k_btgh, q_bsnh)) * scale
    s, t = scores.shape[2:]
    ahead = torch.arange(t)[None] - (torch.arange(s)[:, None] + t - s)
    left, right = window[0], 0 if causal else window[1]
    hidden = ((ahead > right) if right >= 0 else False) | ((ahead < -left) if left >= 0 else torch.zeros(s, t) > 0)
    return scores.masked_fill(hidden, -torch.inf)


def _repeated(x_btgh: torch.Tensor, q_bsnh: torch.Tensor) -> torch.Tensor:
    return x_btgh.repeat_interleave(q_bsnh.shape[2] // x_btgh.shape[2], 2)


class _WaitedOnce:
    """A request of gloo, which would wait for ever if asked twice; Transformer Engine asks twice, as NCCL allows."""

    def __init__(self, request) -> None:
        self._request = request

    def wait(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            request.wait()


@contextlib.contextmanager
def flash_attention_on_cpu() -> Iterator[None]:
    """While open, Transformer Engine finds these kernels, for what it takes to be FP16 or BF16; they take any type."""
    from packaging.version import Version
    from transformer_engine.pytorch.attention.dot_product_attention import backends, context_parallel

    def exchange(*args, original=context_parallel.flash_attn_p2p_communicate):
        return [_WaitedOnce(request) for request in original(*args)]

    utils = backends.fa_utils
    versions = [name for name in vars(utils) if name.startswith("v2_") and name.endswith("plus")]
    with (
        mock.patch.multiple(utils, is_installed=True, version=Version("2.7.4"), **dict.fromkeys(versions, True)),
        mock.patch.multiple(backends, _flash_attn_fwd=forward, _flash_attn_bwd=backward),
        mock.patch.object(context_parallel, "flash_attn_p2p_communicate", exchange),
        mock.patch.object(torch, "compile", lambda function=None, **_: function),  # small sums of log-sum-exps
    ):
        yield
