"""Reduce measured values to the figures that a report shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

PERCENTS = (50, 90, 95, 99)
PERCENTILE_RULE = "nearest rank"
"""How `percentile` is defined; interpolation would report times that nobody measured."""


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that at least `percent` % of the values do not exceed."""
    return _at_rank(sorted(values), percent)


def spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Describe values under the names that `vllm bench serve` gives them.

    Args:
        name: What they are with their unit, as `ttft_ms`.
        values: In any order.

    Returns:
        `mean_`, `median_`, `std_` (of the population), `p50_` and so on; None without values.
    """
    keys = ["mean", "median", "std", *(f"p{percent}" for percent in PERCENTS)]
    if not values:
        return {f"{key}_{name}": None for key in keys}
    ordered = sorted(values)
    mean = math.fsum(ordered) / len(ordered)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered))
    ranks = [_at_rank(ordered, percent) for percent in PERCENTS]
    found = [mean, _at_rank(ordered, 50), deviation, *ranks]
    return {f"{key}_{name}": value for key, value in zip(keys, found, strict=True)}


def _at_rank(ordered: Sequence[float], percent: float) -> float:
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def most_at_once(spans: Iterable[tuple[float, float]]) -> int:
    """Return how many of the spans, each from its start up to its end, overlap at most."""
    edges = sorted(edge for start, end in spans for edge in ((start, 1), (end, -1)))
    most = now = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    return most


def most_per_second(times: Sequence[float], start: float) -> int:
    """Return the largest number of times within one whole second after `start`."""
    counts = dict[int, int]()
    for when in times:
        second = int(when - start)
        counts[second] = counts.get(second, 0) + 1
    return max(counts.values(), default=0)
