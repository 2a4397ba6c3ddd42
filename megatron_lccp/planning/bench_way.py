"""One way of the bench of one GPU, measured: steps at every length and routing, then head scores over a forward.

In: the options of tools/bench_gpu.py. Out: one row (a dict of plain values) after another.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_lccp.config.load import ConfigError
from megatron_lccp.measuring.flops import step_flops
from megatron_lccp.measuring.prefills import one_each
from megatron_lccp.model.resolved import resolve
from megatron_lccp.parallel.groups import Groups, make_groups, start_ranks, stop_ranks
from megatron_lccp.planning.bench_samples import sample_of
from megatron_lccp.planning.bench_sizes import config_for, estimate_bytes


def measure_way(o: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the way `o.point`; a length that needs too much memory, or time (`o.until_s`), is a row that says so."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(s.getsockname()[1]))
    device = start_ranks(timeout_s=600)
    longest = config_for(o.point, max(o.lengths), o)
    trainer = _Trainer(o, make_groups(longest.parallel, device, o.seed))
    last_s, until_s = 0.0, getattr(o, "until_s", None)
    for length in sorted(o.lengths):
        for routing in o.routing:
            where = {"way": o.point, "routing": routing, "length": length, "layers": o.layers, "experts": o.experts}
            # Every length has as many tokens a step; a longer one has more attention.
            if until_s and time.time() + 2 * last_s * (o.warm_up + o.steps + 1) > until_s:
                yield where | {"failed": "no time was left"}
                continue
            try:
                row = where | trainer.steps(length, routing == "balanced")
                last_s = row["step_s"]
                if length == max(o.lengths) and routing == o.routing[0]:
                    row["heads_over_forward"] = trainer.heads(length)
                yield row
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                yield where | {"failed": "out of memory"}
    stop_ranks()


class _Trainer:
    """A model in training; the same one at every length."""

    def __init__(self, o: argparse.Namespace, groups: Groups):
        from megatron_lccp.model.build import build_chunks, passthrough_problems, refused_by_megatron, wrap_for_training
        from megatron_lccp.training.health import HealthMeter
        from megatron_lccp.training.optimizer import make_optimizer
        from megatron_lccp.training.step import prepare_schedules

        self.o, self.groups = o, groups
        config = config_for(o.point, max(o.lengths), o)
        model = resolve(config).of_vocabulary(2048)
        if problems := passthrough_problems(config, model) or refused_by_megatron(config, model):
            raise ConfigError("bench_gpu", problems)
        o.vocab = model.vocab_size
        self.chunks = wrap_for_training(build_chunks(config, model, groups), config, groups)
        self.optimizer = make_optimizer(self.chunks, config)
        prepare_schedules(self.chunks)
        self.meter = HealthMeter(self.chunks, self.optimizer, groups)
        self.config, self.shape = config, model.shape
        self.random = torch.Generator().manual_seed(o.seed)

    def steps(self, length: int, balanced: bool) -> dict[str, Any]:
        """Whole training steps of sequences of this length."""
        self.chunks[0].config.moe_router_force_load_balancing = balanced
        on_gpu = self.groups.device.type == "cuda"
        for _ in range(self.o.warm_up):
            self._step(length)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        step_s = statistics.median(self._timed(lambda: self._step(length)) for _ in range(self.o.steps))
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        flops = step_flops(self.shape, length, self.o.batch_tok, self.o.vocab)
        return {
            "step_s": step_s, "tokens_per_s": self.o.batch_tok / step_s, "flops": flops,
            "tflops": flops / step_s / 1e12, "mfu": flops / step_s / 1e12 / self.o.peak_tflops, "peak_bytes": peak,
            "estimate_bytes": estimate_bytes(self.o.point, length, self.o),
            "max_expert_load": self._step(length, self.meter).health.scalars().get("max_expert_load"),
        }  # fmt: skip

    def _step(self, length: int, meter=None):
        from megatron_lccp.training.step import train_step

        micro_batches, device = self.o.batch_tok // length, self.groups.device
        tokens = torch.randint(1, self.o.vocab, (micro_batches, length + 1), generator=self.random).to(device)
        positions = torch.arange(length, device=device)[None]
        batches = ({"tokens": t[None, :-1], "labels": t[None, 1:], "positions": positions} for t in tokens)
        return train_step(
            self.chunks, self.optimizer, self.groups, [batches], micro_batches, length, 1, meter=meter,
            loss_chunk_tok=self.o.loss_chunk_tok,
        )  # fmt: skip

    def heads(self, length: int) -> float:
        """What scoring every head from the answer's rows adds to a forward that gives the answer's loss, as a share.

        Measured as monitors do: in BF16, in an evaluation window; the two take turns and the fastest of each counts.
        """
        from megatron_lccp.measuring.forward import predict
        from megatron_lccp.measuring.fp8 import precision

        self.chunks[0].config.moe_router_force_load_balancing = False
        (prefills,) = one_each([sample_of(length, self.o)])
        best = {look: float("inf") for look in (False, True)}
        modules = [module for chunk in self.chunks for module in chunk.modules()]
        self.chunks[0].eval()
        with torch.no_grad(), precision(modules, fp8=False):
            for repeat in range(self.o.steps + 1):
                for look in best:
                    took = self._timed(lambda: predict(self.chunks, self.groups, [prefills], self.o.vocab, look))
                    best[look] = min(best[look], took) if repeat else best[look]  # the first is a warm-up
        self.chunks[0].train()
        return best[True] / best[False] - 1

    def _timed(self, run: Callable[[], Any]) -> float:
        """Seconds of a call, to the end of what it started on the device."""
        wait = torch.cuda.synchronize  # on a CPU there is nothing to wait for (parallel/cpu.py)
        wait()
        start = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - start
