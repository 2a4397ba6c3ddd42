"""Collectives over all ranks that make a partial result whole, or make ranks agree.

In: what this rank knows. Out: the same on every rank. Every rank must call these, in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_lccp.files import error_text


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


def first_text(text: str | None) -> str | None:
    """The text of the lowest rank that has one, on all ranks: for errors that one rank saw and all must report."""
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return next((t for t in texts if t is not None), None)


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
