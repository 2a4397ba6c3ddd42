"""The same weights and tokens by every kind of kernels of this machine, against FP32 on the CPU.

In: a device, and whether Transformer Engine is there. Out: for each way how far its loss, its whole gradient, its answer
losses (a forward for each sample, and prefills that samples share) and its attention on the needle are from the CPU's,
each with the bound that it should keep. The CPU's own are held against transformers by the tests.

The model is Hunyuan's mixture of experts in small (QK-norm after RoPE, grouped queries, shared expert), its weights
numbers of BF16, so that every way starts from the same ones.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from megatron_lccp.planning.bench_rows import rows_of
from megatron_lccp.planning.bench_sizes import WAYS

VOCAB, SEQUENCES, LENGTH_TOK, SEED = 2048, 4, 256, 5
CELLS = [(0, 128), (64, 64), (64, 192), (128, 0), (128, 128)]
"""(before, after) of the needle samples, tokens of haystack."""


@dataclass(frozen=True)
class Bounds:
    """How far a way may be from the CPU in FP32."""

    loss: float
    """Of the loss, as a share of it."""
    gradient: float
    """Of the gradient as a whole, the norm of the difference as a share of its norm."""
    answer_nat: float
    """Of the mean loss of an answer, nat."""
    sharing_nat: float
    """Of that where prefills are shared, from what it is where they are not, nat."""
    mass: float
    """Of a head's share of attention on the needle."""
    parts: float
    """Of attention in parts, as context parallelism takes it, and its gradients from those of one whole attention on the
    same device, as a share."""


# FP32 differs in the order of sums, BF16 keeps 8 bits, FP8 3 or 4 of them. A token whose second and third expert tie
# goes either way, which the answers' bounds leave room for. Monitors measure in BF16 also where training is in FP8.
FP32 = Bounds(loss=1e-4, gradient=1e-3, answer_nat=1e-3, sharing_nat=1e-4, mass=1e-3, parts=1e-4)
BF16 = Bounds(loss=0.01, gradient=0.1, answer_nat=0.1, sharing_nat=0.05, mass=0.05, parts=0.02)
FP8 = Bounds(loss=0.03, gradient=0.4, answer_nat=0.1, sharing_nat=0.05, mass=0.05, parts=0.02)


def ways_of(device: Literal["cuda", "cpu"], transformer_engine: bool) -> dict[str, Bounds]:
    """Way -> bounds: those that this machine has."""
    found = {"portable-fp32": FP32, "portable": BF16}
    if device == "cuda" and transformer_engine:
        found |= {way: BF16 if way == "te" else FP8 for way in WAYS if way != "portable"}
    return found


def run_parity(device: Literal["cuda", "cpu"], ways: Mapping[str, Bounds], until_s: float) -> Iterator[dict[str, Any]]:
    """A row for each way as it comes: `way`, and the differences and `bounds`, or `failed`."""
    with tempfile.TemporaryDirectory(prefix="lccp-parity-") as folder:

        def measured(way: str, device: str) -> dict[str, Any]:
            options = {"way": way, "device": device, "folder": folder, "until_s": until_s}
            rows = list(rows_of("parity", options, {"way": way}))
            return rows[-1] if rows else {"way": way, "failed": "said nothing"}

        reference = measured("reference", "cpu")
        if "failed" in reference:
            yield reference
            return
        expected = np.load(Path(folder, "reference.npz"))
        for way, bounds in ways.items():
            row = measured(way, device)
            if "failed" not in row:
                row |= compared(np.load(Path(folder, f"{way}.npz")), expected) | {"bounds": asdict(bounds)}
            yield row


def compared(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The differences that Bounds are for, by the names of its fields."""
    difference = np.linalg.norm(found["gradient"] - expected["gradient"])
    return {
        "loss": float(abs(found["loss"] - expected["loss"]) / expected["loss"]),
        "gradient": float(difference / np.linalg.norm(expected["gradient"])),
        "answer_nat": float(abs(found["alone_s"] - expected["alone_s"]).max()),
        "sharing_nat": float(abs(found["shared_s"] - found["alone_s"]).max()),
        "mass": float(abs(found["mass_sLN"] - expected["mass_sLN"]).max()),
        "parts": float(found["parts"]),
    }


def broken(row: Mapping[str, Any]) -> list[str]:
    """What of a row is not as it should be, a phrase each; what is not a number is not."""
    if "failed" in row:
        return [str(row["failed"])]
    bounds = row["bounds"]
    return [f"{name} {row[name]:.2g}, at most {bounds[name]:.2g}" for name in bounds if not row[name] <= bounds[name]]


def measure(o: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row when `o.way`.npz is in `o.folder`: loss, gradient, answer losses and masses. `reference` writes the weights
    too."""
    way, folder = o.way, Path(o.folder)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(s.getsockname()[1]))
    from megatron_lccp.config.load import ConfigError
    from megatron_lccp.config.tree import Config, MegatronConfig, ModelConfig, StageConfig, TrainingConfig
    from megatron_lccp.parallel.groups import make_groups, start_ranks, stop_ranks

    device = start_ranks(timeout_s=120)
    import torch

    from megatron_lccp.model.build import build_chunks, passthrough_problems, refused_by_megatron, wrap_for_training
    from megatron_lccp.model.resolved import resolve
    from megatron_lccp.training.step import prepare_schedules
    from megatron_lccp.weights.whole import load_whole, save_whole

    layers, fp8 = WAYS.get(way, ("portable", "none"))
    transformer = {
        "num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 64,
        "ffn_hidden_size": 256, "moe_ffn_hidden_size": 256, "moe_shared_expert_intermediate_size": 256,
        "num_moe_experts": 4, "moe_router_topk": 2, "init_method_std": 0.05,
    }  # fmt: skip
    config = Config(
        seed=SEED, model=ModelConfig(family="tiny_moe", layers=layers), megatron=MegatronConfig(transformer=transformer),
        training=TrainingConfig(precision="fp32" if way in ("reference", "portable-fp32") else "bf16", fp8=fp8),
        stages={"only": StageConfig(context_tok=LENGTH_TOK, global_batch_tok=SEQUENCES * LENGTH_TOK)},
    )  # fmt: skip
    model = resolve(config).of_vocabulary(VOCAB)
    if problems := passthrough_problems(config, model) or refused_by_megatron(config, model):
        raise ConfigError("parity", problems)
    groups = make_groups(config.parallel, device, config.seed)
    bare = build_chunks(config, model, groups)
    weights = folder / "weights.safetensors"
    if way == "reference":
        _learned_norms(bare)
        save_whole(bare, weights, {})
    load_whole(bare, weights)
    chunks = wrap_for_training(bare, config, groups)
    prepare_schedules(chunks)
    loss, gradient = _gradient(chunks, groups, passes=2 if fp8 != "none" else 1)
    parts = _parts(groups.device, torch.float32 if config.training.precision == "fp32" else torch.bfloat16)
    answers: dict[str, Any] = _answers(chunks, groups)
    np.savez(folder / f"{way}.npz", loss=loss, gradient=gradient, parts=parts, **answers)
    stop_ranks()
    yield {"way": way}


def _learned_norms(chunks: Sequence[Any]) -> None:
    """Norms other than one, with which it matters on which side of RoPE the QK-norm stands."""
    import torch

    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in (pair for chunk in chunks for pair in chunk.named_parameters()):
            if "layernorm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))


def _gradient(chunks: Sequence[Any], groups: Any, passes: int) -> tuple[float, np.ndarray]:
    """(loss, whole gradient by the names of the weights) of one batch; delayed scaling has its scales from a pass
    before."""
    import torch

    from megatron_lccp.training.step import compute_gradients
    from megatron_lccp.weights.whole import model_shards

    token_bs = torch.as_tensor(np.random.default_rng(SEED).integers(1, VOCAB, (SEQUENCES, LENGTH_TOK + 1)))
    token_bs, positions = token_bs.to(groups.device), torch.arange(LENGTH_TOK, device=groups.device)[None]
    for _ in range(passes):
        batches = ({"tokens": t[None, :-1], "labels": t[None, 1:], "positions": positions} for t in token_bs)
        losses = compute_gradients(chunks, groups, [batches], SEQUENCES, LENGTH_TOK, 1, force_all_reduce=True)
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    kept = [parameter.detach().clone() for parameter in weights]
    with torch.no_grad():  # gradients are read as weights are: by name and place in the whole, of any kind of layers
        for parameter in weights:
            parameter.copy_(parameter.main_grad)
        shards = sorted(model_shards(chunks), key=lambda shard: (shard.key, tuple(shard.global_offset)))
        gradient = torch.cat([shard.data.detach().float().cpu().flatten() for shard in shards]).numpy()
        for parameter, value in zip(weights, kept, strict=True):
            parameter.copy_(value)
    return torch.stack(losses).float().mean().item(), gradient


def _answers(chunks: Sequence[Any], groups: Any) -> dict[str, np.ndarray]:
    """alone_s, shared_s: mean answer loss of each sample [samples], nat; mass_sLN: attention on its needle."""
    import torch

    from megatron_lccp.data.needles import Cell
    from megatron_lccp.measuring.forward import predict
    from megatron_lccp.measuring.fp8 import precision
    from megatron_lccp.measuring.prefills import one_each, shared
    from megatron_lccp.planning.bench_samples import samples_for

    samples = samples_for([Cell(before, after) for before, after in CELLS], SimpleNamespace(seed=SEED, vocab=VOCAB))
    modules = [module for chunk in chunks for module in chunk.modules()]
    found = {}
    chunks[0].eval()
    with torch.no_grad(), precision(modules, fp8=False):
        for name, trees in (("alone", one_each(samples)), ("shared", shared(samples))):
            prefills = [prefill for tree in trees for prefill in tree]
            found[name] = predict(chunks, groups, [prefills], VOCAB, look=True)
    answers = {f"{name}_s": np.array([of[k].nll_r.mean() for k in range(len(samples))]) for name, of in found.items()}
    looks = [found["alone"][k].look for k in range(len(samples))]
    return answers | {"mass_sLN": np.stack([look.answer_mass_LN for look in looks if look is not None])}


def _parts(device: Any, dtype: Any) -> float:
    """The largest difference of output and gradients, as a share of the norm: the queries of rank 0 of CP2."""
    import torch
    import torch.nn.functional as F

    from megatron_lccp.model.flash import AttendParts, repeated

    heads, width, length, scale = 8, 128, 1024, 128**-0.5
    random = torch.Generator().manual_seed(SEED)
    q, k, v = (
        torch.randn(1, n, length, width, generator=random).to(device, dtype).requires_grad_() for n in (heads, 2, 2)
    )
    quarter = length // 4  # rank 0 holds the first quarter and the last
    rows = torch.cat([torch.arange(quarter), torch.arange(3 * quarter, length)]).to(device)
    stretches = [
        (0, quarter, [(0, quarter, True)]),
        (quarter, 2 * quarter, [(0, 3 * quarter, False), (3 * quarter, length, True)]),
    ]
    found = AttendParts.apply(q[:, :, rows], k, v, stretches, scale)
    whole = F.scaled_dot_product_attention(q, repeated(k, heads), repeated(v, heads), is_causal=True, scale=scale)
    expected = whole[:, :, rows]
    grad = torch.randn(expected.shape, generator=random).to(device, dtype)
    ours = [found, *torch.autograd.grad(found, (q, k, v), grad)]
    theirs = [expected, *torch.autograd.grad(expected, (q, k, v), grad)]
    return max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(ours, theirs, strict=True))
