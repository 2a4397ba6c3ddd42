"""What a rank does for tests/functional/test_smollm2.py: a real model through both engines and eagerly."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron_lccp.config.load import parse_config
from megatron_lccp.data.haystacks import bundled_tokens
from megatron_lccp.data.needles import NeedleSetSpec, build_needle_set
from megatron_lccp.data.tokenizers.load import load_tokenizer
from megatron_lccp.measuring.engine import Asked
from megatron_lccp.measuring.prefills import shared
from megatron_lccp.parallel.groups import start_ranks
from tests.distributed.hf_jobs import eagerly


def compare(folder: str, config: str, exported: str) -> dict[str, Any]:
    """By way of running: what is said of each sample; the samples' content; and of the copy that was trained, its losses
    on the first sample and how far its weights moved."""
    from megatron_lccp.measuring.hf_engine import HFEngine
    from megatron_lccp.measuring.megatron_engine import MegatronEngine
    from megatron_lccp.model.build import build_chunks, in_precision
    from megatron_lccp.training.setup import check_everything, load_base

    start_ranks()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(folder, bos="auto")
    spec = NeedleSetSpec(lengths_tok=(384,), depths=(0.0, 0.6), samples=1, haystacks=("bundled/stdlib",))
    samples = build_needle_set(spec, tokenizer, partial(bundled_tokens, tokenizer=tokenizer, at_least_tok=2048)).samples
    trees, asked = shared(samples, True, 1, 200), Asked(look=True, questions=True)
    hf = HFEngine.load(folder, dtype=torch.float32)
    found: dict[str, Any] = {}
    with hf.opened():
        found["hf"] = hf.predict([sum(trees, [])], asked)
    found["eager"] = [eagerly(hf.model, sample) for sample in samples]
    parsed = parse_config(config)
    model, _ = check_everything(parsed, config)
    chunks = build_chunks(parsed, model, hf.groups)
    load_base(chunks, parsed, model, parsed.model.init_from, tokenizer, next(iter(parsed.stages)))
    megatron = MegatronEngine([in_precision(chunk) for chunk in chunks], hf.groups, model.vocabulary)
    with megatron.opened():
        found["megatron"] = megatron.predict([sum(trees, [])], asked, lambda tokens: None, None)
    copy = HFEngine.load(exported, dtype=torch.float32)
    with copy.opened():
        found["trained"] = copy.predict([sum(trees, [])], Asked())
    moved = [float((a - b).abs().max()) for a, b in zip(hf.model.parameters(), copy.model.parameters(), strict=True)]
    return {**found, "samples": [dataclasses.replace(s) for s in samples], "moved": np.array(moved)}
