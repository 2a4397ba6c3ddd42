"""What one optimizer step says of the model's health: routing, gradients part by part, attention logits.

In: the model chunks and the optimizer, watched through a step that is taken anyway. Out: `StepHealth`, the same on all
ranks, as scalars and as Rows. Nothing of the training changes, and no collective is added: what a rank saw is one
vector, which the step's own all-reduce sums (`partial`, `whole`).

Shapes: t tokens of a micro-batch on this rank, E experts, L layers, P parts of the gradient, s sequence, n query heads
and g key heads on this rank, h head width, r rows. Everything is counted once: a rank routes tokens that no other rank
routes (sequence parallelism), and holds layers, and shards of gradients, that no other rank holds.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared
from megatron.core.transformer.moe.router import Router

from megatron_lccp.measuring.taps import BLOCK_TOK, core_attentions
from megatron_lccp.model.build import bare
from megatron_lccp.parallel.groups import Groups
from megatron_lccp.parallel.zigzag import local_positions
from megatron_lccp.schema import Row

MONITOR = "health"
"""Name of these rows in Row.monitor."""
PARTS = ("attention", "router", "experts", "norms", "embedding")
"""What gradients are summed over, in each layer and outside of the layers; every parameter is in one of them."""
SAMPLED_ROWS = 64
"""Query rows of a sequence in which the largest attention logit is looked for."""


@dataclass(frozen=True)
class StepHealth:
    """One step, whole. A number that is not finite makes no row.

    Rows of a layer:

    - `expert_load` (layer, expert), share: of the step's token-expert assignments, those that the router gave to the
      expert, before capacity drops any. In [0, 1], and 1 over the experts of a layer; 1/E is balanced, 0 is an expert
      that learns nothing, and no expert can have more than 1/top-k.
    - `router_entropy` (layer), nat: mean over tokens of the entropy of the softmax over all expert logits, whatever
      scores the router then makes of them. In [0, ln E]; 0: each token knows its expert; ln E: no preference.
    - `dropped_share` (layer), share: of the assignments, those that expert capacity dropped. In [0, 1]; 0 without
      `moe_expert_capacity_factor`; 1 would mean that no expert worked. Capacity is a rank's, so it depends on layout.
    - `grad_norm_attention`, `grad_norm_router`, `grad_norm_experts` (with the shared expert; in a layer without
      experts its feed-forward part), `grad_norm_norms` (layer), norm: 2-norm of the gradient of these parameters before
      clipping, at least 0. Outside of the layers, without one: `grad_norm_embedding` (with the output layer) and
      `grad_norm_norms` (the final norm). The squares of all of them add up to the square of the step's `grad_norm`.
    - `attention_logit_max` (layer), logit: the largest scaled q.k, with its sign, over all heads and 64 evenly spaced
      rows of the first sequence of the step's first micro-batch on each data-parallel replica. A lower bound of
      the largest logit of the step; growth without end precedes an attention that sees one token only, and overflow.
    """

    load_LE: np.ndarray
    """Assignments to each expert."""
    tokens_L: np.ndarray
    """Tokens routed; 0 in a layer without experts."""
    entropy_L: np.ndarray
    """Sum of entropies over the tokens, nat."""
    dropped_L: np.ndarray
    """Assignments dropped."""
    grad_square_LP: np.ndarray
    """Squared norm of the gradient of each layer and part; the last line is what stands outside of the layers."""
    logit_max_L: np.ndarray
    """Largest attention logit found."""
    rows: int
    """Query rows that it was looked for in."""

    def scalars(self) -> dict[str, float]:
        """For one line per step: `router_entropy` and `dropped_share`, means over the layers with experts,
        `max_expert_load`, the fullest expert's load as a multiple of 1/E, `attention_logit_max` over the layers."""
        values = {"attention_logit_max": self.logit_max_L.max()}
        routed = self.tokens_L > 0
        if routed.any():
            load, tokens = self.load_LE[routed], self.tokens_L[routed]
            assigned = load.sum(1)
            values |= {
                "router_entropy": (self.entropy_L[routed] / tokens).mean(),
                "max_expert_load": (load.max(1) / assigned).max() * load.shape[1],
                "dropped_share": (self.dropped_L[routed] / assigned).mean(),
            }
        return {name: float(value) for name, value in values.items()}

    def to_rows(self, **common: Any) -> list[Row]:
        """Rows; `common` holds what all of them share: run, config_hash, step, tokens, stage."""
        rows: list[Row] = []

        def add(metric: str, value: float, unit: str, n: float, **where: Any) -> None:
            if np.isfinite(value):
                rows.append(
                    Row(**common, monitor=MONITOR, metric=metric, value=float(value), unit=unit, n=int(n), **where)
                )

        for layer, tokens in enumerate(self.tokens_L):
            if tokens:
                assigned = self.load_LE[layer].sum()
                for expert, load in enumerate(self.load_LE[layer]):
                    add("expert_load", load / assigned, "share", assigned, layer=layer, expert=expert)
                add("router_entropy", self.entropy_L[layer] / tokens, "nat", tokens, layer=layer)
                add("dropped_share", self.dropped_L[layer] / assigned, "share", assigned, layer=layer)
            add("attention_logit_max", self.logit_max_L[layer], "logit", self.rows, layer=layer)
        norm_LP = np.sqrt(self.grad_square_LP)
        for layer, norm_P in enumerate(norm_LP[:-1]):
            for part, norm in zip(PARTS, norm_P):
                if part != "embedding" and (part != "router" or self.tokens_L[layer]):
                    add(f"grad_norm_{part}", norm, "norm", 1, layer=layer)
        for part in ("norms", "embedding"):
            add(f"grad_norm_{part}", norm_LP[-1, PARTS.index(part)], "norm", 1)
        return rows


class HealthMeter:
    """Watches steps: `with watching(): forward and backward`, then `partial()` on each rank, summed, to `whole()`."""

    def __init__(self, chunks: Sequence[MegatronModule], optimizer: MegatronOptimizer, groups: Groups):
        config = chunks[0].config
        self._chunks, self._layers, self._experts = chunks, config.num_layers, config.num_moe_experts or 0
        layers = {layer.layer_number - 1: layer for chunk in chunks for layer in bare(chunk).decoder.layers}
        self._routers = {k: m for k, layer in layers.items() for m in layer.modules() if isinstance(m, Router)}
        self._uncapped = copy.copy(config)
        self._uncapped.moe_expert_capacity_factor = None
        self._shards, places = _gradient_places(chunks, layers, optimizer, self._layers)
        self._place_x = torch.tensor(places, dtype=torch.int64, device=groups.device)
        # The ranks of a pipeline stage have a column each, so that a sum over ranks hands on every rank's maximum.
        data = groups.collection.dp_cp
        self._column, self._columns = groups.tp.rank() + groups.tp.size() * data.rank(), groups.tp.size() * data.size()
        self._cp, self._replicas = groups.cp, groups.dp.size()
        self._sampled = 0
        self._seen: set[int] = set()

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=groups.device)

        self._route_lf = zeros(self._layers, self._experts + 3)  # E loads, tokens, sum of entropies, dropped
        self._grad_lp = zeros(self._layers + 1, len(PARTS))
        self._logit_lc = zeros(self._layers, self._columns)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While open, forward passes are counted, each once: only those with gradients, so that of a forward pass that
        activation recomputation repeats, the repetition counts."""
        hooks: list[Any] = []
        self._seen.clear()
        for table in (self._route_lf, self._grad_lp, self._logit_lc):
            table.zero_()
        try:
            for layer, router in self._routers.items():
                router.routing = self._counted(layer, router)  # hides the method of the class
            for layer, core, scale in core_attentions(self._chunks):
                see = partial(self._see_attention, layer, scale)
                hooks.append(core.register_forward_pre_hook(see, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for router in self._routers.values():
                router.__dict__.pop("routing", None)

    def partial(self) -> torch.Tensor:
        """What this rank saw since `watching` opened, with the gradients as they are now: 1-D, fp64; to be summed."""
        pairs = [(k, shard.grad) for k, shard in enumerate(self._shards) if shard.grad is not None]
        if pairs:
            norm_x = torch.stack(torch._foreach_norm([grad for _, grad in pairs]))
            place_x = self._place_x[[k for k, _ in pairs]] if len(pairs) < len(self._shards) else self._place_x
            self._grad_lp.view(-1).index_add_(0, place_x, norm_x.double().square())
        return torch.cat([table.flatten() for table in (self._route_lf, self._grad_lp, self._logit_lc)])

    def whole(self, sums: np.ndarray) -> StepHealth:
        """The sum over all ranks of what `partial` gave -> what it says."""
        ends = np.cumsum([self._route_lf.numel(), self._grad_lp.numel()])
        route, grad, logit = np.split(sums, ends)
        load_LE, tokens, entropy, dropped = np.split(
            route.reshape(self._layers, -1), np.arange(self._experts, self._experts + 3), axis=1
        )
        return StepHealth(
            load_LE=load_LE,
            tokens_L=tokens[:, 0],
            entropy_L=entropy[:, 0],
            dropped_L=dropped[:, 0],
            grad_square_LP=grad.reshape(self._layers + 1, -1),
            logit_max_L=logit.reshape(self._layers, -1).max(1),
            rows=self._sampled * self._replicas,
        )

    def _counted(self, layer: int, router: Router) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """The router's own `routing`, counted."""
        original = router.routing

        def routing(logits: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            probs_tE, kept_tE = original(logits, *args, **kwargs)
            if torch.is_grad_enabled():
                with torch.no_grad():
                    chosen_tE = kept_tE
                    if router.config.moe_expert_capacity_factor is not None:
                        config, router.config = router.config, self._uncapped
                        try:
                            _, chosen_tE = original(logits.detach(), *args, **kwargs)
                        finally:
                            router.config = config
                    self._count(layer, logits.detach(), chosen_tE, kept_tE, kwargs.get("padding_mask"))
            return probs_tE, kept_tE

        return routing

    def _count(
        self, layer: int, logits: torch.Tensor, chosen_tE: torch.Tensor, kept_tE: torch.Tensor,
        padding: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """`padding` (True) is no token of any text: it is routed, and counts for nothing."""
        logit_tE, line = logits.reshape(-1, self._experts).float(), self._route_lf[layer]
        dropping = kept_tE is not chosen_tE
        if padding is not None:
            text_t = ~padding.reshape(-1)
            logit_tE, chosen_tE, kept_tE = logit_tE[text_t], chosen_tE[text_t], kept_tE[text_t]
        line[: self._experts] += chosen_tE.sum(0)
        line[self._experts] += len(logit_tE)
        line[self._experts + 1] += torch.special.entr(logit_tE.softmax(-1)).sum()
        if dropping:  # kept may hold padding, which nobody chose
            line[self._experts + 2] += (chosen_tE & ~kept_tE).sum()

    def _see_attention(self, layer: int, scale: float, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and layer not in self._seen:
            self._seen.add(layer)
            query, key, length = args[0], args[1], len(args[0]) * self._cp.size()
            self._sampled = min(SAMPLED_ROWS, length)
            packed = kwargs.get("packed_seq_params")
            bounds = (0, length) if packed is None else packed.bounds
            if packed is None:  # else one sequence without a batch: [t, n, h]
                query, key = query[:, 0], key[:, 0]
            with torch.no_grad():
                found = largest_logit(query, key, scale, self._cp, bounds)
                self._logit_lc[layer, self._column] = found


def largest_logit(
    query_snh: torch.Tensor, key_sgh: torch.Tensor, scale: float, cp: dist.ProcessGroup, bounds: Sequence[int]
) -> torch.Tensor:
    """The largest scaled q.k of some evenly spaced causal rows of the sequence, the last one among them, with the keys
    of this context-parallel rank, over all heads; fp32, 0-D. Every rank of `cp` calls it and holds some of the rows.
    A row sees no key before its document, of which `bounds` has the beginnings."""
    s, heads, width = query_snh.shape
    groups, device, length = key_sgh.shape[1], query_snh.device, s * cp.size()
    row_r = torch.linspace(0, length - 1, min(SAMPLED_ROWS, length), dtype=torch.float64, device=device).round().long()
    position_s = local_positions(bounds, cp.rank(), cp.size(), device)
    place_r = torch.searchsorted(position_s, row_r).clamp(max=s - 1)
    here_r = position_s[place_r] == row_r
    query_rnh = torch.where(here_r[:, None, None], query_snh[place_r].float(), 0.0)
    if cp.size() > 1:
        dist.all_reduce(query_rnh, group=cp)
    query_grh = query_rnh.view(len(row_r), groups, -1, width).transpose(0, 1).reshape(groups, -1, width)
    row_r = row_r.repeat_interleave(heads // groups)
    start_r = None
    if len(bounds) > 2:
        start_d = torch.tensor(bounds[:-1], device=device)
        start_r = start_d[torch.searchsorted(start_d, row_r, right=True) - 1]
    best = torch.tensor(-torch.inf, device=device)
    for start in range(0, s, BLOCK_TOK):
        key_gsh = key_sgh[start : start + BLOCK_TOK].float().transpose(0, 1)
        here_s = position_s[start : start + BLOCK_TOK]
        hidden_rs = here_s > row_r[:, None]
        if start_r is not None:
            hidden_rs |= here_s < start_r[:, None]
        score_grs = (query_grh @ key_gsh.transpose(1, 2)).masked_fill_(hidden_rs, -torch.inf)
        best = torch.maximum(best, score_grs.amax())
    return best * scale


def _gradient_places(
    chunks: Sequence[MegatronModule], layers: dict[int, torch.nn.Module], optimizer: MegatronOptimizer, outside: int
) -> tuple[list[torch.Tensor], list[int]]:
    """(shards that this rank's optimizer counts into the gradient norm, place of each in a table [L + 1, P])."""
    place_of = {id(p): outside * len(PARTS) + _part_of(n) for c in chunks for n, p in bare(c).named_parameters()}
    for layer, module in layers.items():
        place_of |= {id(p): layer * len(PARTS) + _part_of(n, True) for n, p in module.named_parameters()}
    shards, places = [], []
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        model_of = {id(shard): id(model) for model, shard in _models_and_shards(part)}
        for shard in part.get_parameters():
            if param_is_not_shared(shard) and param_is_not_tensor_parallel_duplicate(
                shard, getattr(part, "tp_group", None)
            ):
                shards.append(shard)
                places.append(place_of[model_of[id(shard)]])
    return shards, places


def _models_and_shards(part: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parameters of the model beside this rank's shards of them (optimizer/distrib_optimizer.py:325)."""
    for models, shards in (
        (part.model_fp32_groups, part.shard_fp32_groups),
        (part.model_float16_groups, part.shard_float16_groups),
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
    ):
        yield from zip(chain(*models), chain(*shards))


def _part_of(name: str, in_layer: bool = False) -> int:
    """Index into PARTS of a parameter, by its name in the layer or, outside of the layers, in the model."""
    if "norm" in name:
        part = "norms"
    elif not in_layer:
        part = "embedding"
    elif "router" in name:
        part = "router"
    else:
        part = "attention" if name.startswith("self_attention.") else "experts"
    return PARTS.index(part)
