from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneplusn.loadtest.chart import HEIGHT, WIDTH, Chart, Series, nice_ticks, percentiles, svg
from oneplusn.loadtest.stats import percentile

NUMBER = r"-?\d+(?:\.\d+)?"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1.02, [0, 0.5, 1.0]),
        (-3, 27, [0, 10, 20]),
        (0, 0.004, [0, 0.001, 0.002, 0.003, 0.004]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low, high, expected) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e9))
def test_ticks_are_few_in_order_and_inside(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)

    assert len(ticks) <= 11
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * (abs(low) + span)
    assert all(low - slack <= tick <= low + span + slack for tick in ticks)


@given(st.lists(st.floats(0.001, 1e4), min_size=1, max_size=300))
def test_a_line_of_percentiles_holds_values_that_were_measured(values: list[float]) -> None:
    line = percentiles("x", values)

    shares, found = zip(*line.points, strict=True)
    assert list(shares) == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] < 1
    assert list(found) == sorted(found)
    assert found[0] == min(values)
    assert found[-1] == max(values)
    # The value at a share is the one that a little more than this share do not exceed.
    for share, value in line.points:
        assert value == percentile(values, 100 * (share + 0.5 / len(values)))


def test_what_was_not_measured_is_an_empty_line() -> None:
    assert percentiles("x", []).points == []


CHARTS = [
    Chart("plain", "x", "y", [Series("a", [(0, 1), (2, 3)]), Series("b", [(1, 2)], "dots")]),
    Chart("tail", "x", "y", [percentiles("a", range(1, 2000))], scale="percentile"),
    Chart("swept", "x", "y", [Series("a", [(1, 5), (8, 7), (64, 9)], "marked")], scale="values"),
    Chart("marked", "x", "y", [Series("a", [(0, 1)])], marks={"failed": [0.5], "swap": [3.0]}),
    Chart("flat", "x", "y", [Series("a", [(1, 0), (2, 0)])]),
    Chart("empty", "x", "y", [Series("a", [])]),
]


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.title)
def test_everything_is_drawn_inside_the_frame(chart: Chart) -> None:
    drawn = svg(chart)

    assert drawn.count("<path") == drawn.count("/>")
    for path in re.findall(r' d="([^"]*)"', drawn):
        for x, y in re.findall(rf"[ML]({NUMBER}) ({NUMBER})", path):
            assert 0 <= float(x) <= WIDTH
            assert 0 <= float(y) <= HEIGHT
    assert "nan" not in drawn


def test_values_that_grow_geometrically_are_at_equal_distances() -> None:
    swept = CHARTS[2]

    assert [swept.place(x) for x in (1, 8, 64)] == [0, 3, 6]
    assert swept.x_ticks() == [(1, "1"), (8, "8"), (64, "64")]
    near = Chart("", "", "", [Series("", [(4, 1), (6, 1), (8, 1)])], scale="values")
    assert [near.place(x) for x in (4, 6, 8)] == [4, 6, 8]


def test_the_tail_has_as_much_room_as_the_rest() -> None:
    tail = CHARTS[1]

    assert [tail.place(share) for share in (0.0, 0.9, 0.99, 0.999)] == pytest.approx([0, 1, 2, 3])
    assert [label for _, label in tail.x_ticks()] == ["0%", "50%", "90%", "99%", "99.9%"]
    longer = Chart("", "", "", [percentiles("a", range(200_000))], scale="percentile")
    assert [label for _, label in longer.x_ticks()][:3] == ["0%", "90%", "99%"]  # no room for 50%


def test_what_happened_has_a_colour_of_its_own() -> None:
    assert CHARTS[3].colours == {"a": 0, "failed": 4, "swap": 3}
