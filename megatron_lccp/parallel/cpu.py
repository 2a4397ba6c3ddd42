"""Megatron-Core on CPU ranks: every stand-in it needs, in one place, active only where there is no CUDA.

In: an imported torch. Out: Megatron-Core's own training code runs under gloo. Each stand-in names the upstream line
that needs it (megatron-core 0.16.1, paths below megatron/core; 0.19.2 runs with the same).
Call `install()` before the first Megatron import.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_mode: _CudaMeansCpu | None = None


def install() -> bool:
    """Put the stand-ins in place once per process; True if this process runs on CPU."""
    global _mode
    if torch.cuda.is_available():
        return False
    if _mode is None:
        _stand_in_for_torch_cuda()
        _stand_in_for_megatron()
        _mode = _CudaMeansCpu()
        _mode.__enter__()  # for the life of the process: Megatron asks for "cuda" throughout a step
    return True


class _CudaMeansCpu(TorchFunctionMode):
    """`device="cuda"`, `.cuda()` and tests for CUDA tensor types mean the CPU.

    pipeline_parallel/schedules.py:596,2138; optimizer/optimizer.py:481,485,907; optimizer/clip_grads.py:103,167,174;
    optimizer/distrib_optimizer.py:361,420,582; models/common/language_module/language_module.py:244;
    transformer/moe/moe_utils.py:998; utils.py:1207. Memory need not be pinned for the copy that does not happen:
    models/common/embeddings/rope_utils.py:62.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs and kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        elif func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """CPU work runs in order: a stream or event has nothing to wait for (transformer/moe/token_dispatcher.py:445)."""

    def __init__(self, *args, **kwargs):
        pass

    def _nothing(self, *args, **kwargs):
        return self

    wait_stream = wait_event = record_event = record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True


def _stand_in_for_torch_cuda() -> None:
    stream = _Stream()
    stand_ins: dict[str, object] = {
        "current_device": lambda: _CPU,  # tensor_parallel/layers.py:261, distributed/param_and_grad_buffer.py:800
        "synchronize": lambda device=None: None,  # pipeline_parallel/p2p_communication.py:398
        "Stream": _Stream,  # transformer/moe/token_dispatcher.py:445,895, and so the event
        "Event": _Stream,
        "current_stream": lambda device=None: stream,  # transformer/moe/token_dispatcher.py:871, and so the default
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),  # transformer/moe/token_dispatcher.py:874
        "manual_seed": lambda seed: torch.random.default_generator.manual_seed(seed),
    }
    # One generator does for both: tensor_parallel/random.py:235,238,422.
    of_random: dict[str, object] = {
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
    for module, names in ((torch.cuda, stand_ins | of_random), (torch.cuda.random, of_random)):
        for name, stand_in in names.items():
            setattr(module, name, stand_in)


def _stand_in_for_megatron() -> None:
    # jit.py hands small element-wise functions to torch.compile: seconds at import, and a C++ tool chain at first use.
    original = torch.compile
    setattr(torch, "compile", lambda function=None, **_: function or (lambda f: f))
    try:
        from megatron.core.models.gpt import gpt_layer_specs, gpt_model  # noqa: F401  (imports what uses it)
        from megatron.core.tensor_parallel import random
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
    finally:
        setattr(torch, "compile", original)

    # tensor_parallel/layers.py:730 asks for a setting of the CUDA driver.
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
    # tensor_parallel/random.py warns when the CPU generator moved inside a fork; here it is the one that should.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    # tensor_parallel/random.py:112 queues the restore until CUDA starts, so on CPU a fork never ends, and
    # replicas differ.
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    # transformer/moe/moe_utils.py:1093 turns split sizes into arrays only if they are on a GPU; gloo wants no tensors.
    def to_host(tensor, as_numpy: bool = False, record_stream: bool = False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_host

    _uneven_collectives()

    # tensor_parallel/random.py:63 of 0.19.2 compiles C++ to hand what is recomputed to those who wait for it; 0.16.1
    # copies it (tensor_parallel/random.py:705), and so does this.
    def share_storage(waiting: torch.Tensor, recomputed: torch.Tensor) -> None:
        storage = recomputed.untyped_storage()
        waiting.untyped_storage().resize_(storage.nbytes())
        waiting.untyped_storage().copy_(storage)

    random._share_storage_ext = SimpleNamespace(share_storage=share_storage)
    _plain_optimizer()


def _uneven_collectives() -> None:
    """Experts that are tensor-parallel themselves gather tokens of which ranks hold different numbers
    (transformer/moe/token_dispatcher.py:696). NCCL takes them; gloo wants equal numbers, and has no such reduction."""
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gathered(input_: torch.Tensor, group, output_split_sizes=None, use_global_buffer: bool = False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros(max(sizes), *input_.shape[1:])
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    def scattered(input_: torch.Tensor, group, input_split_sizes=None, use_global_buffer: bool = False):
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        whole = input_.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split([int(size) for size in input_split_sizes])[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gathered, scattered


def _plain_optimizer() -> None:
    """What Megatron-Core itself takes where neither Transformer Engine nor Apex can be imported.

    Where they can, without a GPU, their kernels would fail at the first step: optimizer/__init__.py:14 and
    distrib_optimizer.py:24 (Adam), optimizer/optimizer.py:18 and clip_grads.py:11 of 0.19.2.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (optimizer.optimizer, clip_grads):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_tensor_impl = utils.local_multi_tensor_l2_norm, None
