"""Draw charts as SVG, in colours that the page around them decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 42
COLOURS = 6
MARKS = {"failed": 4, "swap": 3}
"""The colour of each kind of thing that happened."""

PERCENTILES = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
TICKS = 5
LABEL = 0.09
"""Of the width, that a label takes."""

GEOMETRIC = 8
"""Ratio of the largest value to the smallest from which an axis is logarithmic."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart, or one cloud of dots."""

    name: str
    points: Sequence[Point]
    kind: Literal["line", "marked", "dots"] = "line"


@dataclass(frozen=True, slots=True)
class Chart:
    """What a chart shows.

    Attributes:
        scale: `percentile` takes shares below 1 and gives the tail room; `values` has a tick for
            every x that there is, at equal distances if they grow geometrically.
        marks: Where on the x axis something happened, by its kind in `MARKS`.
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    scale: Literal["linear", "percentile", "values"] = "linear"
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def xs(self) -> list[float]:
        """Every x that there is, in order."""
        marked = (x for places in self.marks.values() for x in places)
        return sorted({x for line in self.series for x, _ in line.points} | {*marked})

    @property
    def colours(self) -> dict[str, int]:
        """The colour of everything that has a name."""
        lines = {line.name: index % COLOURS for index, line in enumerate(self.series)}
        return lines | {kind: MARKS[kind] for kind in self.marks}

    @property
    def is_logarithmic(self) -> bool:
        """Whether equal ratios of x are equal distances."""
        xs = self.xs
        return self.scale == "values" and bool(xs) and 0 < GEOMETRIC * xs[0] <= xs[-1]

    def place(self, x: float) -> float:
        """Return where an x is before it is scaled to the width."""
        if self.scale == "percentile":
            return -math.log10(1 - x)
        return math.log2(x) if self.is_logarithmic else x

    def x_ticks(self) -> list[tuple[float, str]]:
        """Return where the x axis has ticks, and what they say."""
        xs = self.xs
        if not xs:
            return []
        if self.scale == "percentile":
            room = LABEL * self.place(xs[-1])
            there = (p for p in PERCENTILES if p <= xs[-1] and (not p or self.place(p) >= room))
            return [(p, f"{100 * p:g}%") for p in there]
        if self.scale == "values":
            return [(x, f"{x:g}") for x in xs]
        return [(tick, f"{tick:g}") for tick in nice_ticks(xs[0], xs[-1])]


def nice_ticks(low: float, high: float) -> list[float]:
    """Return round numbers from `low` to `high`, about as many as fit."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / TICKS
    size = 10 ** math.floor(math.log10(raw))
    step = size * next(factor for factor in (1, 2, 5, 10) if factor * size >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def svg(chart: Chart) -> str:
    """Return a chart as an SVG element; `--c0` and so on are the colours of its series."""
    return "".join(_Frame(chart).parts())


class _Frame:
    """The rectangle in which a chart is drawn."""

    def __init__(self, chart: Chart) -> None:
        self.chart = chart
        places = [chart.place(x) for x in chart.xs] or [0.0]
        self._low, self._span = places[0], (places[-1] - places[0]) or 1.0
        most = max((y for line in chart.series for _, y in line.points), default=0.0) or 1.0
        self._ticks = nice_ticks(0.0, most * 1.02)
        self._most = max(most * 1.02, self._ticks[-1])

    def x(self, value: float) -> str:
        share = (self.chart.place(value) - self._low) / self._span
        return f"{LEFT + share * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        return f"{HEIGHT - BOTTOM - value / self._most * (HEIGHT - TOP - BOTTOM):.1f}"

    def parts(self) -> Iterator[str]:
        title = escape(self.chart.title)
        yield f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        yield from self._axes()
        for index, line in enumerate(self.chart.series):
            yield from self._line(line, index % COLOURS)
        for kind, places in self.chart.marks.items():
            ticks = "".join(f"M{self.x(x)} {HEIGHT - BOTTOM}v-9" for x in places)
            yield f'<path class="line" style="stroke:var(--c{MARKS[kind]})" d="{ticks}"/>'
        yield "</svg>"

    def _axes(self) -> Iterator[str]:
        right, foot = WIDTH - RIGHT, HEIGHT - BOTTOM
        for tick in self._ticks:
            y = self.y(tick)
            yield f'<path class="grid" d="M{LEFT} {y}H{right}"/>'
            yield f'<text x="{LEFT - 6}" y="{y}" dy=".35em" text-anchor="end">{tick:g}</text>'
        for value, label in self.chart.x_ticks():
            x = self.x(value)
            yield f'<path class="grid" d="M{x} {foot}v4"/>'
            yield f'<text x="{x}" y="{foot + 16}" text-anchor="middle">{label}</text>'
        middle, height = (LEFT + right) // 2, (TOP + foot) // 2
        yield f'<path class="axis" d="M{LEFT} {foot}H{right}"/>'
        yield (
            f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(self.chart.x)}'
            f'</text><text transform="translate(12 {height}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.chart.y)}</text>"
        )

    def _line(self, line: Series, colour: int) -> Iterator[str]:
        at = [f"{self.x(x)} {self.y(y)}" for x, y in line.points]
        style = f'style="stroke:var(--c{colour})"'
        if at and line.kind != "dots":
            yield f'<path class="line" {style} d="M{"L".join(at)}"/>'
        if line.kind != "line":
            yield f'<path class="dots" {style} d="{"".join(f"M{point}h0" for point in at)}"/>'


def percentiles(name: str, values: Iterable[float], *, points: int = 160) -> Series:
    """Return values by percentile, of nearest rank, thinned evenly along the chart's axis."""
    ordered = sorted(values)
    if not ordered:
        return Series(name, [])
    count = len(ordered)
    end = math.log10(count)
    ranks = (int(count * (1 - 10 ** (-end * step / points))) for step in range(points + 1))
    chosen = dict.fromkeys(min(rank, count - 1) for rank in ranks)
    return Series(name, [(rank / count, ordered[rank]) for rank in chosen])
