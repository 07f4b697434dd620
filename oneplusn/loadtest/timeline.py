"""Charts of one load: how long its times were, and how it went from second to second."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

from oneplusn.loadtest.chart import Chart, Point, Series, percentiles
from oneplusn.loadtest.drive import Outcome, Record
from oneplusn.loadtest.figures import TIMES
from oneplusn.loadtest.stats import percentile
from oneplusn.loadtest.stream import Answer

BINS = 80
LEAST_BIN_S = 0.1
DOTS = 1500
MS = 1e3
TIME = "seconds after the warm-up"
TITLES = {"ttft": "Time to first token", "itl": "Inter-token time", "e2el": "End to end"}


def distributions(runs: Mapping[str, Sequence[Record]]) -> list[Chart]:
    """Return each kind of time by percentile, a line per run."""
    answers = {
        name: [r.answer for r in records if r.answer is not None] for name, records in runs.items()
    }
    charts = list[Chart]()
    for key, title in TITLES.items():
        lines = [
            percentiles(name, (value for answer in found for value in TIMES[key](answer)))
            for name, found in answers.items()
        ]
        charts.append(
            Chart(f"{title}, by percentile", "percentile", "ms", lines, scale="percentile")
        )
    return charts


def over_time(outcome: Outcome, swaps: Sequence[float] = ()) -> list[Chart]:
    """Return what happened when, the warm-up included.

    Args:
        outcome: The load.
        swaps: When adapters were replaced, on the clock of the records.
    """
    begin, records = outcome.begin, outcome.records
    answers = [record.answer for record in records if record.answer is not None]
    marks = {
        "failed": [record.sent - begin for record in records if record.failure is not None],
        "swap": [when - begin for when in swaps],
    }
    marks = {name: places for name, places in marks.items() if places}
    first = [(a.sent - begin, a.first_token_s * MS) for a in answers if a.times]
    gaps = [
        (later - begin, (later - earlier) * MS)
        for answer in answers
        for earlier, later in pairwise(answer.times)
    ]
    binned = [(x, values) for x, values, _ in _bins(gaps) if values]
    dots = [Series("TTFT", thin(first), "dots")]
    return [
        Chart("Time to first token", TIME, "ms", dots, marks=marks),
        Chart(
            "Inter-token time",
            TIME,
            "ms",
            [
                Series("p50", [(x, percentile(values, 50)) for x, values in binned]),
                Series("p99", [(x, percentile(values, 99)) for x, values in binned]),
            ],
            marks=marks,
        ),
        Chart("Output tokens/s", TIME, "tokens/s", [Series("tokens/s", _rate(answers, begin))]),
        Chart(
            "Requests in flight",
            TIME,
            "requests",
            [Series("in flight", _in_flight(answers, begin))],
        ),
    ]


def thin(points: Sequence[Point]) -> Sequence[Point]:
    """Return as many points as can be told apart, among them the highest."""
    if len(points) <= DOTS:
        return points
    step = len(points) // DOTS + 1
    groups = (points[start : start + step] for start in range(0, len(points), step))
    return [max(group, key=lambda point: point[1]) for group in groups]


def _bins(points: Iterable[Point]) -> list[tuple[float, list[float], float]]:
    """Return the points by time: the middle of each bin, its values if any, its width."""
    ordered = sorted(points)
    if not ordered:
        return []
    start, span = ordered[0][0], ordered[-1][0] - ordered[0][0]
    width = max(span / BINS, LEAST_BIN_S)
    bins: list[list[float]] = [[] for _ in range(max(math.ceil(span / width), 1))]
    for when, value in ordered:
        bins[min(int((when - start) / width), len(bins) - 1)].append(value)
    return [(start + (index + 0.5) * width, found, width) for index, found in enumerate(bins)]


def _rate(answers: Iterable[Answer], begin: float) -> list[Point]:
    """Return tokens per second over time."""
    events = [
        (when - begin, answer.tokens / len(answer.times))
        for answer in answers
        for when in answer.times
    ]
    return [(x, sum(values) / width) for x, values, width in _bins(events)]


def _in_flight(answers: Iterable[Answer], begin: float) -> list[Point]:
    """Return how many answered requests were under way, thinned to their most."""
    edges = sorted(edge for a in answers for edge in ((a.sent - begin, 1), (a.ended - begin, -1)))
    levels = accumulate(change for _, change in edges)
    steps = ((when, level) for (when, _), level in zip(edges, levels, strict=True))
    return [(x, max(values)) for x, values, _ in _bins(steps) if values]
