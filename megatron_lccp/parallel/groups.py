"""Start the ranks and lay Megatron-Core's process groups over them.

In: the layout of a config and torchrun's environment. Out: `Groups`, passed to whatever communicates.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_lccp.config.tree import ParallelConfig
from megatron_lccp.parallel import compat, cpu
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

    Raises ValueError if the ranks cannot connect.
    """
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
