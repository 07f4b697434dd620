"""Ranges of fixed arrays: who holds which part, without a word about what is in it.

A `Space` is a value: copy it, try something on the copy, and keep the copy only if it worked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

Kind = Literal["pages", "gate rows", "runs", "slots"]


class Place(NamedTuple):
    """One array that ranges are taken from; only pages are apart for every site."""

    kind: Kind
    site: str = ""

    def __str__(self) -> str:
        return f"{self.kind} at {self.site}" if self.site else self.kind


class Span(NamedTuple):
    """`size` entries of an array, from `first` on."""

    first: int
    size: int

    @property
    def stop(self) -> int:
        """The entry after the last."""
        return self.first + self.size


Need = Mapping[Place, Sequence[int]]
Holding = dict[Place, list[Span]]


class Ranges:
    """The free ranges of one array: sorted, apart from each other, taken first fit."""

    def __init__(self, capacity: int, *, used: int = 0) -> None:
        """Leave everything free but the first `used` entries."""
        self.capacity = capacity
        self.free = [Span(used, capacity - used)] if capacity > used else []

    @property
    def num_free(self) -> int:
        """Free entries in all."""
        return sum(span.size for span in self.free)

    @property
    def largest(self) -> int:
        """Entries of the largest free range."""
        return max((span.size for span in self.free), default=0)

    def __str__(self) -> str:
        return f"{self.num_free} of {self.capacity} are free, {self.largest} of them in one piece"

    def copy(self) -> Ranges:
        """Return an independent copy."""
        copy = Ranges(self.capacity, used=self.capacity)
        copy.free = self.free.copy()
        return copy

    def take(self, size: int) -> Span | None:
        """Take the lowest range of `size` entries that is free; None when there is none."""
        if size == 0:
            return Span(0, 0)
        for index, span in enumerate(self.free):
            if span.size >= size:
                rest = Span(span.first + size, span.size - size)
                self.free[index : index + 1] = [rest] if rest.size else []
                return Span(span.first, size)
        return None

    def take_all(self, sizes: Iterable[int]) -> list[Span] | None:
        """Take a range of each size, or nothing at all."""
        before = self.free.copy()
        spans = []
        for size in sizes:
            span = self.take(size)
            if span is None:
                self.free = before
                return None
            spans.append(span)
        return spans

    def give(self, span: Span) -> None:
        """Give a range back; it merges with its free neighbours."""
        if span.size == 0:
            return
        index = bisect_left(self.free, span)
        start, stop = max(index - 1, 0), index + 1
        merged: list[Span] = []
        for part in (*self.free[start:index], span, *self.free[index:stop]):
            if merged and merged[-1].stop == part.first:
                merged[-1] = Span(merged[-1].first, merged[-1].size + part.size)
            else:
                merged.append(part)
        self.free[start:stop] = merged


class Space:
    """The ranges of every place of a pool."""

    def __init__(self, capacities: Mapping[Place, int]) -> None:
        self.ranges = {place: Ranges(capacity) for place, capacity in capacities.items()}

    def copy(self) -> Space:
        """Return an independent copy."""
        copy = Space({})
        copy.ranges = {place: ranges.copy() for place, ranges in self.ranges.items()}
        return copy

    def take(self, need: Need) -> Holding | Place:
        """Take what a need names, all of it or nothing; return the first place that is short."""
        holding: Holding = {}
        for place, sizes in need.items():
            spans = self.ranges[place].take_all(sizes)
            if spans is None:
                self.give(holding)
                return place
            holding[place] = spans
        return holding

    def give(self, holding: Holding) -> None:
        """Give back everything that `holding` names."""
        for place, spans in holding.items():
            for span in spans:
                self.ranges[place].give(span)

    def fits(self, need: Need, place: Place) -> bool:
        """Tell whether what a need names at one place is free as it lies."""
        return self.ranges[place].copy().take_all(need[place]) is not None

    def amounts_to(self, need: Need) -> bool:
        """Tell whether enough is free everywhere for a need, in however many pieces."""
        return all(self.ranges[place].num_free >= sum(sizes) for place, sizes in need.items())

    def slide(self, place: Place, holdings: Sequence[Holding]) -> Iterator[tuple[int, int, Span]]:
        """Move the spans of `place` together, lowest first, so that one free range remains.

        Yields after each move the holding, the index within it, and the span as it was; what is
        there must be moved before the next, as the next one may come to lie on it.
        """
        held = [
            (span, owner, index)
            for owner, holding in enumerate(holdings)
            for index, span in enumerate(holding.get(place, ()))
            if span.size
        ]
        cursor = 0
        for span, owner, index in sorted(held):
            if span.first != cursor:
                holdings[owner][place][index] = Span(cursor, span.size)
                yield owner, index, span
            cursor += span.size
        self.ranges[place] = Ranges(self.ranges[place].capacity, used=cursor)

    def check(self, holdings: Iterable[Holding]) -> None:
        """Assert that every entry of every place is free or held, and only once."""
        spans = {place: list(ranges.free) for place, ranges in self.ranges.items()}
        for holding in holdings:
            for place, held in holding.items():
                spans[place] += [span for span in held if span.size]
        for place, parts in spans.items():
            cursor = 0
            for span in sorted(parts):
                assert span.first == cursor, f"{place}: entry {cursor} is lost or held twice"
                cursor = span.stop
            capacity = self.ranges[place].capacity
            assert cursor == capacity, f"{place}: {cursor} entries accounted for, not {capacity}"
