from __future__ import annotations

import pytest

from oneplusn.loadtest.stats import (
    PERCENTILE_RULE,
    most_at_once,
    most_per_second,
    percentile,
    spread,
)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7.0], 50, 7.0),
        ([7.0], 99, 7.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.0),
        ([4.0, 1.0, 3.0, 2.0], 75, 3.0),
        ([4.0, 1.0, 3.0, 2.0], 76, 4.0),
        ([float(i) for i in range(1, 101)], 99, 99.0),
        ([float(i) for i in range(1, 101)], 100, 100.0),
        ([1.0, 2.0], 0, 1.0),
    ],
)
def test_percentile_is_a_value_that_was_measured(values, percent, expected) -> None:
    assert PERCENTILE_RULE == "nearest rank"
    assert percentile(values, percent) == expected


def test_spread_has_the_names_of_the_format_that_others_read() -> None:
    assert spread("ttft_ms", [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == {
        "mean_ttft_ms": 5.0,
        "median_ttft_ms": 4.0,
        "std_ttft_ms": 2.0,  # of the population; of a sample it would be 2.14
        "p50_ttft_ms": 4.0,
        "p90_ttft_ms": 9.0,
        "p95_ttft_ms": 9.0,
        "p99_ttft_ms": 9.0,
    }


def test_what_was_not_measured_has_no_figure() -> None:
    assert set(spread("itl_ms", []).values()) == {None}


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0),
        ([(0.0, 1.0)], 1),
        ([(0.0, 1.0), (1.0, 2.0)], 1),  # one ends where the other begins
        ([(0.0, 3.0), (1.0, 2.0), (1.5, 4.0)], 3),
        ([(0.0, 1.0), (0.5, 2.0), (1.5, 3.0)], 2),
    ],
)
def test_spans_at_once(spans, expected) -> None:
    assert most_at_once(spans) == expected


def test_the_fullest_second_counts_from_the_start() -> None:
    assert most_per_second([10.5, 11.4, 11.6, 12.5], 10.5) == 2
    assert most_per_second([], 0.0) == 0
