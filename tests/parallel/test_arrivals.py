"""Ranks that do not start are named, and those that do are not."""

from __future__ import annotations

import datetime
import threading

import pytest
import torch.distributed as dist

from megatron_lccp.parallel import arrivals


def said_by(rank: int, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What one rank of three says until it has said something, or for a second and a half."""
    for name, value in {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(arrivals, "TRY_S", 0.02)
    spoke = threading.Event()
    say = arrivals._say
    monkeypatch.setattr(arrivals, "_say", lambda *given: (say(*given), spoke.set()))
    with arrivals.naming_who_lacks(wait_s=0.2):
        spoke.wait(1.5 if rank == 2 else 30.0)
    return capsys.readouterr().err


def test_ranks_that_lack_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    brief = datetime.timedelta(seconds=5)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=brief)
    found = said_by(0, store.port, monkeypatch, capsys)
    assert "where 3 ranks meet: ranks 1, 2 have not come; start them" in found
    assert said_by(2, store.port, monkeypatch, capsys) == ""  # it is not the one to say who else lacks
    assert "rank 1 has not come; start it" in said_by(0, store.port, monkeypatch, capsys)
    store.set("lccp/started/0/1", "1")
    assert "all 3 ranks have started" in said_by(0, store.port, monkeypatch, capsys)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # the same store, other processes
    assert "ranks 1, 2 have not come" in said_by(0, store.port, monkeypatch, capsys)
    port = store.port
    del store
    assert "rank 0 has not come" in said_by(1, port, monkeypatch, capsys)
