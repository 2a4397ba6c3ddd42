"""What the page's script gets: numbers in six digits, round ticks, the start beside the slider."""

import numpy as np
import pytest

from megatron_lccp.analysis import frames
from megatron_lccp.analysis.charts.interactive import HUGE, log_ticks, numbers, payload


def test_numbers_for_the_page_keep_six_digits_and_what_is_not_a_number():
    assert numbers([1.23456789, 2.0, np.nan, np.inf, -np.inf, 1e-12, 123456789]) == [
        1.23457, 2, None, HUGE, -HUGE, 1e-12, 123457000,
    ]  # fmt: skip


@pytest.mark.parametrize(("low", "high"), [(1.02, 1.4), (1, 5000), (0.3, 7), (1e-5, 1e5), (5e5, 3e6), (2.0, 2.1)])
def test_ticks_of_a_log_scale_are_round_few_and_inside(low, high):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12 and all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:.2g}") == tick for tick in ticks) and ticks == sorted(set(ticks))


def test_the_start_of_the_lccp_stays_beside_the_slider(charts):
    data = payload(charts["needle-cells"])
    points = frames.checkpoints(charts["needle-cells"].frame)
    assert points["step"].iloc[data["fixed"][0]] == 100 and [stop["show"] for stop in data["stops"]] == [
        [k] for k in range(13)
    ]
