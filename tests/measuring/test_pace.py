"""Counts and time left of a window, by a clock that the test turns."""

from __future__ import annotations

import pytest

from megatron_lccp.measuring.pace import Pace

pytestmark = pytest.mark.once


def test_the_time_left_is_that_of_all_monitors_at_the_speed_so_far() -> None:
    now = [100.0]
    pace = Pace(lambda: now[0])
    pace.plan([1000, 500])
    pace.next()
    now[0] += 10
    assert pace.moved(250, 500, 250) == "250 of 500 tokens of monitor 1 of 2, 50.0 s left"  # 25 tokens/s, 1,250 to go
    now[0] += 10
    assert pace.moved(500, 500, 250) == "500 of 500 tokens of monitor 1 of 2, 40.0 s left"  # of its second run too
    pace.moved(500, 500, 0)  # kept from an earlier measurement: no speed in it
    pace.next()
    now[0] += 5
    assert pace.moved(125, 500, 125) == "125 of 500 tokens of monitor 2 of 2, 15.0 s left"  # 25 tokens/s
    now[0] += 15
    assert pace.moved(500, 500, 375) == "500 of 500 tokens of monitor 2 of 2"


def test_more_than_was_planned_and_what_nobody_planned() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    now[0] = 2
    assert pace.moved(10, 40, 10) == "10 of 40 tokens, 6.0 s left"
    pace.plan([20])  # prefills were not shared after all
    pace.next()
    now[0] = 4
    assert pace.moved(20, 60, 20) == "20 of 60 tokens, 4.0 s left"
    pace.plan([20])
    pace.next()
    assert pace.moved(0, 20, 0) == "0 of 20 tokens"
