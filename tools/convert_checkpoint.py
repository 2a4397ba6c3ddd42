"""Hugging Face's safetensors -> a checkpoint for `model.init_from`, and back, tensor by tensor.

    python tools/convert_checkpoint.py to-megatron HF_FOLDER OUT [--vocab-multiple 128]
    python tools/convert_checkpoint.py to-hf CHECKPOINT OUT_FOLDER [--config config.json] [--tokenizer HF_FOLDER]

In: HunYuanMoEV1, Llama 3, Qwen3, Qwen3-MoE, GLM-4.5 or Hy3 (config.json + *.safetensors); or a checkpoint of a training
(RUN/checkpoints/step-*), a file of tools/export_weights.py, or what this tool wrote. Out: the other, with the same
values bit by bit, and the lines of YAML that train it. OUT is a directory in Megatron-Core's sharded format, or one
file if it ends in .safetensors; any layout reads either. Names and shapes are checked before the first byte is
written: a tensor that nothing takes or that is missing ends with an error. The same command again goes on where a run
was cut off.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_lccp.config.arguments import OneLineParser, a_count, a_size


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    from megatron_lccp.files import error_text
    from megatron_lccp.weights.hf_files import hf_to_megatron, megatron_to_hf

    progress, file_bytes = Printed(), int(args.file_gb * 2**30)
    say = lambda text: print(f"convert_checkpoint: {text}", file=sys.stderr)  # noqa: E731
    try:
        if args.direction == "to-megatron":
            about = hf_to_megatron(args.folder, args.out, args.vocab_multiple, progress, file_bytes, say)
            print(_usage(args, about))
        else:
            files = megatron_to_hf(
                args.checkpoint, args.folder, progress, args.config, args.rope_base, file_bytes, args.tokenizer,
                args.max_positions, say,
            )  # fmt: skip
            print(f"{args.folder}: config.json and {len(files)} files")
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: {error_text(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_checkpoint: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="convert_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="direction", required=True)
    to = commands.add_parser("to-megatron", help="Hugging Face folder -> Megatron checkpoint")
    to.add_argument("folder", type=Path, metavar="HF_FOLDER", help="has config.json and *.safetensors")
    to.add_argument("out", type=Path, metavar="OUT", help="a directory, or one file that ends in .safetensors")
    multiple = "as model.vocab_multiple of the configuration (%(default)s)"
    to.add_argument("--vocab-multiple", type=a_count, default=128, help=multiple)
    to.add_argument("--file-gb", type=a_size, default=1.0, help="size of a file of the directory, GiB (%(default)s)")
    back = commands.add_parser("to-hf", help="Megatron checkpoint -> Hugging Face folder")
    back.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step-*, or a directory or file of weights")
    back.add_argument("folder", type=Path, metavar="OUT_FOLDER")
    back.add_argument("--config", type=Path, help="config.json of the model, for what no conversion wrote")
    base = "rotary base to write; without it that of the training's last stage, else as in config.json"
    back.add_argument("--rope-base", type=a_size, help=base)
    positions = "max_position_embeddings to write; without it raised to the longest context of the training"
    back.add_argument("--max-positions", type=a_count, help=positions)
    back.add_argument("--tokenizer", type=Path, metavar="HF_FOLDER", help="copy the tokenizer's files from here")
    back.add_argument("--file-gb", type=a_size, default=5.0, help="largest file, GiB (%(default)s)")
    return parser


class Printed:
    """Progress on stderr, at most once a second."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._done = 0

    def __call__(self, done: int, total: int) -> None:
        from megatron_lccp.planning.plan_table import unit_of

        now = time.monotonic()
        if done < self._done:  # files are checked, then read
            self._start = now
        self._done = done
        if now - self._last < 1 and done < total:
            return
        self._last = now
        (unit, unit_bytes), rate = unit_of(total), done / max(now - self._start, 1e-9)
        print(
            f"{done / unit_bytes:.2f} of {total / unit_bytes:.2f} {unit}, {rate / unit_bytes:.2f} {unit}/s",
            file=sys.stderr,
        )


def _usage(args: argparse.Namespace, about: dict[str, str]) -> str:
    """The lines of YAML that read the file."""
    multiple = args.vocab_multiple
    lines = [f"model: {{config: {args.folder}, init_from: {args.out}, vocab_multiple: {multiple}}}"]
    lines += [f"data: {{tokenizer: {{path: {args.folder}}}}}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
