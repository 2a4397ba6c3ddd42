"""Megatron-Core's model chunks as the engine of a window: on any layout, in training or not.

In: this rank's chunks in whatever state the training left them. Out: answers to prefills (measuring/forward.py); and the
training goes on as if nothing happened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_lccp.measuring.engine import Asked, Sizes
from megatron_lccp.measuring.forward import predict
from megatron_lccp.measuring.found import Found
from megatron_lccp.measuring.fp8 import precision
from megatron_lccp.measuring.pieces import Pieces
from megatron_lccp.measuring.prefill_attention import why_not_shared
from megatron_lccp.measuring.prefills import Prefill
from megatron_lccp.measuring.taps import zero_heads
from megatron_lccp.model.build import bare
from megatron_lccp.parallel.groups import Groups


@dataclass(frozen=True)
class MegatronEngine:
    """Model chunks of Megatron-Core; an Engine."""

    chunks: Sequence[torch.nn.Module]
    """This rank's, wrapped or bare."""
    groups: Groups
    """Process groups; collectives belong to the groups named here."""
    vocab_size: int
    """Tokens that exist, without padding."""
    fp8: bool = False
    """Measure a model that trains in FP8 in FP8 too; else in BF16, where a token depends on what it sees alone."""

    @property
    def sizes(self) -> Sizes:
        """The model's shape."""
        first = bare(self.chunks[0])
        c = first.config
        return Sizes(c.num_layers, c.num_attention_heads, first.max_sequence_length, self.vocab_size)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Evaluation mode, no gradients, gathered parameters; all of it as before on leaving."""
        modules = [module for chunk in self.chunks for module in chunk.modules()]
        was_training = [module.training for module in modules]
        hooked = [
            c for c in self.chunks if isinstance(c, DistributedDataParallel) and c.remove_forward_pre_hook_handles
        ]
        random_states = _random_states(self.groups.device)
        try:
            for chunk in hooked:  # parameters are gathered now, not by a hook in the middle of a measurement
                chunk.disable_forward_pre_hook()
            for module in modules:
                module.training = False
            with torch.no_grad(), precision(modules, self.fp8):
                yield
        finally:
            for module, training in zip(modules, was_training):
                module.training = training
            for chunk in hooked:
                chunk.enable_forward_pre_hook()
            _restore(random_states, self.groups.device)

    def why_not_shared(self) -> str | None:
        """Why this rank's chunks must run each sample on its own; None if cells can share prefills."""
        return why_not_shared([bare(chunk) for chunk in self.chunks])

    def without_heads(self, heads: Iterable[tuple[int, int]]) -> AbstractContextManager[None]:
        """While open, the output of these heads (layer, head) is zero in every forward."""
        return zero_heads(self.chunks, self.groups.tp, heads)

    def predict(
        self, replicas: Sequence[Sequence[Prefill]], asked: Asked, done: Callable[[int], None], pieces: Pieces | None
    ) -> dict[int, Found]:
        """What the model says of every sample, on all ranks."""
        return predict(
            self.chunks, self.groups, replicas, self.vocab_size, asked.look, asked.questions, done, asked.scores, pieces
        )


def _random_states(device: torch.device) -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "tracker": dict(get_cuda_rng_tracker().get_states())}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
