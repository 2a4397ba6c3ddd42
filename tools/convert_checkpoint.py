"""Hugging Face's safetensors -> a whole-model file for `model.init_from`, and back, tensor by tensor.

    python tools/convert_checkpoint.py to-megatron HF_FOLDER OUT.safetensors [--vocab-multiple 128]
    python tools/convert_checkpoint.py to-hf WHOLE.safetensors OUT_FOLDER [--config config.json] [--rope-base 2e6]

In: HunYuanMoEV1, Llama 3, Qwen3 or Qwen3-MoE (config.json + *.safetensors), or a file of this tool or of
tools/export_weights.py. Out: the other, with the same values bit by bit, and the lines of YAML that train it. Names and
shapes are checked before the first byte is written: a tensor that nothing takes or that is missing ends with an error.
The same command again goes on where a run was cut off. Tokenizers are not converted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    from megatron_lccp.model.hf_files import hf_to_whole, whole_to_hf

    progress = Printed()
    try:
        if args.direction == "to-megatron":
            about = hf_to_whole(args.folder, args.out, args.vocab_multiple, progress)
            print(_usage(args, about))
        else:
            files = whole_to_hf(
                args.whole, args.folder, progress, args.config, args.rope_base, int(args.file_gb * 2**30)
            )
            print(f"{args.folder}: config.json and {len(files)} files")
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="direction", required=True)
    to = commands.add_parser("to-megatron", help="Hugging Face folder -> whole-model file")
    to.add_argument("folder", type=Path, metavar="HF_FOLDER", help="has config.json and *.safetensors")
    to.add_argument("out", type=Path, metavar="OUT.safetensors")
    to.add_argument(
        "--vocab-multiple",
        type=_positive,
        default=128,
        help="as model.vocab_multiple of the configuration (%(default)s)",
    )
    back = commands.add_parser("to-hf", help="whole-model file -> Hugging Face folder")
    back.add_argument("whole", type=Path, metavar="WHOLE.safetensors")
    back.add_argument("folder", type=Path, metavar="OUT_FOLDER")
    back.add_argument("--config", type=Path, help="config.json of the model, for files of tools/export_weights.py")
    back.add_argument("--rope-base", type=float, help="rotary base of the last stage; as in config.json without it")
    back.add_argument("--file-gb", type=float, default=5.0, help="largest file, GiB (%(default)s)")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


class Printed:
    """Progress on stderr, at most once a second."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < 1 and done < total:
            return
        self._last = now
        rate = done / max(now - self._start, 1e-9)
        print(f"{done / 2**30:.2f} of {total / 2**30:.2f} GiB, {rate / 2**30:.2f} GiB/s", file=sys.stderr)


def _usage(args: argparse.Namespace, about: dict[str, str]) -> str:
    """The lines of YAML that read the file."""
    from megatron_lccp.model.convert import describe, family_for

    source = describe(json.loads(about["hf_config"]))
    family, fields = family_for(source)
    if family is None:
        return f"{args.out}: written, but no family in megatron_lccp/model/families.py is such a model; add it there"
    lines = [f"model: {{family: {family}, init_from: {args.out}, vocab_multiple: {args.vocab_multiple}}}"]
    lines += [f"megatron: {{transformer: {json.dumps(fields)}}}"] if fields else []
    lines += [f"stages: {{NAME: {{rope_base: {source.rope_base}}}}}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
