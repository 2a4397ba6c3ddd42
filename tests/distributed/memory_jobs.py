"""What the rank of test_memory.py measures; like jobs.py, each function returns plain values."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lccp.config.load import parse_config
from megatron_lccp.parallel.groups import make_groups, start_ranks
from tests.distributed.jobs import train_state_for, window_on

VOCABULARY = 16384
"""The vocabulary padded to so many rows: at 64K tokens, logits of all tokens would take 2.1 GB as BF16."""
SIZES = (
    "num_layers=2", "hidden_size=128", "num_attention_heads=1", "num_query_groups=1", "kv_channels=32",
    "ffn_hidden_size=256", "moe_ffn_hidden_size=128", "moe_shared_expert_intermediate_size=256", "num_moe_experts=8",
)  # fmt: skip
"""Like examples/tiny_moe's model, with one head a layer: heads take time, and no memory that grows with its square."""
KEPT_BYTES = 2 * 2 * 32 * 2
"""Key and value of a token: both, layers, width, BF16."""


def resident(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, GB."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(field)).split()[1]) / 1e6


def measured(job: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What the job says, how high resident memory rose meanwhile, from where, in GB, and how long it took."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    start, began = resident("VmRSS"), time.perf_counter()
    found = job(*arguments)
    return {"found": found, "peak_gb": resident("VmHWM"), "start_gb": start, "time_s": time.perf_counter() - began}


def peaks(path: Path, train_tok: int, measure_tok: int, prefill_tok: int, family: str) -> dict[str, dict[str, Any]]:
    """Memory of everything that must not take it, one after another in one process."""
    start_ranks(timeout_s=60)
    found = {"family": measured(count_parameters, path, family), "training": measured(train_one, path, train_tok)}
    # small prefills in FP32: of BF16 products, the CPU's library keeps code for every number of tokens of an expert
    for precision, tokens, limit in (("bf16", measure_tok, None), ("fp32", measure_tok // 4, prefill_tok)):
        more = ["--monitors=[]", f"--model.vocab_multiple={VOCABULARY}"]
        window = window_on(small_train_state(path, precision, *more))
        with window.opened():
            run_grid(window, 512, limit)  # sets up what a first call sets up
            found[f"bare {precision}"] = measured(run_bare, window, tokens)
            found[f"grid {precision}"] = measured(run_grid, window, tokens, limit)
    return found


def small_train_state(path: Path, precision: str, *more: str):
    sizes = (f"--megatron.transformer.{size}" for size in SIZES)
    train_state = train_state_for(path, [*sizes, f"--training.precision={precision}", *more])
    torch.set_num_threads(2 if precision == "bf16" else 1)  # the small ones gain nothing
    return train_state


def count_parameters(path: Path, family: str) -> tuple[int, int]:
    """(total, active) of a family built without memory."""
    from megatron_lccp.model.resolved import resolve
    from tests.distributed import meta

    config = parse_config(path, [f"--model.family={family}", "--model.vocab_multiple=1", "--megatron.transformer={}"])
    chunks = meta.build_without_memory(config, 0, make_groups(config.parallel, torch.device("cpu"), config.seed))
    return meta.count_parameters(chunks, resolve(config).shape.top_k)


def train_one(path: Path, length_tok: int) -> None:
    """A forward and backward of one sequence."""
    from megatron_lccp.training.step import compute_gradients, prepare_schedules

    stage = [f"--stages.base.{f}={length_tok}" for f in ("context_tok", "global_batch_tok")]
    train_state = small_train_state(path, "bf16", *stage, "--stages.base.micro_batch=1", "--monitors=[]")
    prepare_schedules(train_state.chunks)
    tokens = torch.randint(0, 700, (1, length_tok + 1))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": torch.arange(length_tok)[None]}
    compute_gradients(train_state.chunks, train_state.groups, [iter([batch])], 1, length_tok, 1)


def run_bare(window, length_tok: int) -> int:
    """A forward that measures nothing but the answer."""
    from megatron_lccp.measuring.forward import predict
    from megatron_lccp.measuring.prefills import plain

    sequence = plain(np.arange(length_tok) % 700, 0, (length_tok - 25, length_tok))
    return len(predict(window.chunks, window.groups, [[sequence]], window.vocab_size))


def run_grid(window, length_tok: int, prefill_tok: int | None) -> int:
    """Needles with every head score; the cells share a prefix that is kept between prefills."""
    from megatron_lccp.measuring.head_scores import HEAD_SCORES
    from megatron_lccp.monitors.needle_grid import NeedleGrid
    from megatron_lccp.schema import Every

    monitor = NeedleGrid(
        every=Every(steps=1), lengths_tok=(length_tok,), depths=(0.9, 0.95), samples=1,
        haystacks=("code",), lattice_tok=length_tok // 32, scores=tuple(HEAD_SCORES), prefill_tok=prefill_tok,
    )  # fmt: skip
    return len(list(monitor.measure(window)))
