"""Measuring for bench_monitors.py: the best time of several ways, and one point of its table `eager`.

In: what to run; for a point the request that bench_monitors.py gives a process of its own. Out: times in s, memory in
bytes, and what was computed; a point returns the first two and writes the third to a file.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import WARM_UP_TOK, Ours, depths_of, flat, theirs

from megatron_lccp.data.needles import NeedleSample
from megatron_lccp.measuring.prefills import shared
from megatron_lccp.planning.bench_samples import sample_of


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, bytes."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024


def with_memory(run: Callable[[], Any]) -> tuple[Any, int]:
    """(what `run` returns, how far resident memory rose meanwhile, bytes)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that is free but held would hide what is taken from it
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = run()
    return result, resident("VmHWM") - before


def best_of(ways: dict[str, Callable[[], Any]], o: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """What each way returns and its fastest time in s; the ways take turns, so that a busy machine hits all of them."""
    results, seconds, spent = {}, dict.fromkeys(ways, math.inf), dict.fromkeys(ways, 0.0)
    for repeat in range(o.repeats):
        for name, way in ways.items():
            if repeat and spent[name] >= o.seconds:
                continue
            start = time.perf_counter()
            results[name] = way()
            took = time.perf_counter() - start
            seconds[name], spent[name] = min(seconds[name], took), spent[name] + took
            say(f"{name}: {took:.3f} s")
    return results, seconds


def point(o: argparse.Namespace) -> dict[str, float]:
    """What `ask` asks for."""
    if o.way == "weights":
        from safetensors.torch import save_file

        save_file(Ours(o).hunyuan_state(), o.weights)
        return {}
    from megatron_lccp.parallel import compat

    compat.quiet()
    run = eager_way(o) if o.way == "eager" else our_way(o)
    run([sample_of(WARM_UP_TOK, o)])
    samples = [sample_of(o.length, o)] if o.depths == 1 else depths_of(o.length, o)
    start = time.perf_counter()
    result, extra = with_memory(lambda: run(samples))
    seconds = time.perf_counter() - start
    if o.repeats > 1 and seconds < o.seconds:
        o.repeats, o.seconds = o.repeats - 1, o.seconds - seconds
        seconds = min(seconds, best_of({f"{o.way} {o.length}": lambda: run(samples)}, o)[1].popitem()[1])
    np.savez(o.out, **result)
    return {"seconds": seconds, "bytes": extra}


def our_way(o: argparse.Namespace) -> Callable[[Sequence[NeedleSample]], dict[str, np.ndarray]]:
    """Answer loss and, unless it is the bare forward, where heads look, by the package."""
    from megatron_lccp.measuring.head_scores import head_scores

    model, look, null = Ours(o), o.way == "ours", "mass_minus_null" in o.scores

    def run(samples: Sequence[NeedleSample]) -> dict[str, np.ndarray]:
        trees = shared(samples, null, prefill_tok=o.prefill_tok if look else None)
        found = model.predict(flat(trees), look, null)
        result = {"nll": np.stack([found[k].nll_r for k in range(len(samples))])}
        if look:
            result["position"] = np.stack([found[k].look.position_LNr for k in range(len(samples))])
            scores = [head_scores(sample, found[k], o.scores) for k, sample in enumerate(samples)]
            result |= {name: np.stack([score[name] for score in scores]) for name in o.scores}
        return result

    return run


def eager_way(o: argparse.Namespace) -> Callable[[Sequence[NeedleSample]], dict[str, np.ndarray]]:
    """The same from full matrices; and how the attention at our positions compares with the largest."""
    import torch

    from megatron_lccp.measuring.found import Found, Look
    from megatron_lccp.measuring.head_scores import head_scores

    model = theirs(o)
    ours = torch.as_tensor(np.load(o.ours)["position"]).long()

    def forward(tokens: np.ndarray):
        return model(torch.as_tensor(tokens)[None], output_attentions=True, use_cache=False)

    def mass(out, rows: slice, needle: tuple[int, int]) -> np.ndarray:
        on_needle = [attention[0, :, rows, slice(*needle)].sum(-1).mean(-1) for attention in out.attentions]
        return torch.stack(on_needle).numpy()

    def one(sample: NeedleSample, ours_LNr: torch.Tensor) -> dict[str, np.ndarray]:
        (start, end), asked = sample.answer, sample.question[0]
        out = forward(sample.tokens)
        nll = torch.nn.functional.cross_entropy(
            out.logits[0, start - 1 : end - 1], torch.as_tensor(sample.tokens[start:end]), reduction="none"
        )
        rows = [attention[0, :, start - 1 : end - 1] for attention in out.attentions]
        position = torch.stack([row.argmax(-1) for row in rows])
        at_ours = torch.stack([row.gather(-1, at[..., None])[..., 0] for row, at in zip(rows, ours_LNr)])
        ratio = at_ours / torch.stack([row.amax(-1) for row in rows])
        masses = (mass(out, slice(*span), sample.needle) for span in ((start - 1, end - 1), (asked, start)))
        look = Look(position.numpy(), *masses)
        found = Found(nll.numpy(), nll.numpy(), look)
        del out, rows  # before the next matrices come
        if "mass_minus_null" in o.scores:
            null = np.concatenate([sample.tokens[:asked], sample.null_question])
            found.null_mass_LN = mass(forward(null), slice(asked, len(null)), sample.needle)
        about = {"nll": found.nll_r, "position": look.position_LNr, "ratio": ratio.numpy()}
        return about | head_scores(sample, found, o.scores)

    def run(samples: Sequence[NeedleSample]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            warm_up = samples[0].length_tok != o.length
            results = [
                one(sample, torch.zeros_like(ours_LNr) if warm_up else ours_LNr)
                for sample, ours_LNr in zip(samples, ours)
            ]
        return {name: np.stack([result[name] for result in results]) for name in results[0]}

    return run
