"""What ranks do in the tests of conversion: load converted weights and say what the models compute."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_lccp.config.load import parse_config
from megatron_lccp.parallel.groups import Groups, make_groups, start_ranks
from tests.distributed.jobs import shards_of, train_state_for


def families(path: Path, cases: Mapping[str, Sequence[str]], asked: Mapping[str, Sequence[tuple]]) -> dict[str, Any]:
    """Several models on one layout: what each says of its samples (tokens, answer, question, needle).

    Also its logits of all tokens but the last, and the names of this rank's tensors.
    """
    from megatron_lccp.measuring.forward import predict
    from megatron_lccp.measuring.prefills import deal, plain
    from megatron_lccp.model.build import bare
    from megatron_lccp.model.vocabulary import vocabulary_of

    found: dict[str, Any] = {}
    for name, overrides in cases.items():
        chunks, groups, config = load(path, overrides)
        trees = [[plain(tokens, k, answer, question, needle)] for k, (tokens, answer, question, needle) in
                 enumerate(asked[name])]  # fmt: skip
        with torch.no_grad():
            said = predict(chunks, groups, deal(trees, groups.dp.size()), vocabulary_of(bare(chunks[0])), look=True)
            logits = whole_logits(chunks, groups, np.stack([tokens[:-1] for tokens, *_ in asked[name]]))
        found[name] = {"said": said, "logits": logits, "names": {key for key, _ in shards_of(chunks)}}
    return found


def whole_logits(chunks: Sequence[torch.nn.Module], groups: Groups, tokens_bs: np.ndarray) -> np.ndarray | None:
    """Logits [b, s, V] of whole sequences by the model's own output layer; None on all but the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    ids_bs = torch.as_tensor(tokens_bs, device=groups.device)
    position_bs = torch.arange(ids_bs.shape[1], device=groups.device).expand_as(ids_bs)

    def step(_, model: torch.nn.Module):
        return model(ids_bs, position_bs, None), lambda out, non_loss_data: out

    stages = groups.pp.size()
    found = get_forward_backward_func(stages, None)(
        forward_step_func=step, data_iterator=iter([]), model=list(chunks), num_microbatches=1,
        seq_length=ids_bs.shape[1], micro_batch_size=len(ids_bs), forward_only=True, collect_non_loss_data=True,
        p2p_communicator=P2PCommunicator(groups.pp, chunks[0].config) if stages > 1 else None,
        pg_collection=ProcessGroupCollection(
            tp=groups.tp, cp=groups.cp, pp=groups.pp, dp_cp=groups.dp, embd=None, pos_embd=None
        ),
    )  # fmt: skip
    if groups.pp.rank() != stages - 1:
        return None
    shards = [torch.empty_like(found[0]) for _ in range(groups.tp.size())]
    dist.all_gather(shards, found[0].contiguous(), group=groups.tp)
    return torch.cat(shards, dim=-1).cpu().numpy()


def from_checkpoints(
    path: Path, overrides: Sequence[str], asked: Sequence[tuple], measured: Sequence[str], weights: str
) -> dict[str, Any]:
    """One rank: what the weights of a training's checkpoint say, and the monitors on a converted directory."""
    from megatron_lccp.commands.measure import measure

    said = families(path, {"it": overrides}, {"it": asked})["it"]
    code = measure(parse_config(path, [*overrides, *measured]), str(path), [weights], None)
    return {**said, "code": code}


def alone(
    path: Path, asked: Mapping[str, Any], refused: Mapping[str, Sequence[str]], saved: Mapping, router: Mapping
) -> dict[str, Any]:
    """What one rank does: `families`, `refusals` and `save`; and what a model keeps beside its parameters."""
    found = {"families": families(path, **asked), "refusals": refusals(path, refused)}
    save(path, **saved)
    (chunk,) = save(path, **router)
    kept = {name.split(".")[-1]: buffer for name, buffer in chunk.named_buffers() if ".router." in name}
    return found | {"router": {name: (str(buffer.dtype), buffer.numpy()) for name, buffer in kept.items()}}


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


def load(path: Path, overrides: Sequence[str]):
    """(chunks in evaluation mode, groups, config) of a configuration with `model.init_from`."""
    from megatron_lccp.model.build import build_chunks, set_rope
    from megatron_lccp.training.setup import check_everything, load_base

    device = start_ranks(timeout_s=120)
    torch.set_num_threads(1)
    config = parse_config(path, overrides)
    model, tokenizer = check_everything(config, str(path))
    groups = make_groups(config.parallel, device, config.seed)
    chunks = build_chunks(config, model, groups)
    load_base(chunks, config, model, config.model.init_from, tokenizer, "base")
    set_rope(chunks, config.stages["base"])
    return [chunk.eval() for chunk in chunks], groups, config


def save(path: Path, overrides: Sequence[str], to: str) -> Sequence[torch.nn.Module]:
    """One rank: write the loaded model as tools/export_weights.py does; returns it."""
    from megatron_lccp.weights.whole import save_whole

    chunks = train_state_for(path, overrides).chunks
    save_whole(chunks, to, {"run": "tiny"})
    return chunks
