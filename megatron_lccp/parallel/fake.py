"""Ranks that do not exist, in one process: Megatron-Core's own code on tensors without memory.

In: how many ranks there would be, and which one to be. Out: that rank's groups on PyTorch's fake process groups, on
which nothing is sent, a mode in which floating-point tensors have shapes but no storage (the meta device), and a record
of what the rank would have sent. Integers and masks stay real, for shapes depend on them.
Paths below are those of megatron-core 0.16.1 under megatron/core.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_lccp.config.tree import ParallelConfig
from megatron_lccp.parallel.groups import Groups, make_groups

META = torch.device("meta")
CPU = torch.device("cpu")

Message = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor between two pipeline stages."""


class WithoutMemory(TorchFunctionMode):
    """Where a device is named, floating-point tensors are created on the meta device and all others on the CPU.

    A tensor without storage that is asked for its value says 1, or False if it is a truth.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        of_meta = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_meta
        if func is torch.Tensor.cuda:
            return args[0]
        if of_meta and func in _STAND_INS:
            return _STAND_INS[func](*args, **kwargs)
        if func is torch.tensor:
            args = (_with_values(args[0]), *args[1:])
        if kwargs.get("device") is not None and func is not torch.Tensor.to:
            kwargs.pop("pin_memory", None)
            made = func(*args, **{**kwargs, "device": META})
            return made if made.is_floating_point() else func(*args, **{**kwargs, "device": CPU})
        try:
            result = func(*args, **kwargs)
        except RuntimeError:  # a real tensor beside one without storage, which few operations take
            if not any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
                raise
            result = func(*(a.to(META) if isinstance(a, torch.Tensor) else a for a in args), **kwargs)
        if func is torch.Tensor.type and of_meta and isinstance(result, str):
            # optimizer/optimizer.py:481 and clip_grads.py:103 ask for the types of CUDA tensors
            return {torch.bfloat16: "torch.cuda.BFloat16Tensor", torch.float32: "torch.cuda.FloatTensor"}[args[0].dtype]
        return result


def _value(tensor: torch.Tensor) -> Any:
    return False if tensor.dtype is torch.bool else 1.0


def _selected(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """masked_select, whose length the mask says; a mask without storage selects nothing that could be counted."""
    return tensor.reshape(-1)[mask.expand(tensor.shape).reshape(-1).nonzero()[:, 0]]


def _rows(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """index_select by an operation whose gradient takes a real index."""
    return tensor.movedim(dim, 0)[index].movedim(0, dim)


_STAND_INS: dict[Callable, Callable] = {
    torch.Tensor.item: _value,
    torch.Tensor.__float__: _value,
    torch.Tensor.__bool__: _value,
    torch.Tensor.__int__: lambda tensor: 1,
    torch.Tensor.tolist: lambda tensor: torch.ones(tensor.shape).tolist(),
    torch.Tensor.cpu: lambda tensor, *_, **__: torch.ones(tensor.shape, dtype=tensor.dtype),
    torch.Tensor.masked_select: _selected,
    torch.masked_select: _selected,
    torch.Tensor.index_select: _rows,
    torch.index_select: _rows,
}


def _with_values(nested: Any) -> Any:
    """Numbers in nested lists, with 1 for those that are tensors without storage."""
    if isinstance(nested, (list, tuple)):
        return [_with_values(item) for item in nested]
    return 1.0 if isinstance(nested, torch.Tensor) and nested.is_meta else nested


@dataclass
class Record:
    """What a rank did, in order."""

    sent: dict[int, list[Message]] = field(default_factory=dict)
    """Rank -> what it was sent."""
    received: dict[int, list[Message]] = field(default_factory=dict)
    """Rank -> what was expected from it."""
    order: list[str] = field(default_factory=list)
    """`F` for the forward and `B` for the backward of a micro-batch through a chunk."""

    def in_flight(self) -> int:
        """Forward passes whose backward is still to come, at most."""
        most = now = 0
        for event in self.order:
            now += 1 if event == "F" else -1
            most = max(most, now)
        return most

    def cut(self) -> Record:
        """What is written down so far; the next page is empty."""
        page = Record(self.sent, self.received, self.order)
        self.sent, self.received, self.order = {}, {}, []
        return page


@contextlib.contextmanager
def fake_rank(layout: ParallelConfig, seed: int, rank: int, ranks: int) -> Iterator[tuple[Groups, Record]]:
    """Be `rank` of `ranks`, with device meta; what is replaced for it is given back. RuntimeError among real ranks."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a fake rank cannot be one of a real job")
    record, mode = Record(), WithoutMemory()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with _replaced(_stand_ins(mode, record)):
            groups = make_groups(layout, META, seed)
            with mode:
                yield groups, record
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


_ABSENT = object()


@contextlib.contextmanager
def _replaced(stand_ins: list[tuple[Any, str, Any]]) -> Iterator[None]:
    originals = [(module, name, getattr(module, name, _ABSENT)) for module, name, _ in stand_ins]
    try:
        for module, name, stand_in in stand_ins:
            setattr(module, name, stand_in)
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original) if original is not _ABSENT else delattr(module, name)


class _Done:
    """A message that has arrived."""

    def wait(self) -> None:
        pass


def _stand_ins(mode: WithoutMemory, record: Record) -> list[tuple[Any, str, Any]]:
    """(module, name, what stands there) for what fake process groups and meta tensors cannot do."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.pipeline_parallel import p2p_communication, schedules

    run_backward = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with mode:  # which torch.autograd.backward, being overridable itself, has left
            return run_backward(*args, **kwargs)

    def batched(**messages: Any) -> list[_Done]:
        _write_down(record, **messages)
        return []

    def one_by_one(**messages: Any) -> dict[str, _Done]:
        _write_down(record, **messages)
        sent = (name for name, tensor in messages.items() if name.startswith("tensor_") and tensor is not None)
        return {name.removeprefix("tensor_"): _Done() for name in sent}

    def gather(found: list, mine: object, group: object = None) -> None:
        found[:] = [mine] * len(found)  # all ranks of a fake job have what this one has

    def counted(event: str, function: Callable) -> Callable:
        def step(*args: Any, **kwargs: Any) -> Any:
            record.order.append(event)
            return function(*args, **kwargs)

        return step

    return [
        (dist, "all_gather_object", gather),
        (torch.autograd, "_engine_run_backward", backward),
        (p2p_communication, "_batched_p2p_ops", batched),
        (p2p_communication, "_p2p_ops", one_by_one),
        # reduces and gathers several buckets by an operation that knows no meta tensors; inside, each is done by itself
        (param_and_grad_buffer, "_coalescing_manager", lambda *_, **__: contextlib.nullcontext(_Done())),
        *_router_losses(),
        (schedules, "forward_step", counted("F", schedules.forward_step)),
        (schedules, "backward_step", counted("B", schedules.backward_step)),
    ]


def _router_losses() -> list[tuple[Any, str, Any]]:
    """Where the losses of routers are kept, for as many layers as the first model of a process has."""
    from megatron.core.transformer.moe import moe_utils

    try:
        from megatron.core.transformer.moe import moe_logging  # since 0.19
    except ImportError:
        return [(moe_utils, "_MOE_LAYER_WISE_LOGGING_TRACKER", {})]  # moe/moe_utils.py:43
    return [(moe_logging, "_MOE_METRICS_TRACKER", None)]  # moe/moe_logging.py:46 of 0.19.2


def _write_down(
    record: Record, *, tensor_send_prev, tensor_recv_prev, tensor_send_next, tensor_recv_next, prev_pipeline_rank: int,
    next_pipeline_rank: int, **_: Any,
) -> None:  # fmt: skip
    for book, peer, tensor in (
        (record.sent, prev_pipeline_rank, tensor_send_prev),
        (record.sent, next_pipeline_rank, tensor_send_next),
        (record.received, prev_pipeline_rank, tensor_recv_prev),
        (record.received, next_pipeline_rank, tensor_recv_next),
    ):
        if tensor is not None:
            book.setdefault(peer, []).append((tuple(tensor.shape), tensor.dtype))
