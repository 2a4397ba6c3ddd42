"""The table of `lccp plan`.

In: a plan, in the plain values that `lccp plan --json` prints. Out: text for people, in units that fit its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lccp.planning.effective_time import as_lines
from megatron_lccp.text import count_text, digits_text, time_text

GIB = 2**30


def as_table(plan: Mapping[str, Any]) -> str:
    """The plan for people."""
    at, ranks = plan["layout"], plan["ranks"]
    chunks = f" x {at['virtual_pipeline']} chunks" if at["virtual_pipeline"] else ""
    unit, unit_bytes = unit_of(plan["worst_rank"]["total_bytes"])
    lines = [
        f"{plan['source']}: {plan['family']} on {count_text(ranks, 'rank')}"
        + ("" if plan["ranks_given"] else ", the fewest this layout allows (--ranks sets another number)"),
        f"  layout      TP {at['tensor']} x PP {at['pipeline']}{chunks} x CP {at['context']} x DP {at['data']}; "
        f"experts ETP {at['expert_tensor']} x EP {at['expert']} x DP {at['expert_data']}",
        f"  parameters  {plan['parameters_total']:,} total, {plan['parameters_active']:,} active for one token",
        f"  vocabulary  {plan['vocab_size']:,} tokens (from {plan['vocab_from']}), {plan['vocab_rows']:,} rows",
        "",
        f"Memory of the worst rank of each pipeline stage, {unit}",
        f"{'stage':>7}{'rank':>7}{'parameters':>16}{'weights':>9}{'gradients':>11}{'optimizer':>11}"
        f"{'activations*':>14}{'total*':>8}",
    ]
    for m in plan["worst_of_stage"]:
        kinds = ("weights", "gradients", "optimizer", "activations", "total")
        held = [m[f"{kind}_bytes"] / unit_bytes for kind in kinds]
        worst = " <- worst" if m["rank"] == plan["worst_rank"]["rank"] else ""
        lines.append(
            f"{m['stage']:>7}{m['rank']:>7}{m['parameters']:>16,}{held[0]:>9.2f}{held[1]:>11.2f}{held[2]:>11.2f}"
            f"{held[3]:>14.2f}{held[4]:>8.2f}{worst}"
        )
    lines += [
        "* Activations are an estimate that no GPU has confirmed: experts evenly loaded, attention fused. Kernels'",
        "  workspace, communication buffers and fragmentation come on top.",
        *_fp8_lines(plan),
        "",
        *_checkpoint_lines(plan),
        "",
        f"{'stage':<10}{'context':>9}{'batch':>12}{'steps':>9}{'FLOPs/token':>13}{'FLOPs/step':>12}"
        f"{'in attention':>14}",
    ]
    for name, w in plan["stages"].items():
        lines.append(
            f"{name:<10}{w['context_tok']:>9,}{w['global_batch_tok']:>12,}{w['steps']:>9,}{w['flops_per_token']:>13.2e}"
            f"{w['flops_per_step']:>12.2e}{w['attention_share']:>14.1%}"
        )
    lines += [*_document_lines(plan), "", *_gpu_lines(plan), *_stop_lines(plan)]
    lines += _monitor_lines(plan)
    return "\n".join([*lines, *(["", *as_lines(plan["effective_time"])] if "effective_time" in plan else [])])


def _document_lines(plan: Mapping[str, Any]) -> list[str]:
    """What attention does where it ends at documents."""
    lines = []
    for name, w in plan["stages"].items():
        if (of := w["documents"]) is not None:
            lines.append(
                f"  {name}: attention ends at documents, which is {of['share']:.2f} of the work of whole sequences; the busiest"
                f" replica has {of['busiest']:.2f} of the mean; {of['padding']:.2%} is padding"
            )
        elif w["masks"] == "documents":
            lines.append(f"  {name}: attention is counted in whole sequences, for the documents are not prepared")
    return lines


def _fp8_lines(plan: Mapping[str, Any]) -> list[str]:
    """What FP8 adds."""
    if plan["fp8"] == "none":
        return []
    if any(m["fp8_bytes"] for m in plan["worst_of_stage"]):
        unit, unit_bytes = unit_of(copies := plan["worst_rank"]["fp8_bytes"])
        return [
            f"  The total holds {copies / unit_bytes:.2f} {unit} of the worst rank for FP8 copies of its matrices and",
            "  their transposes, by Transformer Engine's source; an estimate that no GPU has confirmed.",
        ]
    return ["  FP8 copies are not counted: fp8_param or disable_parameter_transpose_cache does without."]


def _checkpoint_lines(plan: Mapping[str, Any]) -> list[str]:
    """What a checkpoint takes."""
    found, speed = plan["checkpoints"], plan["storage_gbps"]
    unit, unit_bytes = unit_of(found["any_layout"]["bytes"])
    lines = [
        f"Checkpoints, {unit}; host memory while one is written behind the training's back (checkpoint.asynchronous)",
        f"{'fits':<14}{'on disk':>10}{'worst rank':>12}{'at once':>10}{'8 ranks at once':>17}{'read by a load':>16}"
        + (f"{'save':>10}{'load':>10}" if speed else ""),
    ]
    for name, cost in found.items():
        kinds = ("bytes", "host_bytes", "host_bytes_at_once", "node_bytes_at_once", "read_bytes")
        disk, rank, once, node, read = (cost[kind] / unit_bytes for kind in kinds)
        seconds = f"{time_text(cost['save_s']):>10}{time_text(cost['load_s']):>10}" if speed else ""
        label = name.replace("_", " ")
        lines.append(f"{label:<14}{disk:>10.2f}{rank:>12.2f}{once:>10.2f}{node:>17.2f}{read:>16.2f}{seconds}")
    if speed:
        return [*lines, f"* At {speed:g} GB/s of the storage for all ranks together, and nothing else counted."]
    return [*lines, "* Seconds of save and load: --storage-gbps."]


def _stop_lines(plan: Mapping[str, Any]) -> list[str]:
    """Whether a job that is told to stop has saved before it is killed, as far as the plan can tell."""
    stop, lines = plan["stop"], []
    slow = [
        (time["step_s"], stage, gpu) for gpu, found in plan["gpus"].items() for stage, time in found["stages"].items()
    ]
    step_s, stage, gpu = max(slow)
    if step_s > stop["within_s"]:
        lines.append(
            f"! A step of {stage} takes {step_s:.0f} s on {gpu}, and a signal is heard after it: raise "
            f"training.stop_within_s ({stop['within_s']:g} s)."
        )
    if plan["storage_gbps"]:
        save_s = max(cost["save_s"] for cost in plan["checkpoints"].values())
        whole_s = stop["within_s"] + save_s
        lines.append(
            f"* A stop and its save take up to {stop['within_s']:g} + {save_s:.0f} s; our launcher has torchrun kill "
            f"after {stop['torchrun_s']:g} s, and Slurm signals {stop['slurm_s']:g} s ahead of its time."
        )
        if whole_s > stop["torchrun_s"]:
            raised = f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={whole_s:.0f}"
            raised += f" and --signal=B:USR1@{2 * whole_s:.0f}" if whole_s > stop["slurm_s"] else ""
            lines.append(f"! That is too short: set {raised}.")
    return lines


def _monitor_lines(plan: Mapping[str, Any]) -> list[str]:
    """What the monitors add."""
    if not plan["monitors"]:
        return []
    step, last = list(plan["stages"].values())[-1]["flops_per_step"], list(plan["stages"])[-1]
    lines = [
        "",
        "Monitors, on top (needles of four characters a token; `lccp measure CONFIG --dry-run` counts prepared data)",
        f"{'monitor':<18}{'samples':>9}{'tokens run':>14}{'FLOPs':>10}{'of a step of ' + last:>{16 + len(last)}}"
        f"{'windows':>9}{'of training':>13}",
    ]
    for m in plan["monitors"]:
        if "flops" not in m:
            lines.append(f"{m['monitor']:<18}{'does not say':>23}")
            continue
        lines.append(
            f"{m['monitor']:<18}{m['samples']:>9,}{m['tokens']:>14,}{m['flops']:>10.2e}"
            f"{m['flops'] / step:>{16 + len(last)}.1%}{m['windows']:>9,}{m['share_of_training']:>13.3%}"
        )
    total = sum(m.get("share_of_training", 0.0) for m in plan["monitors"])
    return [*lines, f"{'all of them':<18}{total:>{69 + len(last)}.3%} of the training's FLOPs"]


def _gpu_lines(plan: Mapping[str, Any]) -> list[str]:
    """Time and fit on each kind of GPU."""
    lines = [
        f"At {plan['mfu']:.1%} of the BF16 peak (of forward and backward; recomputation and monitors not counted)",
        f"{'GPU':<6}{'stage':<10}{'TFLOP/s':>9}{'a step':>10}{'all steps':>11}{'GPU-hours':>11}"
        f"{'worst rank takes*':>20}",
    ]
    worst_gib = plan["worst_rank"]["total_bytes"] / GIB
    for name, gpu in plan["gpus"].items():
        takes = f"{_share(worst_gib / gpu['memory_gib'])} of {gpu['memory_gib']:.0f} GiB"
        for stage, t in gpu["stages"].items():
            lines.append(
                f"{name:<6}{stage:<10}{t['tflops_per_gpu']:>9.0f}{time_text(t['step_s']):>10}"
                f"{time_text(t['days'] * 86400):>11}{digits_text(t['gpu_hours']):>11}{takes:>20}"
            )
    if tight := [name for name, gpu in plan["gpus"].items() if worst_gib > gpu["memory_gib"]]:
        lines.append(
            f"Does not fit on {', '.join(tight)} by this estimate: raise parallel.context, parallel.tensor or "
            "parallel.pipeline, or set megatron.transformer.recompute_granularity"
        )
    return lines


def unit_of(largest: int) -> tuple[str, int]:
    """Name and bytes of the unit for numbers of which the largest is so many bytes."""
    for name, unit_bytes in (("GiB", GIB), ("MiB", 2**20)):
        if largest >= unit_bytes:
            return name, unit_bytes
    return "KiB", 2**10


def _share(share: float) -> str:
    """A share in percent, which is nothing only if it is nothing."""
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
