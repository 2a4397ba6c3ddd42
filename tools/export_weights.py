"""Write the newest checkpoint of a run as one safetensors file that `model.init_from` reads on any layout.

    python tools/export_weights.py examples/tiny_moe_base.yaml examples/tiny_moe/base.safetensors [--key=value ...]

In: a configuration whose run has a checkpoint. Out: the whole model in bfloat16, with the run and the tokenizer's
SHA-256 in the header. It runs on one rank, so the model must fit there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    if set(argv) & {"-h", "--help"}:
        print(__doc__)
        return 0
    if len(argv) < 2:
        print("export_weights: needs CONFIG and OUT.safetensors; see export_weights --help", file=sys.stderr)
        return 2
    from megatron_lccp.config.load import parse_config
    from megatron_lccp.files import error_text
    from megatron_lccp.parallel import compat, cpu
    from megatron_lccp.parallel.groups import make_groups, start_ranks, stop_ranks

    compat.quiet()
    cpu.install()
    path, out, *overrides = argv
    from megatron_lccp.training import setup

    try:
        # whatever layout the checkpoint was saved on, this process is one rank
        one_rank = [f"--parallel.{name}=1" for name in ("tensor", "pipeline", "expert", "context")]
        config = parse_config(
            path, [*overrides, *one_rank, "--parallel.expert_tensor=null", "--parallel.virtual_pipeline=null"]
        )
        device, config = start_ranks(), setup.with_precision(config)
        model, tokenizer = setup.check_everything(config, path)
        train_state = setup.make_train_state(
            config, model, make_groups(config.parallel, device, config.seed), tokenizer
        )
        if setup.resume(train_state) is None:
            raise ValueError(f"{config.dir}: has no checkpoint; train {path} first")
        from megatron_lccp.weights.whole import save_whole

        at = train_state.position
        about = {"run": config.name, "step": str(at.step), "tokens": str(at.tokens), "tokenizer": tokenizer.sha256}
        about["stage"] = list(config.stages)[at.stage]
        about |= {"hf_config": text} if (text := train_state.about.get("hf_config")) else {}
        about["rope"] = json.dumps(dataclasses.asdict(model.rope(config.stages[about["stage"]])))
        about["rope_base"] = repr(model.rope(config.stages[about["stage"]]).base)
        trained = list(config.stages.values())[: at.stage + 1]
        about["context_tok"] = str(max(stage.context_tok for stage in trained))
        save_whole(train_state.chunks, out, about)
        print(f"{out}: step {train_state.position.step}, {train_state.position.tokens:,} tokens")
        stop_ranks()
    except (ValueError, OSError) as error:
        print(f"export_weights: {error_text(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
