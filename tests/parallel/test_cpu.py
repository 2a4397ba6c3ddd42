"""Megatron-Core's random states on CPU ranks: a fork leaves the state around it alone and goes on where it stood."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.ranks import run_ranks


def test_a_fork_isolates_random_numbers(tiny_yaml: Path) -> None:
    found = run_ranks(1, "fork_random", path=tiny_yaml)[0]
    (plain, nothing), (around, inside) = found["plain"], found["forked"]
    assert around == plain and nothing == []  # what is drawn around forks is what is drawn without them
    assert inside[0] != inside[1] and not set(inside[0]) & set(plain)
