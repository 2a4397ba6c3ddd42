"""Training and head scores on one GPU: a slice of a model at full width, by kernels, precision, routing and length.

    python tools/bench_gpu.py                                  # Hunyuan-A13B, 8K to 64K, all kernels and recipes
    python tools/bench_gpu.py --ways te te-blockwise --routing balanced --recompute moe_act --json found.json
    python tools/bench_gpu.py --device cpu --family tiny_moe --lengths 256   # only shows that it runs

In: sizes on the command line. Out: a table, on request JSON. Every way is a process of its own that takes whole
training steps of the package (forward, backward, gradient reduction, AdamW) on drawn tokens; ratios are within one
call. `natural` routing is what the router of drawn weights does, `balanced` sends each token to random experts
(moe_router_force_load_balancing); the fullest expert's load is shown, in multiples of an even one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lccp.planning.bench_rows import run_way
from megatron_lccp.planning.bench_sizes import GIB, WAYS, fit_layers

FORMULA = (
    "FLOPs of a step = 3 x (2 x active parameters of the layers x tokens + 4 x layers x heads x width x pairs\n"
    "                       + 2 x hidden x vocabulary x tokens), causal pairs = length x (length + 1) / 2 a sequence;\n"
    "recomputation, norms, softmax and routing are not counted."
)
AIM_MFU, AIM_FP8, AIM_HEADS = 0.45, 1.2, 0.01


def main(arguments: Sequence[str] | None = None) -> int:
    o = options().parse_args(arguments)
    if problem := refusal(o):
        print(f"bench_gpu: {problem}", file=sys.stderr)
        return 2
    o.memory_gib, gpu = machine(o)
    o.layers = o.layers or fit_layers(o)
    if o.layers < 1:
        most = max(o.lengths)
        print(f"bench_gpu: not one layer fits {o.memory_gib:.0f} GiB at {most}; lower --experts", file=sys.stderr)
        return 2
    print(heading(o, gpu), flush=True)
    found, cut_off = [], False
    try:
        for way in o.ways:
            for row in run_way(way, o):
                found.append(row)
                what = row.get("failed") or f"{row['step_s']:.3f} s"
                print(f"bench_gpu: {way} {row.get('routing', '')} {row.get('length', '')}: {what}", file=sys.stderr)
    except KeyboardInterrupt:
        cut_off = True
        print("bench_gpu: cut off; what was measured:", file=sys.stderr)
    print(table(found, o))
    if o.json:
        Path(o.json).write_text(json.dumps({"options": about(o), "gpu": gpu, "rows": found}, indent=1))
    return 130 if cut_off else int(any(row.get("failed") for row in found))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--family", default="hunyuan_a13b", help="model.family whose layers are taken at full width")
    add("--layers", type=int, default=0, help="layers of the slice; 0 takes as many as fit at the longest length")
    add("--experts", type=int, help="experts of the slice; 16, or as many as the family has; top-k stays")
    add("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536], metavar="TOKENS")
    add("--ways", nargs="+", choices=WAYS, help="kernels and precision; all of them on a GPU, portable on a CPU")
    add("--routing", nargs="+", choices=("natural", "balanced"), default=["natural", "balanced"])
    add("--batch-tok", type=int, help="tokens of a step, the same for every length; twice the longest")
    add("--recompute", nargs="*", default=["moe"], help="megatron.transformer.recompute_modules; nothing for none")
    add("--loss-chunk-tok", type=int, default=4096, help="training.loss_chunk_tok")
    add("--steps", type=int, default=5, help="timed steps; their median counts")
    add("--warm-up", type=int, default=3, help="steps before them")
    add("--peak-tflops", type=float, default=989.0, help="dense BF16 peak that MFU refers to, also of FP8 (H100: 989)")
    add("--memory-gib", type=float, default=0.0, help="memory to fill; 0 asks the device")
    add("--json", help="file for all numbers")
    add("--seed", type=int, default=1)
    return parser


def refusal(o: argparse.Namespace) -> str | None:
    """Why this cannot run here, in one line; fills in what depends on the device."""
    import torch

    from megatron_lccp.model.families import FAMILIES

    if o.device == "cuda" and not torch.cuda.is_available():
        return "no GPU is here; run it on one, or show with --device cpu --family tiny_moe --lengths 256 that it runs"
    o.ways = o.ways or (list(WAYS) if o.device == "cuda" else ["portable"])
    o.batch_tok = o.batch_tok or 2 * max(o.lengths)
    if o.device == "cpu" and (te := [way for way in o.ways if way != "portable"]):
        return f"--ways: {te[0]} needs a GPU and Transformer Engine; on a CPU there is portable"
    if o.family not in FAMILIES:
        return f"--family: {o.family!r} is unknown; there are {', '.join(FAMILIES)}"
    whole = FAMILIES[o.family]().transformer
    has = whole.get("num_moe_experts", 0)
    o.experts = o.experts if o.experts is not None else min(16, has or 16)
    if wrong := [length for length in o.lengths if length < 128 or o.batch_tok % length]:
        return f"--lengths: {wrong[0]} should be at least 128 and divide --batch-tok {o.batch_tok}"
    if min(o.steps, o.experts, o.loss_chunk_tok) < 1 or o.warm_up < 0:
        return "--steps, --experts and --loss-chunk-tok should be at least 1, --warm-up at least 0"
    if o.experts < (top_k := whole.get("moe_router_topk", 0)):
        return f"--experts: {o.experts} is less than the {top_k} that a token is sent to"
    if has and o.experts > has:
        return f"--experts: {o.experts} is more than the {has} of {o.family}"
    if o.device == "cuda":
        from megatron_lccp.model.attention import has_transformer_engine

        if not has_transformer_engine() and any(way != "portable" for way in o.ways):
            return "--ways: Transformer Engine is not installed; install megatron_lccp[gpu] or take --ways portable"
    return None


def machine(o: argparse.Namespace) -> tuple[float, str]:
    """(memory to fill, name of the device)."""
    import torch

    if o.device == "cpu":
        return o.memory_gib or 4.0, "CPU"
    properties = torch.cuda.get_device_properties(0)
    return o.memory_gib or properties.total_memory / GIB, properties.name


def about(o: argparse.Namespace) -> dict[str, Any]:
    """The options that say what was measured."""
    return {name: value for name, value in vars(o).items() if name != "json"}


def heading(o: argparse.Namespace, gpu: str) -> str:
    from importlib.metadata import version

    from megatron_lccp.model.families import FAMILIES

    whole = FAMILIES[o.family]().transformer
    experts = f", {o.experts} of {whole['num_moe_experts']} experts" if "num_moe_experts" in whole else ""
    return (
        f"{gpu}; {o.family} at full width, {o.layers} of {whole['num_layers']} layers{experts}; {o.batch_tok:,} tokens "
        f"a step, sequences one by one; recomputed: {', '.join(o.recompute) or 'nothing'}; megatron-core "
        f"{version('megatron-core')}, torch {version('torch')}\n{FORMULA}\n"
    )


def ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add to every row its speed over the portable and the BF16 Transformer Engine one of its length and routing."""
    steps = {(row["way"], row["routing"], row["length"]): row["step_s"] for row in rows if row.get("step_s")}
    for row in rows:
        for way in ("portable", "te"):
            base = steps.get((way, row.get("routing"), row.get("length")))
            row[f"over_{way}"] = base / row["step_s"] if base and row.get("step_s") else None


def table(rows: list[dict[str, Any]], o: argparse.Namespace) -> str:
    """The rows as Markdown, and what became of the aims."""
    ratios(rows)
    names = ["way", "routing", "length", "step s", "tokens/s", "TFLOP/s", "MFU", "over portable", "over te", "peak GiB",
             "estimate GiB", "fullest expert", "head scores / forward"]  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        if row.get("failed"):
            cells = [row["way"], row.get("routing", ""), str(row.get("length", "")), row["failed"]]
            lines.append("| " + " | ".join([*cells, *[""] * (len(names) - len(cells))]) + " |")
            continue
        cells = [
            row["way"], row["routing"], f"{row['length']:,}", f"{row['step_s']:.3f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['tflops']:.4g}", f"{row['mfu']:.1%}", _times(row["over_portable"]), _times(row["over_te"]),
            _or_dash(row["peak_bytes"], _gib), _gib(row["estimate_bytes"]),
            _or_dash(row["max_expert_load"], "{:.2f}".format),
            _or_dash(row.get("heads_over_forward"), "{:+.2%}".format),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    aims = (
        verdicts(rows, max(o.lengths))
        if o.device == "cuda"
        else ["Aims (MFU, FP8 over BF16, head scores) are judged on a GPU."]
    )
    return "\n".join([*lines, "", *aims])


def _gib(count: float) -> str:
    return f"{count / GIB:.3g}"


def _or_dash(value: Any, text) -> str:
    return "-" if value is None else text(value)


def _times(value: float | None) -> str:
    return _or_dash(value, "{:.2f}x".format)


def verdicts(rows: Sequence[dict[str, Any]], longest: int) -> list[str]:
    """Each aim at the longest length: met or not, by each routing."""
    lines = []
    for row in rows:
        if row.get("failed") or row["length"] != longest:
            continue
        name = f"{row['way']}, {row['routing']}, {longest:,} tokens"
        if row["way"] == "te":
            lines.append(_verdict(f"{name}: MFU {row['mfu']:.1%}, aim >= {AIM_MFU:.0%}", row["mfu"] >= AIM_MFU))
        elif row["way"] != "portable" and row["over_te"]:
            text = f"{name}: {row['over_te']:.2f}x BF16, aim >= {AIM_FP8}x"
            lines.append(_verdict(text, row["over_te"] >= AIM_FP8))
        if (share := row.get("heads_over_forward")) is not None:
            lines.append(
                _verdict(f"{name}: head scores {share:+.2%} of a forward, aim <= {AIM_HEADS:.0%}", share <= AIM_HEADS)
            )
    return lines


def _verdict(text: str, met: bool) -> str:
    return f"- {'met' if met else 'MISSED'}: {text}"


if __name__ == "__main__":
    sys.exit(main())
