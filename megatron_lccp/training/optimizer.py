"""AdamW over Megatron-Core's distributed optimizer, and the learning rate of a stage.

In: wrapped model chunks and the config. Out: Megatron-Core's optimizer and one scheduler per stage, both counted in
tokens, so that a schedule does not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_lccp.config.tree import Config, StageConfig


def make_optimizer(chunks: Sequence[DistributedDataParallel], config: Config) -> MegatronOptimizer:
    """Megatron-Core's distributed AdamW; `megatron.optimizer` wins over our fields."""
    o = config.optimizer
    fields = dict(
        optimizer="adam",
        lr=max(stage.lr for stage in config.stages.values()),
        min_lr=0.0,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=config.training.precision == "bf16",
        params_dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(
        OptimizerConfig(**{**fields, **config.megatron.optimizer}), list(chunks), use_gloo_process_groups=False
    )


def make_scheduler(
    optimizer: MegatronOptimizer, config: Config, stage: StageConfig, tokens_done: int
) -> OptimizerParamScheduler:
    """The learning rate of one stage, moved to where the stage stands; step it by tokens before each update."""
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = stage.lr, stage.min_lr
    decay = config.optimizer.weight_decay
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=stage.lr,
        min_lr=stage.min_lr,
        lr_warmup_steps=stage.warmup_tokens,
        lr_decay_steps=max(stage.tokens, stage.warmup_tokens + 1),
        lr_decay_style=stage.lr_schedule,
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=stage.tokens,
        wd_incr_style="constant",
    )
    scheduler.step(increment=tokens_done)
    return scheduler
