"""A run directory with numbers like those of a real run: loss falls, needles are found, heads wake up.

In: a folder and sizes. Out: the folder filled through RunStore, and all rows that were written.
Run as a script to make one to look at: python tests/analysis/synthetic_run.py <folder>
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from megatron_lccp.records import RunStore
from megatron_lccp.schema import Row

STEP_TOK = 4_194_304
CORPORA = ("en", "zh", "code")


def make_run(
    dir: Path, *, steps: int = 300, lccp_from: int = 100, every: int = 25, lengths=(4096, 16384, 32768, 65536),
    depths=tuple(np.linspace(0, 1, 6)), samples: int = 3, layers: int = 8, heads: int = 8, skip=(150, 151),
    monitors=("CorpusPPL", "NeedleGrid", "RetrievalHeads"), seed: int = 0,
) -> list[Row]:  # fmt: skip
    """Fill `dir`; windows at step 0, every `every` steps and at the end. Returns the rows in the order written."""
    rng, store, written = np.random.default_rng(seed), RunStore(dir), []
    store.write_config("name: synthetic <run>\nseed: 0\n")
    strength = rng.beta(0.35, 4.0, size=(layers, heads))
    for step in range(steps + 1):
        tokens, done = step * STEP_TOK, step / max(steps, 1)
        if step:
            trained_in = "pretrain" if step <= lccp_from else "lccp"
            store.append_step(_step_record(step, tokens, trained_in, lccp_from, step in skip, rng))
        stage = "pretrain" if step < lccp_from else "lccp"  # at the boundary, the next stage measures
        if step in skip:
            store.append_event("skipped_step", "gradient norm is not finite <inf>", step=step)
        if step % every == 0 or step == steps:
            rows = _window_rows(rng, step, tokens, stage, done, lengths, depths, samples, strength, monitors)
            store.write_window(rows, step)
            written += rows
    store.append_event("monitor_error", "NeedleGrid: out of memory at length 131072", step=lccp_from)
    store.append_event("resume", f"from step {lccp_from + 40}", step=lccp_from + 40)
    return written


def _step_record(step, tokens, stage, lccp_from, skipped, rng) -> dict:
    loss = (
        2.1
        + 6.5 * step**-0.45
        + (0.15 * math.exp(-(step - lccp_from) / 30) if step > lccp_from else 0)
        + rng.normal(0, 0.03)
    )
    lr = 3e-4 * min(1, step / 20) if stage == "pretrain" else 1e-4
    rate = 2.1e5 if stage == "pretrain" else 1.4e5
    rate *= 1 + rng.normal(0, 0.02)
    grad = math.inf if skipped else math.exp(rng.normal(-0.5, 0.25)) + 3 * math.exp(-step / 10)
    return {"step": step, "tokens": tokens, "stage": stage, "loss": loss, "grad_norm": grad, "lr": lr,
            "tokens_per_s": rate, "time_s": STEP_TOK / rate, "skipped": skipped, "memory_gib": 61.5}  # fmt: skip


def _window_rows(rng, step, tokens, stage, done, lengths, depths, samples, strength, monitors) -> list[Row]:
    base = dict(run="synthetic <run>", config_hash="0123456789ab", step=step, tokens=tokens, stage=stage)
    rows = []
    if "CorpusPPL" in monitors:
        for index, corpus in enumerate(CORPORA):
            nll = math.log(14 + 6 * index - (1.2 + 0.3 * index) * math.log(1 + step))
            rows.append(
                Row(
                    **base,
                    monitor="CorpusPPL",
                    metric="nll",
                    value=nll,
                    unit="nat",
                    n=65536,
                    corpus=corpus,
                    length_tok=1024,
                )
            )
    if "NeedleGrid" in monitors:
        for length in lengths:
            for depth in depths:
                rows += _needle_rows(rng, base, done, length, float(depth), samples)
    if "RetrievalHeads" in monitors:
        rows += _head_rows(rng, base, done, strength, samples)
    for monitor in monitors:
        rows.append(Row(**base, monitor=monitor, metric="window_time", value=20 + 5 * len(monitor), unit="s", n=1))
    rows.append(Row(**base, monitor="UserMonitor", metric="router_entropy", value=2.0 - done, unit="nat", n=64))
    return rows


def _needle_rows(rng, base, done, length, depth, samples) -> list[Row]:
    hard = math.log2(length / 1024) / 6 * (0.5 + 2 * depth * (1 - depth))
    rows, haystack = [], length - 64
    for sample in range(samples):
        nll = max(0.005, 7.5 * hard * math.exp(-5.0 * done) + rng.gamma(2.0, 0.02))
        where = dict(
            length_tok=length, depth=depth + 0.001 * sample, depth_cell=depth, before_tok=int(haystack * depth),
            after_tok=haystack - int(haystack * depth), family="dolores_park", sample=sample, sample_set="5eed",
        )  # fmt: skip
        rows.append(Row(**base, **where, monitor="NeedleGrid", metric="answer_nll", value=nll, unit="nat", n=21))
        exact = float(nll < 0.5)
        rows.append(Row(**base, **where, monitor="NeedleGrid", metric="exact", value=exact, unit="share", n=21))
    return rows


def _head_rows(rng, base, done, strength, samples) -> list[Row]:
    rows = []
    for (layer, head), most in np.ndenumerate(strength):
        for sample in range(samples):
            score = float(np.clip(most * min(1, 2.5 * done) + rng.normal(0, 0.01), 0, 1))
            where = dict(
                layer=layer, head=head, sample=sample, family="bios", sample_set="b105", n=30, length_tok=65536
            )
            for metric, value in (("retrieval_score", score), ("needle_mass", score / 2)):
                rows.append(Row(**base, **where, monitor="RetrievalHeads", metric=metric, value=value, unit="share"))
    return rows


if __name__ == "__main__":
    make_run(
        Path(sys.argv[1]), lengths=[1024 * 2**i for i in range(7)], depths=np.linspace(0, 1, 11), layers=16, heads=16,
        steps=1200, lccp_from=300, every=100,
    )  # fmt: skip
