"""Whether weights are those of this model: what every way to load them asks, before and after.

In: what a checkpoint or a file says of itself and holds, and the model here. Out: nothing, or one line that names the
file, every field that differs as `field: there -> here`, or the tensors that are missing, too many, of another shape or
not numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_lccp.model.build import ARCHITECTURE, FUNCTION, default_of
from megatron_lccp.model.vocabulary import VOCABULARY_TENSORS
from megatron_lccp.parallel.gather import agreed
from megatron_lccp.text import count_text

Shapes = Mapping[str, tuple[int, ...]]
MOST_NAMED = 4
"""Tensors that one line names; of more it says how many there are."""


def model_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What makes the model that a checkpoint says it holds another one than this, as `field: there -> here`.

    Both are of `training.setup.about_model`: sizes, and the fields by which the same weights give something else.
    Checkpoints of versions before those were noted say nothing of the latter.
    """
    found = [
        f"megatron.transformer.{name}: {there.get(name)} -> {here.get(name)}"
        for name in ARCHITECTURE
        if there.get(name) != here.get(name)
    ]
    if isinstance(was := there.get("function"), Mapping):
        now = here.get("function", {})
        pairs = {name: (was.get(name, default_of(name)), now.get(name, default_of(name))) for name in FUNCTION}
        found += [f"megatron.transformer.{name}: {a} -> {b}" for name, (a, b) in pairs.items() if a != b]
    return found


def check_fit(path: Any, found: Shapes, shards: Iterable[ShardedTensor], vocabulary: int) -> None:
    """ValueError on all ranks unless the tensors `found` are those of the model, whose shards lie over the ranks."""
    everyone: list[Shapes] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, whole_shapes(shards))
    require_fit(path, found, everyone, vocabulary)


def whole_shapes(shards: Iterable[ShardedTensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole tensors, of which a rank has these shards, by name."""
    return {shard.key: tuple(shard.global_shape) for shard in shards}


def require_fit(path: Any, found: Shapes, by_rank: Iterable[Shapes], vocabulary: int) -> None:
    """ValueError unless the tensors `found` at `path` are those of the model, of which each rank knows its own.

    Padding of the vocabulary, which has `vocabulary` tokens, may be of any length.
    """
    wanted = {name: shape for of_rank in by_rank for name, shape in of_rank.items()}
    problems = []
    if lacks := sorted(wanted.keys() - found.keys()):
        problems.append(f"lacks {_named(lacks)}")
    if extra := sorted(found.keys() - wanted.keys()):
        problems.append(f"has {_named(extra)} too much")
    rows = [found[n][0] for n in wanted.keys() & found.keys() if n.endswith(VOCABULARY_TENSORS)]
    if not problems and (short := [there for there in rows if there < vocabulary]):
        raise ValueError(
            f"{path}: has {short[0]} rows of the vocabulary, fewer than the {vocabulary} tokens of data.tokenizer.path; "
            "name the tokenizer that the weights were trained with"
        )
    if other := [n for n, shape in wanted.items() if n in found and not _fits(n, found[n], shape, vocabulary)]:
        shapes = f"shape {list(found[other[0]])}, where this model needs {list(wanted[other[0]])}"
        more = f" (and {len(other) - 1} more of another shape)" if len(other) > 1 else ""
        problems.append(f"has {other[0]} of {shapes}{more}")
    if problems:
        raise ValueError(f"{path}: {', '.join(problems)}; it belongs to another model")


def _fits(name: str, there: Sequence[int], here: Sequence[int], vocabulary: int) -> bool:
    padded = name.endswith(VOCABULARY_TENSORS) and there[0] >= vocabulary and here[0] >= vocabulary
    return list(there) == list(here) or (padded and list(there[1:]) == list(here[1:]))


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return f"{count_text(len(names), 'tensor')} ({shown}{', ...' if len(names) > MOST_NAMED else ''})"


@torch.no_grad()
def require_numbers(path: Any, shards: Iterable[ShardedTensor]) -> None:
    """ValueError on all ranks if a value of the weights loaded from `path` is NaN or infinite; it names the tensor."""
    with agreed():
        for shard in shards:
            if type(shard.data) not in (torch.Tensor, torch.nn.Parameter):  # FP8 has neither
                continue
            if wrong := int((~torch.isfinite(shard.data)).sum()):
                at = list(shard.global_offset[: shard.prepend_axis_num])  # layer, expert
                raise ValueError(
                    f"{path}: {shard.key}{at or ''} has {wrong:,} of {shard.data.numel():,} values that are NaN or "
                    "infinite; the file is damaged, or the model had diverged when it was saved: start from other weights"
                )
