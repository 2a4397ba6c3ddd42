"""Over what the ranks of the main job talk to one another."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> str:
    import torch

    if request.param == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return request.param
