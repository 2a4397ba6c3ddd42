"""FP8 training held still while a model is measured.

In: the modules of a model that may train in FP8. Out: a context in which they multiply in BF16, or in FP8 with the
scales they have; afterwards every scale, and what a checkpoint would keep of it, is as before.

What is kept where (Transformer Engine 2.11 and 2.20, module/base.py): a module holds the scales and the history of
largest values of delayed scaling in `fp8_meta`. A forward in BF16 leaves it marked as one that keeps nothing, so a
checkpoint after a window would be without them (`get_extra_state`); a forward in FP8 adds what it saw to the history,
with or without gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # an extra
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

_FLAGS = ("fp8", "fp8_calibration", "fp8_parameters", "fp8_initialized")
_AFRESH = {"scale": 1.0, "amax_history": 0.0}
"""Tensors of delayed scaling, and their values before the first step."""


@contextlib.contextmanager
def precision(modules: Sequence[torch.nn.Module], fp8: bool) -> Iterator[None]:
    """While open, modules that train in FP8 (or FP4) multiply so too (`fp8`), or else in BF16."""
    quantized = [module for module in modules if isinstance(getattr(module, "fp8_meta", None), dict)]
    flags = [[getattr(module, name, None) for name in _FLAGS] for module in quantized]
    scales = {id(tensor): tensor.clone() for tensor, _ in _scales(quantized)}
    switched = [] if fp8 else _switches(modules)
    try:
        for config, name, _ in switched:
            setattr(config, name, None)
        yield
    finally:
        for config, name, value in switched:
            setattr(config, name, value)
        for tensor, afresh in _scales(quantized):
            tensor.copy_(scales[id(tensor)]) if id(tensor) in scales else tensor.fill_(afresh)
        for module, values in zip(quantized, flags):
            for name, value in zip(_FLAGS, values):
                setattr(module, name, value)


def _switches(modules: Sequence[torch.nn.Module]) -> list[tuple[object, str, object]]:
    """(configuration, field, value) of all that turn quantization on; some modules hold a copy of the configuration.

    Megatron-Core reads them in every forward (transformer/transformer_block.py, transformer/moe/experts.py).
    """
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    return [
        (config, name, value)
        for config in configs.values()
        for name in ("fp8", "fp4")
        if (value := getattr(config, name, None))
    ]


def _scales(quantized: Sequence[TransformerEngineBaseModule]) -> Iterator[tuple[torch.Tensor, float]]:
    """(tensor, its value before the first step) of everything that delayed scaling follows; other recipes keep none."""
    for module in quantized:
        for way in ("scaling_fwd", "scaling_bwd"):
            state = module.fp8_meta.get(way)
            for name, afresh in _AFRESH.items():
                if torch.is_tensor(tensor := getattr(state, name, None)):
                    yield tensor, afresh
