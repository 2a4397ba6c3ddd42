"""What ranks do in test_health.py; like jobs.py, each function runs on every rank and returns plain values."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch

from tests.distributed.jobs import train_state_for


def one_step(path: Path, overrides: Sequence[str], tokens: np.ndarray) -> dict[str, Any]:
    """A training step on the global batch `tokens` [sequences, s + 1], one sequence a micro-batch: what the meter says
    of it, and what went into routers and attention, for a naive computation (whole on one rank only)."""
    from megatron_lccp.parallel.zigzag import local_batch
    from megatron_lccp.training.health import HealthMeter
    from megatron_lccp.training.step import prepare_schedules, train_step

    train_state = train_state_for(path, overrides)
    groups, chunks = train_state.groups, train_state.chunks
    prepare_schedules(chunks)
    mine, length = tokens[groups.dp.rank() :: groups.dp.size()], tokens.shape[1] - 1

    def batches():
        for sequence in mine:
            row = torch.as_tensor(sequence)[None]
            yield local_batch({"tokens": row[:, :-1], "labels": row[:, 1:]}, groups.cp, groups.device)

    inside = _capture(train_state)
    result = train_step(
        chunks, train_state.optimizer, groups, [batches() for _ in chunks], len(mine), length, 1,
        meter=HealthMeter(chunks, train_state.optimizer, groups),
    )  # fmt: skip
    where = dict(run="r", config_hash="h", step=1, tokens=tokens.size, stage="base")
    return {
        "rows": [dataclasses.asdict(row) for row in result.health.to_rows(**where)],
        "scalars": result.health.scalars(), "grad_norm": result.grad_norm, **inside,
    }  # fmt: skip


def _capture(train_state) -> dict[str, Any]:
    """Filled during the step: router logits by layer and micro-batch, attention's query and key, gradients by name."""
    from megatron_lccp.model.attention import innermost_core_attention
    from megatron_lccp.model.build import bare

    inside: dict[str, Any] = {"router": {}, "attention": {}, "gradients": {}}
    for chunk in train_state.chunks:
        for layer in bare(chunk).decoder.layers:
            number = layer.layer_number - 1

            def route(module, args, output, number=number):
                if torch.is_grad_enabled():
                    hidden_th = args[0].detach().double().reshape(-1, args[0].shape[-1])
                    logit_te = hidden_th @ module.weight.detach().double().T
                    inside["router"].setdefault(number, []).append(logit_te.numpy())

            def attend(module, args, number=number):
                if torch.is_grad_enabled():
                    pair = [x[:, 0].detach().double().numpy() for x in args[:2]]
                    inside["attention"].setdefault(number, []).append(pair)

            layer.mlp.router.register_forward_hook(route)
            innermost_core_attention(layer.self_attention).register_forward_pre_hook(attend)
    norm = train_state.optimizer.get_grad_norm

    def get_grad_norm():
        for chunk in train_state.chunks:
            for name, parameter in bare(chunk).named_parameters():
                inside["gradients"][name] = parameter.main_grad.double().numpy().copy()
        return norm()

    train_state.optimizer.get_grad_norm = get_grad_norm
    return inside


def several(jobs: Sequence[dict[str, Any]]) -> list[Any]:
    """Several steps, each of a model of its own, in one start of the ranks."""
    return [one_step(**arguments) for arguments in jobs]
