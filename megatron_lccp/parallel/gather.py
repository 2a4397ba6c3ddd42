"""Collectives over all ranks that make a partial result whole, or make ranks agree.

In: what this rank knows. Out: the same on every rank. Every rank must call these, in the same order.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_lccp.files import error_text


class RanksApart(RuntimeError):
    """A rank failed where the others wait for it in a collective; the job cannot go on."""


APART_S = 30.0
"""Seconds that a rank which failed waits for the others to come out of what it left."""
_passed = itertools.count()


def all_out(failed: bool) -> bool:
    """After a part in which a rank may leave the others in a collective: whether all of them are out of it, so that
    they may agree on what happened. Every rank that comes out calls it; one that has not failed is told so at once."""
    store, key = dist.distributed_c10d._get_default_store(), f"out-{next(_passed)}"
    store.add(key, 1)
    end_s = time.monotonic() + APART_S
    while failed and store.add(key, 0) < dist.get_world_size():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True


def sum_over_ranks(partial: torch.Tensor) -> torch.Tensor:
    """All-reduce a tensor in which every element was filled by exactly one rank and is zero on the others."""
    whole = partial.clone()
    dist.all_reduce(whole)
    return whole


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on all ranks if the flag is set on one of them."""
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each value over all ranks."""
    whole = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(whole, op=dist.ReduceOp.MAX)
    return whole.tolist()


def first_text(text: str | None) -> str | None:
    """The text of the lowest rank that has one, on all ranks: for errors that one rank saw and all must report."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return next((t for t in texts if t is not None), None)


def union(mine: Mapping[str, str]) -> dict[str, str]:
    """What each rank knows of things by name, on all ranks."""
    everyone: list[Mapping[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: known for part in everyone for name, known in part.items()}


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """An OSError or ValueError of one rank inside is a ValueError on all ranks, the lowest's; no collectives inside.

    So no rank waits for one that could not read a file. ValueErrors of other classes keep theirs.
    """
    mine: ValueError | None = None
    try:
        yield
    except ValueError as error:
        mine = error
    except OSError as error:
        mine = ValueError(error_text(error))
    everyone: list[ValueError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if first := next((error for error in everyone if error is not None), None):
        raise first
