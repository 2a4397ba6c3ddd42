"""What ranks do in the tests of quantization: the tool and `lccp measure`, as a user calls them, in one start."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_lccp.config.load import parse_config
from tests.distributed.jobs import shards_of
from tests.distributed.ranks import ROOT


def commands(calls: Sequence[Sequence[str]], then: dict[str, Any] | None = None) -> dict[str, Any]:
    """(exit code, stderr) of each of ("quantize", CONFIG, ...), ("measure", CONFIG, ...) on these ranks, and `inside`.

    ("quantize without modelopt", ...) is what happens where ModelOpt is not installed.
    """
    from megatron_lccp import cli
    from megatron_lccp.commands import measure
    from megatron_lccp.parallel import groups

    measure.stop_ranks = groups.stop_ranks = lambda: None  # the next command works with the same ranks
    measure.write_report = lambda directory: "left out, for it takes longer than the rest"
    tool = runpy.run_path(str(ROOT / "tools/quantize_checkpoint.py"))["main"]
    found = []
    for name, *arguments in calls:
        # Only there: it also forgets what was imported meanwhile, and torch bears no second import.
        absent = (
            patch.dict(sys.modules, modelopt=None) if name.endswith("without modelopt") else contextlib.nullcontext()
        )
        said = io.StringIO()
        with contextlib.redirect_stderr(said), absent:
            code = tool(arguments) if name.startswith("quantize") else cli.main([name.split()[0], *arguments])
        found.append((code, said.getvalue()))
    return {"found": found, "inside": inside(**then) if then else None}


def inside(path: Path, overrides: Sequence[str], before: Path, after: Path, sequences: int) -> dict[str, Any]:
    """One rank: both models' weights, and what ModelOpt's own way with a whole model comes to.

    `ours` and `theirs` are answer NLLs of the quantized model: ours from the checkpoint, theirs from mtq.quantize.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    from megatron_lccp.commands.measure import find_checkpoints, load_weights, weights_at
    from megatron_lccp.data.loader import calibration_sequences
    from megatron_lccp.measuring.forward import predict
    from megatron_lccp.measuring.prefills import plain
    from megatron_lccp.model.build import build_chunks
    from megatron_lccp.model.quantize import quantized
    from megatron_lccp.parallel.groups import make_groups, start_ranks
    from megatron_lccp.training.setup import check_everything

    config = parse_config(path, overrides)
    groups = make_groups(config.parallel, start_ranks(), config.seed)
    model, tokenizer = check_everything(config, str(path))
    (stage,) = config.stages
    chunks = build_chunks(config, model, groups)
    chunks[0].eval().requires_grad_(False)
    tokens_ks = calibration_sequences(config, stage, sequences)

    def forwards(count: int = sequences):
        work = [plain(tokens_s, k, (1, len(tokens_s))) for k, tokens_s in enumerate(tokens_ks[:count])]
        return predict(chunks, groups, [work], tokenizer.vocab_size)

    found: dict[str, Any] = {}
    modules = {name: type(module) for name, module in chunks[0].named_modules()}
    for name, where in {"after": after, "before": before}.items():
        weights = weights_at(find_checkpoints([str(where)])[-1], config)
        load_weights(chunks, weights, config, model, tokenizer)
        found[name] = shards_of(chunks)
        if name == "after":
            with quantized(chunks, weights.quantization):
                found["ours"] = forwards(2)[1].nll_r
            assert {name: type(module) for name, module in chunks[0].named_modules()} == modules  # as it was
    mtq.quantize(chunks[0], mtq.FP8_DEFAULT_CFG, lambda model: forwards())
    found["theirs"] = forwards(2)[1].nll_r
    found["amax"] = {
        name: module.amax.item()
        for name, module in chunks[0].named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled
    }
    return found
