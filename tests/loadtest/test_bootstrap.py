from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneplusn.loadtest.bootstrap import BLOCKS, GRID, cut, mean_ratio, percentile_ratio
from oneplusn.loadtest.stats import percentile


def blocks(values) -> list[np.ndarray]:
    values = np.asarray(values, np.float64)
    return [values[block] for block in cut(len(values))]


def drawn(seed: int, count: int = 800, scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).lognormal(0.0, 0.5, count)


@given(st.integers(0, 500))
def test_blocks_are_all_values_in_order_and_nearly_equal(count: int) -> None:
    found = [list(range(count))[block] for block in cut(count)]

    assert [value for block in found for value in block] == list(range(count))
    assert len(found) == min(BLOCKS, count)
    sizes = {len(block) for block in found}
    assert not sizes or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("percent", [50, 90, 99])
@pytest.mark.parametrize("count", [600, 2 * GRID + 7])
def test_a_percentile_is_the_one_that_reports_have(percent: int, count: int) -> None:
    first, second = drawn(1, count), drawn(2, count)

    found = percentile_ratio(blocks(first), blocks(second), percent, paired=False)

    assert found is not None
    exact = count <= GRID  # beyond, it is looked for among some of the values
    assert found.first == pytest.approx(percentile(first, percent), rel=1e-12 if exact else 2e-3)
    assert found.low < found.ratio < found.high


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.07, 5.0])
def test_what_takes_a_fixed_factor_longer_does_so_in_every_pair(factor: float) -> None:
    first = drawn(7)
    paired = [
        mean_ratio(blocks(first), blocks(first * factor), paired=True),
        percentile_ratio(blocks(first), blocks(first * factor), 99, paired=True),
    ]

    for found in paired:
        assert [found.ratio, found.low, found.high] == pytest.approx([factor] * 3, rel=1e-9)


def test_pairs_show_what_is_lost_between_requests() -> None:
    first = drawn(3)
    second = first * 1.05

    together = mean_ratio(blocks(first), blocks(second), paired=True)
    apart = mean_ratio(blocks(first), blocks(second), paired=False)

    assert together.differs(0.02)
    assert not apart.differs(0.02)
    assert apart.low < 1 < apart.high


@pytest.mark.parametrize(("scale", "differs"), [(1.0, False), (1.01, False), (1.3, True)])
def test_a_difference_is_one_if_it_is_larger_than_chance_and_than_asked(scale, differs) -> None:
    found = mean_ratio(blocks(drawn(4, 4000)), blocks(drawn(5, 4000, scale)), paired=False)

    assert found.differs(0.02) is differs


def test_equal_loads_are_seldom_told_apart() -> None:
    alarms = [
        ratio.differs(0.0)
        for seed in range(60)
        for one, other in [(blocks(drawn(2 * seed, 400)), blocks(drawn(2 * seed + 1, 400)))]
        for ratio in [mean_ratio(one, other, paired=False)]
    ]

    assert sum(alarms) <= 4  # of 60 at 99 %


@pytest.mark.parametrize(
    ("first", "second", "percent"),
    [
        (range(1, 5), range(1, 5), 50),  # too few blocks
        (range(1, 100), range(1, 100), 99),  # one value beyond the percentile
    ],
)
def test_a_few_values_have_a_ratio_and_no_confidence(first, second, percent) -> None:
    found = percentile_ratio(blocks(first), blocks(second), percent, paired=False)

    assert (found.ratio, found.low, found.high) == (1.0, None, None)
    assert not found.differs(0.0)


@pytest.mark.parametrize("values", [[], [0.0] * 50, [math.nan] * 50])
def test_what_was_not_measured_has_no_ratio(values) -> None:
    assert mean_ratio(blocks(values), blocks(drawn(1)), paired=False) is None


def test_blocks_without_a_value_weigh_nothing() -> None:
    first = [*blocks(drawn(6)), np.array([]), np.array([])]

    found = percentile_ratio(first, first, 50, paired=True)

    assert [found.ratio, found.low, found.high] == [1.0, 1.0, 1.0]
