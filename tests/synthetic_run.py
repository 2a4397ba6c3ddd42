"""A run directory with numbers like those of a real run: loss falls, needles are found, heads wake up.

In: a folder and sizes. Out: the folder filled through RunStore, and all rows that were written.
Run as a script to make one to look at: python tests/synthetic_run.py <folder>
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

from megatron_lccp.records.store import RunStore
from megatron_lccp.schema import Row

STEP_TOK = 4_194_304
CORPORA = ("en", "zh", "code")
MONITORS = ("CorpusPPL", "NeedleGrid", "InterferenceGrid", "RetrievalHeads", "HeadAblation", "health")


def make_run(
    dir: Path, *, steps: int = 300, lccp_from: int = 100, every: int = 25, lengths=(4096, 16384, 32768, 65536),
    depths=tuple(np.linspace(0, 1, 6)), samples: int = 3, layers: int = 8, heads: int = 8, skip=(150, 151),
    monitors=MONITORS, seed: int = 0, name: str = "synthetic <run>", ends_at: int | None = None,
) -> list[Row]:  # fmt: skip
    """Fill `dir`; windows at step 0, every `every` steps and at the end. Returns their rows in the order written.

    `ends_at`: stop there, as a run that was killed.
    """
    rng, store, written, healthy = np.random.default_rng(seed), RunStore(dir), [], []
    store.write_config(f"name: {name}\nseed: 0\n")
    strength = rng.beta(0.35, 4.0, size=(layers, heads))
    for step in range((steps if ends_at is None else ends_at) + 1):
        tokens, done = step * STEP_TOK, step / max(steps, 1)
        if step:
            trained_in = "pretrain" if step <= lccp_from else "lccp"
            store.append_step(_step_record(step, tokens, trained_in, lccp_from, step in skip, rng))
        if step and "health" in monitors:
            healthy += _health_rows(rng, dict(run=name, step=step, tokens=tokens, stage=trained_in), done)
        stage = "pretrain" if step < lccp_from else "lccp"  # at the boundary, the next stage measures
        if step in skip:
            store.append_event("skipped_step", "gradient norm is not finite <inf>", step=step)
        if step % every == 0 or step == steps:
            where = dict(run=name, config_hash="0123456789ab", step=step, tokens=tokens, stage=stage)
            rows = _window_rows(rng, where, done, lengths, depths, samples, strength, monitors)
            if healthy:
                store.write_health(healthy)
                healthy = []
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


def _health_rows(rng, base, done) -> list[Row]:
    rows, base = [], dict(base, config_hash="0123456789ab", monitor="health", n=64)
    for layer in range(2):
        load = rng.dirichlet(np.full(4, 20.0))
        rows += [Row(**base, metric="expert_load", value=float(share), unit="share", layer=layer, expert=expert)
                 for expert, share in enumerate(load)]  # fmt: skip
        for metric, value in (("router_entropy", 1.3 - 0.2 * done), ("attention_logit_max", 10 + 5 * done + layer),
                              ("grad_norm_attention", 0.4), ("grad_norm_experts", 0.1)):  # fmt: skip
            value *= 1 + 0.05 * rng.normal()
            rows.append(Row(**base, metric=metric, value=float(value), unit="nat", layer=layer))
    return rows


def _window_rows(rng, base, done, lengths, depths, samples, strength, monitors) -> list[Row]:
    step, rows = base["step"], []
    if "CorpusPPL" in monitors:
        for index, corpus in enumerate(CORPORA):
            nll = math.log(14 + 6 * index - (1.2 + 0.3 * index) * math.log(1 + step))
            where = dict(base, monitor="CorpusPPL", unit="nat", corpus=corpus, length_tok=1024)
            rows.append(Row(**where, metric="nll", value=nll, n=65536))
            for start, end in ((0, 256), (256, 1024)):
                further = nll + 0.3 - 0.0003 * start
                rows.append(Row(**where, metric="position_nll", value=further, n=end, from_tok=start, to_tok=end))
    if "NeedleGrid" in monitors:
        for length in lengths:
            for depth in depths:
                rows += _needle_rows(rng, base, done, length, float(depth), samples)
    if "InterferenceGrid" in monitors:
        rows += _interference_rows(rng, base, done, samples)
    if "RetrievalHeads" in monitors:
        rows += _head_rows(rng, base, done, strength, samples)
    if "HeadAblation" in monitors:
        rows += _ablation_rows(rng, base, done, samples)
    for monitor in monitors:
        if monitor == "health":
            continue
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
        of = dict(base, **where, monitor="NeedleGrid", n=9)  # names and values: better by a third
        rows.append(Row(**of, metric="content_nll", value=nll / 1.5, unit="nat"))
        rows.append(Row(**of, metric="content_exact", value=float(nll < 0.75), unit="share"))
    return rows


def _interference_rows(rng, base, done, samples) -> list[Row]:
    rows = []
    for before in (0, 1024, 4096):
        for after in (0, 1024, 16384):
            for sample in range(samples):
                nll = (0.2 + before / 4096) * math.exp(-3 * done) * (1 + after / 16384) + rng.gamma(2.0, 0.02)
                where = dict(before_tok=before, after_tok=after, length_tok=before + after + 64 + sample, sample=sample,
                             family="bios", sample_set="1f1f", n=21)  # fmt: skip
                for metric, value in (("answer_nll", nll), ("exact", float(nll < 0.5))):
                    rows.append(
                        Row(**base, **where, monitor="InterferenceGrid", metric=metric, value=value, unit="nat")
                    )
    return rows


def _ablation_rows(rng, base, done, samples) -> list[Row]:
    rows = []
    for ablated, costs in (("none", 0.0), ("top2", 3.0), ("random2.0", 0.4)):
        where = dict(base, monitor="HeadAblation", ablated=ablated)
        for sample in range(samples):
            noise = rng.normal(0, 0.05)
            of_sample = dict(where, sample=sample, sample_set="ab1a", unit="nat", n=21)
            rows.append(Row(**of_sample, metric="ablated_nll", value=1 - done + costs + noise))
            if ablated != "none":
                rows.append(Row(**of_sample, metric="nll_change", value=costs + noise))
        for head in range(0 if ablated == "none" else 2):
            rows.append(Row(**where, metric="ablated_head", value=1.0, unit="count", n=1, layer=0, head=head))
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
