"""Why samples begin with a token of their own, on a real model: without one the needle becomes the attention sink.

Eager attention of transformers, no engine of ours; `-s` prints the figures.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from megatron_lccp.data.haystacks import bundled_tokens
from megatron_lccp.data.needles import NeedleSample, NeedleSetSpec, build_needle_set
from megatron_lccp.data.tokenizers.load import load_tokenizer
from tests.smollm2 import smollm2

LENGTH, CASES = 512, (("none", 0.0), ("auto", 0.0), ("none", 0.5))


def sample_of(folder, bos: str, depth: float) -> NeedleSample:
    tokenizer = load_tokenizer(folder, bos=bos)
    spec = NeedleSetSpec(lengths_tok=(LENGTH,), depths=(depth,), samples=1, haystacks=("bundled/stdlib",))
    text = functools.cache(lambda name: bundled_tokens(name, tokenizer, LENGTH))
    (sample,) = build_needle_set(spec, tokenizer, text).samples
    return sample


def test_without_a_begin_token_the_needle_is_the_attention_sink() -> None:
    """And the model is certain of name and value, though it would begin the answer with other words than ours."""
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    import torch
    from transformers import AutoModelForCausalLM

    folder = smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    heads = {}
    for bos, depth in CASES:
        s = sample_of(folder, bos, depth)
        rows, target = slice(s.answer[0] - 1, s.answer[1] - 1), s.tokens[slice(*s.answer)]
        with torch.no_grad():
            out = model(torch.as_tensor(s.tokens)[None], output_attentions=True)
        right = out.logits[0, rows].argmax(-1).numpy() == target
        mass = np.stack([of_layer[0, :, rows, slice(*s.needle)].sum(-1).mean(-1) for of_layer in out.attentions])
        heads[bos, depth] = int((mass > 0.5).sum())
        print(f"{bos}, depth {depth}: {heads[bos, depth]} of {mass.size} heads")
        print(f"right: {right.mean():.0%} of the answer's tokens, {right[s.content].mean():.0%} of name and value")
        assert right[s.content].mean() > 0.8 and not right[0], "name and value, but not our first word"
    assert heads["none", 0.0] > 10 * heads["none", 0.5] and heads["auto", 0.0] < 2 * heads["none", 0.5]
