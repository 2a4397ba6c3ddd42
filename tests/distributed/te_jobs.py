"""What Transformer Engine's layers are made of, for tests/model/test_transformer_engine.py; like jobs.py, each function returns plain values.

Without a GPU its modules can be built and saved, not run: `_built_without_cuda` answers their question for one. Core
attention alone can run, in FP32: `_attention_on_cpu` answers what it asks of the device. On one context-parallel rank
it is plain PyTorch there; on more it calls FlashAttention's kernel, for which flash_on_cpu.py stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lccp.config.load import parse_config
from megatron_lccp.parallel import compat, cpu
from megatron_lccp.parallel.groups import make_groups, start_ranks

FLASH = "--megatron.transformer.attention_backend=flash"
KINDS = ("portable", "transformer_engine")


@contextlib.contextmanager
def _built_without_cuda(meta: bool = False) -> Iterator[None]:
    """While open, Transformer Engine builds its modules on a machine without CUDA; `meta` keeps its norms there."""
    if (is_available := torch.cuda.is_available)():
        yield
        return
    from transformer_engine.pytorch.ops.basic import rmsnorm

    canonicalize = rmsnorm.canonicalize_device  # asks for the current CUDA device to leave the meta device for
    try:
        torch.cuda.is_available = lambda: True
        if meta:
            rmsnorm.canonicalize_device = lambda device: torch.device("meta")
        yield
    finally:
        torch.cuda.is_available, rmsnorm.canonicalize_device = is_available, canonicalize


class _TensorsOnCuda(TorchFunctionMode):
    """While open, every tensor says that it is on a CUDA device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return True if func == torch.Tensor.is_cuda.__get__ else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _attention_on_cpu() -> Iterator[list[str]]:
    """While open, models can be built with Transformer Engine's core attention and run; yields its kernels as they run.

    It is told of a Hopper GPU where it asks which of its kernels can do; in FP32 that is the one in plain PyTorch.
    Where context is parallel it is also told of FlashAttention, and that FP32 is BF16, the type this takes.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    from megatron_lccp.model import build
    from tests.distributed.flash_on_cpu import flash_attention_on_cpu

    calls: list[str] = []

    def build_it(self, *args, original=TEDotProductAttention.__init__, **kwargs):
        with _built_without_cuda():
            original(self, *args, **kwargs)

    def run_it(self, *args, original=TEDotProductAttention.forward, **kwargs):
        as_bf16 = mock.patch.object(torch, "bfloat16", torch.float32)
        with _TensorsOnCuda(), as_bf16 if self.config.context_parallel_size > 1 else contextlib.nullcontext():
            return original(self, *args, **kwargs)

    def count(module, args, output):
        if type(module).__name__ in ("FlashAttention", "FusedAttention", "UnfusedDotProductAttention"):
            calls.append(type(module).__name__)

    hopper = SimpleNamespace(major=9, minor=0, name="H100")
    counting = torch.nn.modules.module.register_module_forward_hook(count)
    with (
        mock.patch.object(TEDotProductAttention, "__init__", build_it),
        mock.patch.object(TEDotProductAttention, "forward", run_it),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: hopper),
        mock.patch.object(build, "has_transformer_engine", lambda: True),
        flash_attention_on_cpu(),
    ):
        try:
            yield calls
        finally:
            counting.remove()


def attentions(path: Path, overrides: Sequence[str], tokens: Any) -> dict[str, dict[str, Any]]:
    """By kind of core attention, in portable layers: `jobs.layout`, and what taps see and zeroed heads leave."""
    from tests.distributed.jobs import layout

    found = {}
    for kind in KINDS:
        chosen = [*overrides, "--model.layers=portable", f"--model.attention={kind}"]
        with _attention_on_cpu() as calls:
            found[kind] = layout(path, chosen, tokens) | _tapped(path, chosen, tokens) | {"kernels": set(calls)}
    return found


def context_attention(path: Path, overrides: Sequence[str], tokens: Any) -> dict[str, Any]:
    """`jobs.layout` with Transformer Engine's core attention, and which of its kernels and exchanges ran."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    from tests.distributed.jobs import layout

    ran: list[str] = []
    exchanges = {name for name in vars(context_parallel) if name.startswith("AttnFuncWithCP")}

    def counted(name: str, apply):
        return lambda *args: ran.append(name) or apply(*args)

    with contextlib.ExitStack() as stack:
        for name in exchanges:
            kind = getattr(context_parallel, name)
            stack.enter_context(mock.patch.object(kind, "apply", counted(name, kind.apply)))
        calls = stack.enter_context(_attention_on_cpu())
        chosen = [*overrides, "--model.layers=portable", "--model.attention=transformer_engine", FLASH]
        found = layout(path, chosen, tokens)
    return found | {"kernels": set(calls), "exchanges": set(ran)}


def _tapped(path: Path, overrides: Sequence[str], tokens: Any) -> dict[str, Any]:
    from megatron_lccp.measuring.taps import tap_attention, zero_heads
    from tests.distributed.jobs import train_state_for

    train_state, seen = train_state_for(path, [*overrides, "--monitors=[]"]), {}

    def visit(layer: int, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        seen[layer] = (query.numpy().copy(), key.numpy().copy(), scale)

    rows = torch.as_tensor(tokens)[:, :-1]
    positions = torch.arange(rows.shape[1]).expand_as(rows)
    with torch.no_grad(), tap_attention(train_state.chunks, visit):
        logits = train_state.chunks[0](rows, positions, None)
    with torch.no_grad(), zero_heads(train_state.chunks, train_state.groups.tp, [(0, 1), (1, 3)]):
        without = train_state.chunks[0](rows, positions, None)
    return {"seen": seen, "logits": logits.numpy(), "without": without.numpy()}


def context_parallel(path: Path, cases: dict[str, Sequence[str]], attention: str) -> dict[str, dict[int, dict]]:
    """By case (overrides) and layer of this rank: what its core attention was told of context parallelism.

    Of 8 ranks in 2 pipeline stages of 4 context-parallel ranks, rank 6: the third of the second stage.
    """
    from megatron_lccp.model.attention import PortableAttention

    compat.quiet()
    cpu.install()
    compat.apply()
    told: dict[int, str | None] = {}

    def init(self, *args, cp_comm_type=None, original=PortableAttention.__init__, **kwargs):
        original(self, *args, **kwargs)
        told[self.layer_number] = cp_comm_type

    with mock.patch.object(PortableAttention, "__init__", init):
        return {
            name: _context_of(path, [*more, f"--model.attention={attention}"], told) for name, more in cases.items()
        }


def _context_of(path: Path, overrides: Sequence[str], told: dict[int, str | None]) -> dict[int, dict]:
    from megatron_lccp.measuring.taps import core_attentions
    from tests.distributed.meta import build_without_memory

    common = ("--model.layers=portable", "--parallel.context=4", "--parallel.pipeline=2")
    config = parse_config(path, [*common, *overrides])
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=6, world_size=8)
    groups = make_groups(config.parallel, torch.device("meta"), config.seed)
    told.clear()
    with contextlib.nullcontext() if config.model.attention == "portable" else _built_without_cuda(meta=True):
        chunks = build_without_memory(config, 2048, groups)
    found: dict[int, dict] = {}
    for layer, core, _ in core_attentions(chunks):
        found[layer] = {"kind": told.get(layer + 1)}
        if not told:
            group = core.cp_group
            levels = group if isinstance(group, list) else [group]
            found[layer] = {
                "kind": core.cp_comm_type, "groups": [dist.get_process_group_ranks(level) for level in levels],
                "ranks": core.cp_global_ranks, "stream": core.cp_stream is not None, "te": type(core).__name__,
            }  # fmt: skip
    return found


def built(path: Path, cases: dict[str, tuple[Sequence[str], int, int]]) -> dict[str, dict[str, Any]]:
    """By case (overrides, ranks, this rank) and kind of layers: parameters and what a checkpoint would hold of them."""
    compat.quiet()
    cpu.install()
    compat.apply()
    torch.set_num_threads(1)
    return {
        name: {kind: _built(path, [*overrides, f"--model.layers={kind}"], ranks, rank) for kind in KINDS}
        for name, (overrides, ranks, rank) in cases.items()
    }


def _built(path: Path, overrides: Sequence[str], ranks: int, rank: int) -> dict[str, Any]:
    from megatron_lccp.model.build import wrap_for_training
    from tests.distributed.meta import Nowhere, build_without_memory

    config = parse_config(path, [*overrides, "--training.precision=bf16"])
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    groups = make_groups(config.parallel, torch.device("meta"), config.seed)
    with _built_without_cuda(meta=True):
        chunks = build_without_memory(config, 2048, groups)
    about = _about(chunks)
    with torch.device("meta"), Nowhere():
        wrapped = wrap_for_training(chunks, config, groups)
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return about | {"bytes": sum(buffer.param_data.nbytes + buffer.grad_data.nbytes for buffer in buffers)}


def _about(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    from tests.distributed.meta import count_parameters

    return {
        "count": count_parameters(chunks, chunks[0].config.moe_router_topk),
        "names": [(name, tuple(p.shape)) for chunk in chunks for name, p in chunk.named_parameters()],
        "expert": {n for c in chunks for n, p in c.named_parameters() if not getattr(p, "allreduce", True)},
        "parallel": {n for c in chunks for n, p in c.named_parameters() if getattr(p, "sequence_parallel", False)},
        "kept": _kept(chunks),
        "parts": {type(module).__name__ for chunk in chunks for module in chunk.modules()},
        "attention": type(chunks[0].decoder.layers[0].self_attention.core_attention).__name__,
    }


def _kept(chunks: Sequence[torch.nn.Module]) -> list[tuple]:
    """(kind, name, whole shape, place, own shape) of everything in the sharded state, in order."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    found = []
    for chunk in chunks:
        with torch.device("meta"):
            state = chunk.sharded_state_dict()
            apply_factories(state)
        for value in nested_values(state):
            own = tuple(getattr(value, "local_shape", ()))
            found.append((type(value).__name__, value.key, tuple(value.global_shape), tuple(value.global_offset), own))
    return sorted(found)


def carried(path: Path, overrides: Sequence[str], directory: Path) -> dict[str, Any]:
    """One rank: drawn weights through a file and a checkpoint, from each kind of layers to each; shards by route."""
    from megatron.core import dist_checkpointing

    from megatron_lccp.model.build import build_chunks
    from megatron_lccp.model.resolved import resolve
    from megatron_lccp.weights.state import METADATA
    from megatron_lccp.weights.whole import load_whole, save_whole
    from tests.distributed.jobs import learned_norms, shards_of

    device = start_ranks(timeout_s=120)
    torch.set_num_threads(1)
    models = {}
    for kind in KINDS:
        config = parse_config(path, [*overrides, f"--model.layers={kind}", "--training.precision=bf16"])
        groups = make_groups(config.parallel, device, config.seed)
        with _built_without_cuda():
            models[kind] = build_chunks(config, resolve(config).of_vocabulary(2048), groups)
    portable, te = (models[kind] for kind in KINDS)
    learned_norms(portable)
    found = {"drawn": shards_of(portable)}
    save_whole(portable, directory / "whole.safetensors", {})
    load_whole(te, directory / "whole.safetensors")
    found["file to te"] = shards_of(te)
    found["te"] = {name: parameter.detach().float().numpy().copy() for name, parameter in te[0].named_parameters()}
    found["portable"] = {name: p.detach().float().numpy().copy() for name, p in portable[0].named_parameters()}
    for source, target, name in ((portable, te, "to te"), (te, portable, "to portable")):
        (directory / name).mkdir()
        dist_checkpointing.save(source[0].sharded_state_dict(metadata=METADATA), str(directory / name))
        for parameter in target[0].parameters():
            parameter.data.zero_()
        state = dist_checkpointing.load(target[0].sharded_state_dict(metadata=METADATA), str(directory / name))
        target[0].load_state_dict(state)
        found[f"checkpoint {name}"] = shards_of(target)
    return found


def scales_through_a_checkpoint(path: Path, directory: Path) -> dict[str, Any]:
    """Scales of delayed scaling of every module, experts too, as they were and as a checkpoint brings them back.

    With what a second model had of them while its modules knew of no FP8 yet; no kernel is run.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_lccp.model.build import build_chunks
    from megatron_lccp.model.resolved import resolve
    from megatron_lccp.parallel.unpickle import data_only
    from megatron_lccp.weights.state import METADATA

    device = start_ranks(timeout_s=120)
    overrides = ["--megatron={}", "--model.layers=transformer_engine", "--training.precision=bf16"]
    config = parse_config(path, [*overrides, "--training.fp8=delayed"])
    groups = make_groups(config.parallel, device, config.seed)
    with _built_without_cuda():
        trained, fresh = (build_chunks(config, resolve(config).of_vocabulary(2048), groups)[0] for _ in range(2))
    recipe = get_fp8_recipe(trained.config)
    FP8GlobalStateManager.is_fp8_enabled, FP8GlobalStateManager.get_fp8_recipe = lambda: True, lambda: recipe

    def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{way}.{kind}": getattr(module.fp8_meta[way], kind)
            for name, module in model.named_modules()
            for way in ("scaling_fwd", "scaling_bwd")
            for kind in ("scale", "amax_history")
            if way in (getattr(module, "fp8_meta", None) or {})
        }

    for name, module in trained.named_modules():
        if name.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")):
            module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))
    for state in states(trained).values():
        state.copy_(torch.rand_like(state))
    before = {name: state.numpy().copy() for name, state in states(trained).items()}
    dist_checkpointing.save(trained.sharded_state_dict(metadata=METADATA), str(directory))
    none_yet = not states(fresh)
    with data_only(directory):
        state = dist_checkpointing.load(fresh.sharded_state_dict(metadata=METADATA), str(directory))
        fresh.load_state_dict(state)
    return {"before": before, "after": {n: s.numpy().copy() for n, s in states(fresh).items()}, "none yet": none_yet}


def scales_around_a_window() -> dict[str, Any]:
    """Scales of delayed scaling, and what a checkpoint keeps of them, before, after and without `precision`.

    And the scales that another module has when it took that extra state as a checkpoint is loaded, inside `data_only`.

    The kernels are not run: what they would write into the history is written here, and a module is told of FP8 as
    its forward does (`init_fp8_metadata`).
    """
    cpu.install()
    import transformer_engine.pytorch as te
    from megatron.core.fp8_utils import get_fp8_recipe
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_lccp.measuring.fp8 import precision
    from megatron_lccp.model.build import FP8
    from megatron_lccp.parallel.unpickle import data_only

    fields = {**FP8["delayed"], "fp8_amax_history_len": 4}
    recipe = get_fp8_recipe(TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=1, **fields))

    def forward(module: torch.nn.Module, fp8: bool, seen: float) -> None:
        FP8GlobalStateManager.is_fp8_enabled, FP8GlobalStateManager.get_fp8_recipe = lambda: fp8, lambda: recipe
        module.init_fp8_metadata()
        if fp8:
            module.fp8_meta["scaling_fwd"].amax_history[0] = seen

    def state(module: torch.nn.Module) -> list:
        saved = bytes(module.get_extra_state().numpy()) if torch.is_tensor(module.get_extra_state()) else b""
        scaling = module.fp8_meta["scaling_fwd"]
        return [scaling.amax_history.clone().tolist(), scaling.scale.tolist(), len(saved) > 0, module.fp8_initialized]

    class Config:
        fp8, fp4 = "hybrid", None

    found: dict[str, Any] = {}
    for name, fp8 in (("bf16", False), ("fp8", True)):
        with _built_without_cuda():
            module = te.Linear(32, 32, device="cpu")
        module.config = Config()
        found[name] = {}
        with precision([module], fp8):  # before any step
            forward(module, fp8, 5.0)
        forward(module, True, 3.0)
        module.fp8_meta["scaling_fwd"].scale.fill_(7.0)
        found[name]["before"] = state(module)
        with precision([module], fp8):
            found[name]["asked"] = module.config.fp8
            forward(module, fp8, 9.0)
        found[name]["after"], found[name]["config"] = state(module), module.config.fp8
        with _built_without_cuda():
            resumed = te.Linear(32, 32, device="cpu")
        forward(resumed, True, 0.0)
        with data_only("checkpoint"):
            resumed.set_extra_state(module.get_extra_state())
        found[name]["resumed"] = state(resumed)
        forward(module, fp8, 9.0)
        found[name]["without"] = state(module)
    return found
