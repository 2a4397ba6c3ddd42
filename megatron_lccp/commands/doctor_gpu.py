"""`lccp doctor --gpu`: on one GPU the parity of all kinds of kernels, and a short bench, in under ten minutes.

In: a device and a folder. Out: `doctor-gpu.json` (every number) and `doctor-gpu.md` (a section for docs/verified.md) in
the folder, written again after each row, so that what was measured is there if the rest is cut off. `--device cpu` is a
rehearsal: the same code at sizes that say nothing about time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from megatron_lccp.files import write_whole
from megatron_lccp.planning.bench_rows import run_way
from megatron_lccp.planning.bench_sizes import GIB, WAYS, fit_layers
from megatron_lccp.planning.parity import broken, run_parity, ways_of

MINUTES = 10.0
"""Time for all of it."""
MOST_LAYERS = 2
"""Layers of the slice: more say little more, and take the time of a length."""
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {
        "family": "hunyuan_a13b", "experts": 16, "lengths": [8192, 16384, 32768, 65536], "batch_tok": 65536,
        "loss_chunk_tok": 4096, "steps": 3, "warm_up": 2,
    },
    "cpu": {
        "family": "tiny_moe", "experts": 4, "lengths": [128, 256], "batch_tok": 256, "loss_chunk_tok": 100, "steps": 1,
        "warm_up": 0,
    },
}  # fmt: skip


def doctor_gpu(device: Literal["cuda", "cpu"], out: Path, minutes: float) -> int:
    """Measure and write; returns the exit code: 0, or 2 where kernels disagree or one of them fails. Raises ValueError."""
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--gpu: is for one process; start it without torchrun and srun")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--gpu: no GPU is here; --device=cpu rehearses it")
    if not minutes > 0:
        raise ValueError(f"--minutes: should be above 0, is {minutes:g}")
    start = time.time()
    until_s = start + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"about": about(device), "parity": [], "bench": [], "options": {}}
    engine = device == "cuda" and _has_engine()
    cut_off = False
    try:
        for row in run_parity(device, ways_of(device, engine), until_s):
            found["parity"].append(row)
            _tell(f"parity {row['way']}: {'; '.join(broken(row)) or 'agrees'}")
            _write(found, out, start)
        o = bench_options(device, engine, until_s)
        found["options"] = {name: value for name, value in vars(o).items() if name != "until_s"}
        for way in o.ways if o.layers else ():
            for row in run_way(way, o):
                found["bench"].append(row)
                what = row.get("failed") or f"{row['step_s']:.3f} s a step"
                _tell(f"bench {way} {row.get('length', '')}: {what}")
                _write(found, out, start)
    except KeyboardInterrupt:
        cut_off = True
        _tell("cut off; what was measured is written")
    print(_write(found, out, start), flush=True)
    if cut_off:
        return 130
    wrong = [row for row in found["parity"] if broken(row)] or not found["parity"]
    failed = [row for row in found["bench"] if row.get("failed") not in (None, "no time was left", "its time was up")]
    return 2 if wrong or failed or not found["bench"] else 0


def bench_options(device: Literal["cuda", "cpu"], engine: bool, until_s: float) -> argparse.Namespace:
    """The options of the bench, which are those of tools/bench_gpu.py; 0 layers if not one fits."""
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory / GIB if device == "cuda" else 1.0
    ways = [way for way in WAYS if way == "portable" or engine]
    o = argparse.Namespace(
        device=device, ways=ways, routing=["natural"], recompute=["moe"], peak_tflops=989.0, memory_gib=memory, seed=1,
        layers=0, until_s=until_s, **SIZES[device],
    )  # fmt: skip
    o.layers = min(MOST_LAYERS, fit_layers(o))
    while not o.layers and len(o.lengths) > 1:  # a GPU with less memory measures shorter texts
        o.lengths, o.batch_tok = o.lengths[:-1], o.batch_tok // 2
        o.layers = min(MOST_LAYERS, fit_layers(o))
    return o


def about(device: str) -> dict[str, str]:
    """What was measured on, and with what."""
    import torch

    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    names = ("torch", "megatron-core", "transformer-engine", "megatron_lccp")
    return {
        "device": f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" if gpu else "CPU (a rehearsal)",
        "python": platform.python_version(), "cuda": str(torch.version.cuda), "date": date.today().isoformat(),
        **{name: _version(name) for name in names},
    }  # fmt: skip


def section(found: Mapping[str, Any], took_s: float) -> str:
    """Markdown for docs/verified.md."""
    a = found["about"]
    engine = (
        f"Transformer Engine {a['transformer-engine']}" if a["transformer-engine"] else "without Transformer Engine"
    )
    lines = [
        f"## On {a['device']}", "",
        f"`lccp doctor --gpu` on {a['date']}: Python {a['python']}, torch {a['torch']}, megatron-core "
        f"{a['megatron-core']}, {engine}. It took {took_s / 60:.1f} minutes.", "",
        "Differences from FP32 on the CPU, from the same weights and tokens:", "",
        "| way | loss | gradient | answers, nat | sharing, nat | attention on the needle | in parts | |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in found["parity"]:
        numbers = ["-"] * 6 if "failed" in row else [f"{row[name]:.1e}" for name in row["bounds"]]
        lines.append(f"| {' | '.join([row['way'], *numbers, '; '.join(broken(row)) or 'agrees'])} |")
    if found["bench"]:
        o = found["options"]
        lines += [
            "", f"Training steps of {o['layers']} layers of {o['family']} at full width, {o['experts']} experts, "
            f"{o['batch_tok']:,} tokens a step, natural routing:", "",
            "| way | tokens | s | TFLOP/s | over BF16 TE | peak GiB | head scores over a forward |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        lines += [_bench_line(row, found["bench"]) for row in found["bench"]]
    return "\n".join(lines) + "\n"


def _bench_line(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if row.get("failed"):
        return f"| {row['way']} | {row.get('length', '-')} | {row['failed']} | | | | |"
    base = [r["step_s"] for r in rows if r["way"] == "te" and r.get("length") == row["length"] and r.get("step_s")]
    cells = [
        row["way"], f"{row['length']:,}", f"{row['step_s']:.3f}", f"{row['tflops']:.4g}",
        f"{base[0] / row['step_s']:.2f}x" if base else "-",
        f"{row['peak_bytes'] / GIB:.1f}" if row.get("peak_bytes") else "-",
        f"{row['heads_over_forward']:+.2%}" if row.get("heads_over_forward") is not None else "-",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _write(found: Mapping[str, Any], out: Path, start_s: float) -> str:
    text = section(found, time.time() - start_s)
    whole = json.dumps({**found, "took_s": time.time() - start_s}, indent=1)
    write_whole(out / "doctor-gpu.json", lambda draft: draft.write_text(whole + "\n", encoding="utf-8"))
    write_whole(out / "doctor-gpu.md", lambda draft: draft.write_text(text, encoding="utf-8"))
    return text


def _has_engine() -> bool:
    from megatron_lccp.model.attention import has_transformer_engine

    return has_transformer_engine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _tell(text: str) -> None:
    print(f"lccp doctor: {text}", file=sys.stderr, flush=True)
