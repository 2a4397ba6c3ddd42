"""Quantize a checkpoint to FP8 after training, so that `lccp measure` can say what that does to the model.

    python tools/quantize_checkpoint.py CONFIG --checkpoint CHECKPOINT --out OUT [--calibrate 64] [--key=value ...]
    lccp measure CONFIG --checkpoint OUT --out AFTER
    lccp compare BEFORE AFTER

In: a configuration and a checkpoint of any layout, a directory of them (the newest counts), or a .safetensors file of
weights. Out: OUT/step-*, a checkpoint whose linears and experts hold only what FP8 can say, and in its checkpoint.json
the scales of NVIDIA ModelOpt, with which `lccp measure` rounds their inputs too, on any layout. It runs on one rank, or
on many under torchrun.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lccp.config.arguments import OneLineParser, a_count

if TYPE_CHECKING:
    import numpy as np
    from torch.nn import Module

    from megatron_lccp.commands.measure import Weights
    from megatron_lccp.config.tree import Config
    from megatron_lccp.parallel.groups import Groups


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    from megatron_lccp.config.load import parse_config
    from megatron_lccp.files import error_text
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()
    try:
        config = parse_config(args.config, overrides)
        from megatron_lccp.commands.measure import find_checkpoints, weights_at
        from megatron_lccp.model.quantize import require_modelopt, require_single_experts

        weights = weights_at(find_checkpoints([args.checkpoint or f"{config.dir}/checkpoints"])[-1], config)
        if weights.quantization is not None:
            raise ValueError(f"--checkpoint: {weights.path} is quantized already")
        drafts = {".tmp"}  # of a call that was cut off
        if args.out.is_file() or {path.suffix for path in args.out.glob("[!.]*")} - drafts:
            raise ValueError(f"--out: {args.out} exists and is not empty; name another directory")
        require_modelopt()
        require_single_experts(config)
        print_once(quantize_checkpoint(config, args.config, weights, args.out, args.recipe, args.calibrate))
    except ValueError as error:  # of all ranks alike
        print_once(f"quantize_checkpoint: {error_text(error)}", sys.stderr)
        return 2
    except OSError as error:
        print(f"quantize_checkpoint: {error_text(error)}", file=sys.stderr, flush=True)
        return 2
    return 0


def quantize_checkpoint(config: Config, source: str, weights: Weights, out: Path, recipe: str, count: int) -> str:
    """Calibrate on `count` sequences, round and save, on the started ranks; returns what to tell.

    Raises ValueError on all ranks.
    """
    from megatron_lccp.commands.measure import load_weights
    from megatron_lccp.data.loader import calibration_sequences
    from megatron_lccp.model.build import build_chunks, in_precision
    from megatron_lccp.model.quantize import quantize
    from megatron_lccp.parallel.groups import make_groups, start_ranks, stop_ranks
    from megatron_lccp.training.setup import about_model, check_everything, sole_user, with_precision
    from megatron_lccp.weights.saving import save_checkpoint

    device, config = start_ranks(), with_precision(config)
    model, tokenizer = check_everything(config, source)
    groups = make_groups(config.parallel, device, config.seed)
    parts = groups.dp.size() * groups.pp.size()
    if count % parts:  # else replicas or stages would run padding, and calibrate on it
        raise ValueError(f"--calibrate: {count} sequences do not divide over {parts} ranks; give a multiple of {parts}")
    tokens_ks = calibration_sequences(config, weights.stage, count)
    text = f"{count} training sequences of {tokens_ks.shape[1]} tokens of stage {weights.stage}, seed {config.seed}"
    with sole_user(out, groups.is_main, "--out"):
        chunks = [in_precision(chunk.to(device).eval()) for chunk in build_chunks(config, model, groups)]
        load_weights(chunks, weights, config, model, tokenizer)
        how = quantize(
            chunks,
            recipe,
            lambda: run_through(chunks, groups, tokens_ks, model.vocabulary),
            f"{weights.path} {weights.identity}",
            text,
        )
        about = about_model(model, tokenizer) | {"seed": config.seed, "quantization": how.as_tree()}
        saved = save_checkpoint(out, 1, chunks, None, groups, weights.position, about)
    stop_ranks()
    experts = sum(".experts." in name for name in how.weight_amax)
    return (
        f"{saved}: {recipe}, {len(how.weight_amax)} linears, {experts} of them of experts; calibrated on {text}\n"
        f"next: lccp measure {source} --checkpoint {out} --out ..."
    )


def run_through(chunks: Sequence[Module], groups: Groups, tokens_ks: np.ndarray, vocab_size: int) -> None:
    """A forward for each sequence [count, tokens], spread over the replicas, with progress."""
    from megatron_lccp.measuring.forward import predict
    from megatron_lccp.measuring.prefills import deal, plain
    from megatron_lccp.training.progress import Progress

    progress, before = Progress(groups.is_main, tokens_ks.size, 0, 1), 0

    def done(tokens: int) -> None:
        nonlocal before
        progress.more(tokens - before)
        before = tokens

    last = (tokens_ks.shape[1] - 1, tokens_ks.shape[1])  # one row through the output layer, which is not quantized
    trees = [[plain(tokens_s, k, last)] for k, tokens_s in enumerate(tokens_ks)]
    try:
        predict(chunks, groups, deal(trees, groups.dp.size()), vocab_size, done=done)
    finally:
        progress.close()


def print_once(text: str, stream=None) -> None:
    """From one rank of torchrun's job."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=stream or sys.stdout, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="quantize_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.allow_abbrev = False
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as examples/tiny_moe.yaml")
    parser.add_argument(
        "--checkpoint", help="a checkpoint, a directory of them, or a .safetensors file (default: the run's newest)"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the quantized checkpoint; new or empty")
    parser.add_argument("--recipe", choices=["fp8"], default="fp8", help="fp8: E4M3, one scale a tensor (%(default)s)")
    parser.add_argument(
        "--calibrate",
        type=a_count,
        default=64,
        metavar="N",
        help="training sequences to take input scales from (%(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
