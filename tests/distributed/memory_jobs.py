"""What the rank of test_memory.py measures; like jobs.py, each function returns plain values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.distributed.jobs import trainee_for, window_on

VOCABULARY = 16384
"""The vocabulary padded to so many rows: at 64K tokens, logits of all tokens would take 2.1 GB as BF16."""


def resident(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, GB."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(field)).split()[1]) / 1e6


def measured_memory(path: Path, length_tok: int, grid: bool) -> dict[str, float]:
    """Peak resident memory, GB, of a grid of needles with head scores, or of a bare forward of its longest sample.

    examples/tiny_moe's model in BF16. The grid's cells share a trunk that is kept between two prefills.
    """
    from megatron_lccp.data.prefills import plain
    from megatron_lccp.model.forward import predict
    from megatron_lccp.monitors.head_scores import ALL
    from megatron_lccp.monitors.needle_grid import NeedleGrid
    from megatron_lccp.schema import Every

    sizes = [
        "num_layers=2", "hidden_size=128", "kv_channels=32", "ffn_hidden_size=256", "moe_ffn_hidden_size=128",
        "moe_shared_expert_intermediate_size=256", "num_moe_experts=8",
    ]  # fmt: skip
    more = ["--training.precision=bf16", "--monitors=[]", f"--model.vocab_multiple={VOCABULARY}"]
    trainee = trainee_for(path, [*(f"--megatron.transformer.{s}" for s in sizes), *more])
    torch.set_num_threads(2)
    monitor = NeedleGrid(
        every=Every(steps=1), lengths_tok=(length_tok // 4, length_tok), depths=(0.85, 0.95), samples=1,
        haystacks=("code",), lattice_tok=length_tok // 32, heads=ALL,
    )  # fmt: skip
    window = window_on(trainee)
    with window.opened():
        tokens = np.arange(length_tok) % 700
        start = resident("VmRSS")
        if grid:
            rows = len(list(monitor.measure(window)))
        else:
            answer = (length_tok - 25, length_tok)
            rows = len(predict(window.chunks, window.groups, [[plain(tokens, 0, answer)]], window.vocab_size))
    return {"peak_gb": resident("VmHWM"), "start_gb": start, "rows": rows}
