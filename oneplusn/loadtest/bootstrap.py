"""How sure the ratio of two measured figures is: a bootstrap over blocks of requests.

Requests near each other in a load share the server's state and its machine's, so they are not
independent; what is drawn again and again are blocks of neighbours. Two loads that sent the same
requests are drawn in pairs: then what differs between requests cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

BLOCKS = 20
"""Into which a load is cut at most."""

LEAST_BLOCKS = 8
DRAWS = 2000
GRID = 4096
"""Values among which the percentile of a draw is looked for, all of them if there are no more."""

CONFIDENCE = 0.99
BEYOND = 5
"""Values beyond a percentile below which it hangs on one or two of them."""

Values = NDArray[np.float64]
Blocks = Sequence[Values]
"""The values of each block of a load."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure of two loads, and where the second's over the first's is with confidence.

    Attributes:
        low: Lower end of the interval; None if there are too few values to tell.
        high: Upper end.
    """

    first: float
    second: float
    low: float | None = None
    high: float | None = None

    @property
    def ratio(self) -> float:
        """The second over the first."""
        return self.second / self.first

    def differs(self, least: float) -> bool:
        """Whether it can be excluded that the figures are equal, but for a `least` share."""
        if self.low is None or self.high is None:
            return False
        return self.low > 1 + least or self.high < 1 - least


def cut(count: int) -> list[slice]:
    """Return the blocks of that many neighbours, of nearly equal length."""
    blocks = min(BLOCKS, count)
    edges = [count * index // blocks for index in range(blocks + 1)] if blocks else [0]
    return [slice(low, high) for low, high in pairwise(edges)]


def mean_ratio(first: Blocks, second: Blocks, *, paired: bool) -> Ratio | None:
    """Compare two means; None if one is missing or 0."""
    return _ratio((first, second), _means, enough=1, paired=paired)


def percentile_ratio(
    first: Blocks, second: Blocks, percent: float, *, paired: bool
) -> Ratio | None:
    """Compare two percentiles of nearest rank; None if one is missing or 0."""

    def percentiles(blocks: Blocks, draws: Values) -> Values:
        return _percentiles(blocks, draws, percent)

    enough = math.ceil(BEYOND / (1 - percent / 100))
    return _ratio((first, second), percentiles, enough=enough, paired=paired)


def _ratio(
    sides: tuple[Blocks, Blocks],
    figure: Callable[[Blocks, Values], Values],
    *,
    enough: int,
    paired: bool,
) -> Ratio | None:
    sizes = [sum(map(len, blocks)) for blocks in sides]
    if not min(sizes):
        return None
    first, second = (float(figure(blocks, np.ones((1, len(blocks))))[0]) for blocks in sides)
    if not first > 0 or not second > 0:
        return None
    if min(sizes) < enough or min(map(len, sides)) < LEAST_BLOCKS:
        return Ratio(first, second)
    rng = np.random.default_rng(0)
    draws = [_draws(rng, len(blocks)) for blocks in sides]
    if paired:
        draws[1] = draws[0]
    below, above = (figure(*side) for side in zip(sides, draws, strict=True))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(above / below, [tail, 1 - tail])
    return Ratio(first, second, float(low), float(high))


def _draws(rng: np.random.Generator, blocks: int) -> Values:
    """Return how often each block is in each draw [draws, blocks]."""
    counts = rng.multinomial(blocks, np.full(blocks, 1 / blocks), DRAWS)
    return counts.astype(np.float64)


def _means(blocks: Blocks, draws: Values) -> Values:
    """Return the mean of each draw."""
    sums = np.array([block.sum() for block in blocks])
    sizes = np.array([len(block) for block in blocks], np.float64)
    means: Values = (draws @ sums) / np.maximum(draws @ sizes, 1)
    return means


def _percentiles(blocks: Blocks, draws: Values, percent: float) -> Values:
    """Return the percentile of each draw, of nearest rank as `stats` has it."""
    values = np.sort(np.concatenate(blocks))
    grid = values[np.unique(np.linspace(0, len(values) - 1, GRID).astype(int))]
    # How many values of each block are up to each of the grid [blocks, grid].
    counts = np.array([np.searchsorted(np.sort(block), grid, side="right") for block in blocks])
    reached = draws @ counts.astype(np.float64)
    ranks = np.maximum(np.ceil(reached[:, -1] * percent / 100), 1)
    found: Values = grid[np.argmax(reached >= ranks[:, None], axis=1)]
    return found
