"""What ranks do in the tests of conversion: load converted weights and say what the models compute."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lccp.config.load import parse_config
from megatron_lccp.parallel.groups import make_groups, start_ranks
from tests.distributed.jobs import shards_of, trainee_for


def families(
    path: Path, cases: Mapping[str, Sequence[str]], asked: Mapping[str, Sequence[tuple]], whole: np.ndarray | None
) -> dict[str, Any]:
    """Several models on one layout: what each says of its samples (tokens, answer, question, needle).

    On one rank, with `whole` [b, s]: also the logits [b, s, v], and the names of the model's tensors.
    """
    from megatron_lccp.data.prefills import deal, plain
    from megatron_lccp.model.build import bare
    from megatron_lccp.model.forward import predict

    found: dict[str, Any] = {}
    for name, overrides in cases.items():
        chunks, groups, config = load(path, overrides)
        trees = [[plain(tokens, k, answer, question, needle)] for k, (tokens, answer, question, needle) in
                 enumerate(asked[name])]  # fmt: skip
        with torch.no_grad():
            said = predict(chunks, groups, deal(trees, groups.dp.size()), VOCAB, look=True)
            found[name] = {"said": said}
            if whole is not None:
                ids = torch.as_tensor(whole)
                logits = bare(chunks[0])(ids, torch.arange(ids.shape[1])[None], None)
                names = {key for key, _ in shards_of(chunks)}
                found[name] |= {"logits": logits.double().numpy(), "names": names}
    return found


def from_checkpoints(
    path: Path, overrides: Sequence[str], asked: Sequence[tuple], measured: Sequence[str], weights: str
) -> dict[str, Any]:
    """One rank: what the weights of a training's checkpoint say, and the monitors on a converted directory."""
    from megatron_lccp.measure import measure

    said = families(path, {"it": overrides}, {"it": asked}, None)["it"]["said"]
    code = measure(parse_config(path, [*overrides, *measured]), str(path), [weights], None)
    return {"said": said, "code": code}


def alone(path: Path, asked: Mapping[str, Any], refused: Mapping[str, Sequence[str]], saved: Mapping) -> dict[str, Any]:
    """What one rank does: `families`, `refusals` and `save`."""
    found = {"families": families(path, **asked), "refusals": refusals(path, refused)}
    save(path, **saved)
    return found


def refusals(path: Path, cases: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What is said of weights: the error, or else what goes to stderr."""
    found = {}
    for name, overrides in cases.items():
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                load(path, overrides)
            found[name] = told.getvalue()
        except ValueError as error:
            found[name] = str(error)
    return found


VOCAB = 700


def load(path: Path, overrides: Sequence[str]):
    """(chunks in evaluation mode, groups, config) of a configuration with `model.init_from`."""
    from megatron_lccp.compose import check_everything, load_base
    from megatron_lccp.model.build import build_chunks, set_rope_base
    from megatron_lccp.model.families import family_of

    device = start_ranks(timeout_s=120)
    torch.set_num_threads(1)
    config = parse_config(path, overrides)
    tokenizer = check_everything(config, str(path))
    groups = make_groups(config.parallel, device, config.seed)
    chunks = build_chunks(config, family_of(config.model.family), tokenizer.vocab_size, groups)
    load_base(chunks, config, config.model.init_from, tokenizer, "base")
    set_rope_base(chunks, config.stages["base"].rope_base)
    return [chunk.eval() for chunk in chunks], groups, config


def save(path: Path, overrides: Sequence[str], to: str) -> None:
    """One rank: write the loaded model as tools/export_weights.py does."""
    from megatron_lccp.model.weights import save_whole

    save_whole(trainee_for(path, overrides).chunks, to, {"run": "tiny"})
