"""What ranks do in the tests of conversion: load a whole-model file and say what the model computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tests.distributed.jobs import shards_of, trainee_for


def logits(path: Path, overrides: Sequence[str], tokens: np.ndarray) -> dict[str, Any]:
    """One rank: logits [b, s, v] of `tokens` [b, s] and the weights."""
    from megatron_lccp.model.build import bare, set_rope_base

    trainee = trainee_for(path, overrides)
    set_rope_base(trainee.chunks, trainee.config.stages["base"].rope_base)
    ids = torch.as_tensor(tokens)
    with torch.no_grad():
        found = bare(trainee.chunks[0]).eval()(ids, torch.arange(ids.shape[1])[None], None)
    return {"logits": found.double().numpy(), "weights": shards_of(trainee.chunks)}


def loss(path: Path, overrides: Sequence[str], tokens: np.ndarray) -> float:
    """Any layout without data parallelism: mean loss of `tokens` [b, s + 1] in nats."""
    from megatron_lccp.training.step import compute_gradients, prepare_schedules

    trainee = trainee_for(path, overrides)
    prepare_schedules(trainee.chunks)
    length = tokens.shape[1] - 1

    def batches():
        for sequence in tokens[trainee.groups.dp.rank() :: trainee.groups.dp.size()]:
            row = torch.as_tensor(sequence)[None]
            yield {"tokens": row[:, :-1], "labels": row[:, 1:], "positions": torch.arange(length)[None]}

    count = len(tokens) // trainee.groups.dp.size()
    losses = compute_gradients(trainee.chunks, trainee.groups, [batches()], count, length, 1, force_all_reduce=True)
    summed = torch.zeros(2)
    if losses and trainee.groups.tp.rank() == 0:
        summed += torch.tensor([torch.stack(losses).sum(), len(losses)])
    dist.all_reduce(summed)
    return (summed[0] / summed[1]).item()


def save(path: Path, overrides: Sequence[str], to: str) -> None:
    """One rank: write the loaded model as tools/export_weights.py does."""
    from megatron_lccp.model.weights import save_whole

    save_whole(trainee_for(path, overrides).chunks, to, {"run": "tiny"})
