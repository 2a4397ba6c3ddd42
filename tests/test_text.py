"""Numbers as people write them."""

import numpy as np
import pytest

from megatron_lccp.text import (
    about_text,
    count_text,
    length_text,
    number_text,
    ranges_text,
    span_text,
    time_text,
    tokens_text,
)


@pytest.mark.parametrize(
    "value, text",
    [(1.0414, "1.04"), (9.996, "10.0"), (23.06, "23.1"), (118.4, "118"), (999.7, "1.0k"), (4096, "4.1k"),
     (99_960, "100k"), (2.5e6, "2.5M"), (0.001, "0.00"), (-0.001, "0.00"), (-0.42, "-0.42"), (np.nan, "–"), (np.inf, "∞")],
)  # fmt: skip
def test_numbers_in_cells_are_short(value, text):
    assert number_text(value) == text


def test_lengths_and_tokens_read_as_people_write_them():
    assert [length_text(n) for n in (512, 1000, 1024, 65536)] == ["512", "1000", "1K", "64K"]
    assert [tokens_text(n) for n in (0, 12, 65536, 20e6, 1.5e9, 2e11)] == [
        "0",
        "12",
        "65.5K",
        "20M",
        "1.5B",
        "200B",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3e-6, "<0.01 ms"), (5e-4, "0.50 ms"), (0.999, "999 ms"), (26.5, "26.5 s"), (90, "1.50 min"), (7200, "2.00 h"),
     (86400 * 123.4, "123 days")],
)  # fmt: skip
def test_times_have_a_unit_that_fits(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_one_is_said_in_the_singular_and_a_span_of_one_number_once() -> None:
    assert [count_text(count, "head") for count in (0, 1, 2)] == ["0 heads", "1 head", "2 heads"]
    assert [about_text(count) for count in (0, 7, 37, 100, 137, 1204, 9913)] == [
        "0",
        "7",
        "37",
        "100",
        "140",
        "1,300",
        "10,000",
    ]
    assert (span_text(508_100, 508_400), span_text(12e6, 24e6)) == ("508K", "12M to 24M")


def test_runs_of_numbers_are_ranges() -> None:
    assert ranges_text([]) == "" and ranges_text([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
