"""The series of a metric, and the text in which Prometheus reads them.

Made for one thread and for cheap scrapes: a scrape runs on the event loop, and no stream gets a
token meanwhile. So the beginning of every line is written once and kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from oneplusn.server.metric_rows import Row

LabelValues = tuple[str, ...]


class Numbers:
    """A counter or a gauge: one number for every set of label values.

    Attributes:
        row: What it is.
        values: The numbers. A counter without labels begins at zero, anything else when it is
            first heard of.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.values: dict[LabelValues, float] = {}
        if row.type == "counter" and not row.labels:
            self.values[()] = 0.0
        self._heads: dict[LabelValues, str] = {}

    def add(self, amount: float, labels: Mapping[str, str]) -> None:
        """Add to the number of these labels."""
        key = _key(self.row, labels)
        self.values[key] = self.values.get(key, 0.0) + amount

    def set(self, value: float, labels: Mapping[str, str]) -> None:
        """Replace the number of these labels."""
        self.values[_key(self.row, labels)] = float(value)

    def lines(self) -> Iterator[str]:
        """Yield the lines of a scrape, each with its end."""
        name, heads = self.row.exposed, self._heads
        for key, value in self.values.items():
            head = heads.get(key)
            if head is None:
                head = heads[key] = line_head(name, self.row.labels, key)
            yield f"{head}{value!r}\n"


@dataclass(slots=True)
class Distribution:
    """What was observed under one set of label values.

    Attributes:
        counts: Observations in each bucket, the one without a bound last.
    """

    counts: list[int]
    total: float = 0.0


class Distributions:
    """A histogram, or a summary without quantiles, which has no bounds and so one bucket.

    Attributes:
        row: What it is.
        values: A distribution for every set of label values; there from the beginning without.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.values: dict[LabelValues, Distribution] = {}
        if not row.labels:
            self.values[()] = self._empty()
        self._heads: dict[LabelValues, list[str]] = {}

    def observe(self, value: float, labels: Mapping[str, str]) -> None:
        """Add an observation."""
        key = _key(self.row, labels)
        series = self.values.get(key)
        if series is None:
            series = self.values[key] = self._empty()
        series.counts[bisect_left(self.row.buckets, value)] += 1
        series.total += value

    def lines(self) -> Iterator[str]:
        """Yield the lines of a scrape, each with its end."""
        row, heads = self.row, self._heads
        for key, series in self.values.items():
            found = heads.get(key)
            if found is None:
                found = distribution_heads(row.exposed, row.buckets, row.labels, key)
                heads[key] = found
            yield from distribution_lines(found, series)

    def _empty(self) -> Distribution:
        return Distribution([0] * (len(self.row.buckets) + 1))


Series = Numbers | Distributions


def series_of(row: Row) -> Series:
    """Make what holds the series of a metric."""
    return Numbers(row) if row.type in ("counter", "gauge") else Distributions(row)


def preamble(name: str, kind: str, text: str) -> str:
    """Write what comes before the lines of a metric; `text` is its help, on one line."""
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def line_head(name: str, labels: Sequence[str], values: Sequence[str]) -> str:
    """Write a line up to its value."""
    if not labels:
        return f"{name} "
    pairs = zip(labels, values, strict=True)
    return f"{name}{{{','.join([_pair(*pair) for pair in pairs])}}} "


def distribution_heads(
    name: str, bounds: Sequence[float], labels: Sequence[str], values: Sequence[str]
) -> list[str]:
    """Write the lines of a distribution up to their values: buckets if any, count, sum."""
    ends = [*(repr(float(bound)) for bound in bounds), "+Inf"] if bounds else []
    buckets = [line_head(f"{name}_bucket", [*labels, "le"], [*values, end]) for end in ends]
    return [*buckets, *(line_head(f"{name}_{last}", labels, values) for last in ("count", "sum"))]


def distribution_lines(heads: Sequence[str], series: Distribution) -> Iterator[str]:
    """Yield the lines of a distribution; a bucket holds what all before it hold."""
    *buckets, count, total = heads
    below = list(accumulate(series.counts))
    # A summary has no lines of buckets, and so none of these.
    for head, number in zip(buckets, below, strict=False):
        yield f"{head}{number}\n"
    yield f"{count}{below[-1]}\n"
    yield f"{total}{series.total!r}\n"


def _key(row: Row, labels: Mapping[str, str]) -> LabelValues:
    assert len(labels) == len(row.labels), f"{row.name} has the labels {row.labels}, not {labels}"
    return tuple([labels[name] for name in row.labels])


def _pair(label: str, value: str) -> str:
    escaped = value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'{label}="{escaped}"'
