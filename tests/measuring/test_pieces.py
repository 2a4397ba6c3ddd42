"""A window in pieces: how much of it runs until the next moment at which a signal is heard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_lccp.measuring.pieces import Pieces, WindowStopped, tokens_in
from megatron_lccp.measuring.prefills import plain


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_piece_is_as_long_as_the_speed_so_far_allows(one_rank: None) -> None:
    replicas = [[plain(np.zeros(100, np.int64), k, (1, 100)) for k in range(40)], []]
    asked: list[bool] = []
    pieces = Pieces(lambda: bool(asked), 10.0, torch.device("cpu"))
    assert tokens_in(replicas, 0, 3) == 300 and tokens_in(replicas, 38, 8) == 200
    assert pieces.next(replicas, 0, 2, 16) == 2  # nothing is known yet: one for each pipeline stage
    pieces.rest(200, 4.0)  # 20 ms a token
    assert pieces.next(replicas, 2, 2, 16) == 4  # 5 would take 10 s, but stages take turns
    assert pieces.next(replicas, 2, 1, 16) == 5
    pieces.rest(500, 1.0)  # a fast piece does not make it forget a slow one at once
    assert pieces.next(replicas, 6, 2, 16) == 6
    pieces.rest(400, 400.0)
    assert pieces.next(replicas, 10, 2, 16) == 2  # never less
    fast = Pieces(lambda: False, 10.0, torch.device("cpu"))
    fast.rest(200, 0.01)
    assert fast.next(replicas, 2, 2, 16) == 16
    asked.append(True)
    with pytest.raises(WindowStopped):
        pieces.rest()
    assert not issubclass(WindowStopped, Exception)  # or a monitor's failure would be all that it is taken for
