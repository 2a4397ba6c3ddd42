"""Hugging Face's safetensors -> a checkpoint for `model.init_from`, and back, tensor by tensor.

    python tools/convert_checkpoint.py to-megatron HF_FOLDER OUT [--vocab-multiple 128]
    python tools/convert_checkpoint.py to-hf CHECKPOINT OUT_FOLDER [--config config.json] [--tokenizer HF_FOLDER]

In: a folder with config.json and *.safetensors (Llama, Mistral without a window, Qwen2.5, Qwen3, Qwen3-MoE, GLM-4.5,
HunYuan dense and MoE, Hy3); or a checkpoint of a training (RUN/checkpoints/step-*), a file of tools/export_weights.py,
or what this tool wrote. Out: the other, with the same values bit by bit, and a YAML that trains it as it stands. OUT is
a directory in Megatron-Core's sharded format, or one file if it ends in .safetensors; any layout reads either. Names
and shapes are checked before the first byte is written: a tensor that nothing takes or that is missing ends with an
error. The same command again goes on where a run was cut off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lccp.config.arguments import OneLineParser, a_count, a_size

HEAD = "# Runs as it stands, on code of Python's standard library; put your own text and stages in its place."


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    from megatron_lccp.parallel import compat, cpu

    compat.quiet()
    cpu.install()  # before a monitor's class_path imports Megatron-Core
    from megatron_lccp.commands.printed import Printed
    from megatron_lccp.commands.starting import as_yaml, fitting_tokenizer, stdlib_tree
    from megatron_lccp.files import error_text
    from megatron_lccp.model.hf_config import read_config
    from megatron_lccp.weights.hf_files import hf_to_megatron, megatron_to_hf

    progress, file_bytes = Printed(), int(args.file_gb * 2**30)
    say = lambda text: print(f"convert_checkpoint: {text}", file=sys.stderr)  # noqa: E731
    try:
        if args.direction == "to-megatron":
            tokenizer, notes, (description, _) = None, [], read_config(args.folder)
            try:
                tokenizer = fitting_tokenizer(args.folder, description)
            except ValueError as error:  # weights alone may be all that is wanted
                notes = [f"{error_text(error)}; name another tokenizer in data.tokenizer.path to train"]
            hf_to_megatron(args.folder, args.out, args.vocab_multiple, progress, file_bytes, say, notes)
            tree = stdlib_tree(args.folder, args.out, args.vocab_multiple, tokenizer, say)
            print(f"{HEAD}\n{as_yaml(tree)}", end="")
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
