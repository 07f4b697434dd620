"""Ranges of fixed arrays: who holds which part, without a word about what is in it.

A `Space` is a value: copy it, try something on the copy, and keep the copy only if it worked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["pages", "gate rows", "runs", "slots"]


class Place(NamedTuple):
    """One array that ranges are taken from; runs and slots are the same at every site."""

    kind: Kind
    site: str = ""

    def __str__(self) -> str:
        return f"{self.kind} at {self.site}" if self.site else self.kind


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """`count` entries of an array, from `first` on."""

    first: int
    count: int

    @property
    def stop(self) -> int:
        """The entry after the last."""
        return self.first + self.count


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
        return sum(span.count for span in self.free)

    @property
    def largest(self) -> int:
        """Entries of the largest free range."""
        return max((span.count for span in self.free), default=0)

    def __str__(self) -> str:
        return f"{self.num_free} of {self.capacity} are free, {self.largest} of them in one piece"

    def copy(self) -> Ranges:
        """Return an independent copy."""
        copy = Ranges(self.capacity)
        copy.free = list(self.free)
        return copy

    def take(self, count: int) -> Span | None:
        """Take the lowest range of `count` entries that is free; None when there is none."""
        if count == 0:
            return Span(0, 0)
        for index, span in enumerate(self.free):
            if span.count >= count:
                rest = Span(span.first + count, span.count - count)
                self.free[index : index + 1] = [rest] if rest.count else []
                return Span(span.first, count)
        return None

    def give(self, span: Span) -> None:
        """Give a range back; it merges with its free neighbours."""
        if span.count == 0:
            return
        index = bisect_left(self.free, span)
        start, stop = max(index - 1, 0), index + 1
        merged: list[Span] = []
        for part in (*self.free[start:index], span, *self.free[index:stop]):
            if merged and merged[-1].stop == part.first:
                merged[-1] = Span(merged[-1].first, merged[-1].count + part.count)
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
        """Take what a need names; where it does not fit, return the place that is short.

        After a failure this space is part-way: it is the caller's copy, to be thrown away.
        """
        holding: Holding = {}
        for place, counts in need.items():
            holding[place] = []
            for count in counts:
                span = self.ranges[place].take(count)
                if span is None:
                    return place
                holding[place].append(span)
        return holding

    def give(self, holding: Holding) -> None:
        """Give back everything that `holding` names."""
        for place, spans in holding.items():
            for span in spans:
                self.ranges[place].give(span)

    def slide(self, place: Place, holdings: Sequence[Holding]) -> Iterator[tuple[int, int, Span]]:
        """Move the spans of `place` together, lowest first, so that one free range remains.

        Yields after each move the holding, the index within it, and the span as it was; what is
        there must be moved before the next, as the next one may come to lie on it.
        """
        held = [
            (span, owner, index)
            for owner, holding in enumerate(holdings)
            for index, span in enumerate(holding.get(place, ()))
            if span.count
        ]
        cursor = 0
        for span, owner, index in sorted(held):
            if span.first != cursor:
                holdings[owner][place][index] = Span(cursor, span.count)
                yield owner, index, span
            cursor += span.count
        self.ranges[place] = Ranges(self.ranges[place].capacity, used=cursor)

    def check(self, holdings: Iterable[Holding]) -> None:
        """Assert that every entry of every place is free or held, and only once."""
        spans = {place: list(ranges.free) for place, ranges in self.ranges.items()}
        for holding in holdings:
            for place, held in holding.items():
                spans[place] += [span for span in held if span.count]
        for place, parts in spans.items():
            cursor = 0
            for span in sorted(parts):
                assert span.first == cursor, f"{place}: entry {cursor} is lost or held twice"
                cursor = span.stop
            capacity = self.ranges[place].capacity
            assert cursor == capacity, f"{place}: {cursor} entries accounted for, not {capacity}"
