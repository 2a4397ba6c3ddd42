"""What the rule of the verdict may risk; tools/bench_verdict.py shows what it comes to."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lccp.analysis.statistics import trend


@pytest.mark.parametrize(("checkpoints", "spent"), [(4, 0.0), (5, 0.031), (6, 0.0324), (60, 0.0512)])
def test_risk_of_all_looks(checkpoints: int, spent: float) -> None:
    tokens_k = np.arange(1, checkpoints + 1) * 1e9
    looks = [trend.risk(tokens_k[:count]) for count in range(1, checkpoints + 1)]
    assert sum(looks) == pytest.approx(spent, abs=5e-5)


def test_later_looks_risk_less() -> None:
    """Each doubling of the tokens less than the one before, however many checkpoints are in it."""
    tokens_k = np.array([1, 2, 3, 4, 5, 10, 20, 40]) * 1e9
    looks = [trend.risk(tokens_k[:count]) for count in range(5, 9)]
    assert all(later < earlier for earlier, later in zip(looks, looks[1:], strict=False))
