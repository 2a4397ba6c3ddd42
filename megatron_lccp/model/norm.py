"""RMSNorm that works with sequence parallelism, with and without Transformer Engine.

In: activations [..., h]. Out: the same shape. Megatron-Core's own torch norm refuses sequence parallelism
(transformer/torch_norm.py), without which a MoE cannot train on several TP ranks (transformer/moe/moe_layer.py:379).
"""

from __future__ import annotations

import functools

import torch


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm whose weight says that its gradient is to be summed over tensor-parallel ranks."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        device = torch.cuda.current_device() if not config.use_cpu_initialization else None
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        # read by distributed/finalize_model_grads.py: each rank saw only its part of the sequence
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)


@functools.cache
def te_norm_class() -> type[torch.nn.Module]:
    """Transformer Engine's RMSNorm as Megatron-Core builds it, without its extra state.

    That says how an operation quantizes; a norm does not, and portable layers have none to load in its place.
    """
    import transformer_engine.pytorch as te
    from megatron.core.extensions.transformer_engine import _get_extra_te_kwargs

    class TENorm(te.RMSNorm):
        def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
            parallel = config.sequence_parallel
            super().__init__(hidden_size, eps=eps, sequence_parallel=parallel, **_get_extra_te_kwargs(config))
            self.weight.sequence_parallel = parallel  # which a norm on the meta device puts off

        get_extra_state, set_extra_state = torch.nn.Module.get_extra_state, torch.nn.Module.set_extra_state

    return TENorm
