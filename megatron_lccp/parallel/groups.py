"""Start the ranks and lay Megatron-Core's process groups over them.

In: the layout of a config and torchrun's environment. Out: `Groups`, passed to whatever communicates.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_lccp.config.tree import ParallelConfig
from megatron_lccp.parallel import compat, cpu
from megatron_lccp.parallel.arrivals import naming_who_lacks
from megatron_lccp.parallel.lost import ended_before
from megatron_lccp.processes import forks_end_with_this

if TYPE_CHECKING:  # not before the stand-ins for CUDA are in place
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Groups:
    """Where this rank stands and whom it talks to."""

    collection: ProcessGroupCollection
    """Megatron-Core's own record of its groups."""
    tp: dist.ProcessGroup
    """Tensor-parallel group."""
    pp: dist.ProcessGroup
    """Pipeline-parallel group."""
    dp: dist.ProcessGroup
    """Data-parallel group (without context parallelism)."""
    cp: dist.ProcessGroup
    """Context-parallel group."""
    device: torch.device
    """Where this rank computes."""
    layout: ParallelConfig
    """The layout the groups were made for."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and talks to the user."""
        return dist.get_rank() == 0


def start_ranks(timeout_s: float = 1800.0) -> torch.device:
    """Join torchrun's job (or run alone), on NCCL with CUDA and on gloo without; returns this rank's device.

    Raises ValueError if the environment contradicts itself or the ranks cannot connect.
    """
    if problem := environment_problem(os.environ):
        raise ValueError(problem)
    forks_end_with_this()
    compat.quiet()
    on_cpu = cpu.install()
    compat.apply()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    # Port 0 is any that is free: several of us may run alone on one machine.
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    device = torch.device("cpu") if on_cpu else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if not on_cpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "gloo" if on_cpu else "nccl"
        try:
            with naming_who_lacks():
                dist.init_process_group(
                    backend,
                    timeout=datetime.timedelta(seconds=timeout_s),
                    device_id=None if on_cpu else device,
                )
                dist.barrier()  # so that none ends, with an error of its own, while others still look for it
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            rank, address = os.environ["RANK"], os.environ["MASTER_ADDR"]
            if ended_before(error):
                raise ValueError(
                    f"rank {rank} could not join the others: one of them ended ({reason}); its own line says why"
                ) from error
            raise ValueError(
                f"rank {rank} could not join the others ({reason}): MASTER_ADDR, here {address}, must be an address of "
                f"node 0 that all nodes reach; where the host name of a node leads elsewhere, set "
                f"{backend.upper()}_SOCKET_IFNAME to the network interface between the nodes; if another rank ended, "
                "its own line says why"
            ) from error
    return device


def environment_problem(given: Mapping[str, str]) -> str | None:
    """What is wrong with the variables by which a launcher places a rank; None if nothing is."""
    remedy = "torchrun sets it: start ranks by it, or unset WORLD_SIZE and RANK to run alone"
    numbers = {name: given[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT") if name in given}
    for name, text in numbers.items():
        if not (text.isascii() and text.isdecimal()) or (name == "WORLD_SIZE" and int(text) < 1):
            return f"{name}: should be a whole number{' of at least 1' * (name == 'WORLD_SIZE')}, is {text!r}; {remedy}"
    size = int(numbers.get("WORLD_SIZE", 1))
    if size > 1:  # else the others would be waited for without an end
        for name in ("RANK", "MASTER_ADDR"):
            if name not in given:
                return f"{name}: is not set, though WORLD_SIZE is {size}; {remedy}"
    if int(numbers.get("RANK", 0)) >= size:
        return f"RANK: {numbers['RANK']} is none of the {size} ranks of WORLD_SIZE; {remedy}"
    if int(numbers.get("MASTER_PORT", 0)) > 65535:
        return f"MASTER_PORT: should be at most 65535, is {numbers['MASTER_PORT']}; give a free port of node 0"
    return None


def make_groups(layout: ParallelConfig, device: torch.device, seed: int) -> Groups:
    """Build Megatron-Core's groups for `layout` over all started ranks and seed its random states."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        hierarchical_context_parallel_sizes=list(layout.context_levels) if layout.context_levels else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
    )
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed(seed, pp_rank))
    model_parallel_cuda_manual_seed(stage_seed(seed, pp_rank), force_reset_rng=True)
    return Groups(
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        device=device,
        layout=layout,
    )


def stage_seed(seed: int, pp_rank: int) -> int:
    """Pipeline stages draw different numbers; else layer k of every stage would start with the same weights."""
    return seed + 100_003 * pp_rank


def stop_ranks() -> None:
    """Leave the job."""
    if dist.is_initialized():
        dist.destroy_process_group()
