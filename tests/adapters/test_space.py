"""Ranges of an array: taken, given back, and moved together."""

from __future__ import annotations

from oneplusn.adapters.space import Place, Ranges, Space, Span

PAGES = Place("pages", "l.0")
SLOTS = Place("slots")


def test_ranges_are_taken_first_fit_and_merge_when_given_back() -> None:
    ranges = Ranges(10)
    a, b, c = ranges.take(3), ranges.take(2), ranges.take(4)
    assert (a, b, c) == (Span(0, 3), Span(3, 2), Span(5, 4))
    assert ranges.take(2) is None
    ranges.give(a)
    ranges.give(c)
    assert ranges.free == [Span(0, 3), Span(5, 5)]
    assert (ranges.num_free, ranges.largest) == (8, 5)
    assert ranges.take(2) == Span(0, 2)
    assert ranges.take(4) == Span(5, 4)
    assert ranges.take(0) == Span(0, 0)
    ranges.give(b)
    assert ranges.free == [Span(2, 3), Span(9, 1)]


def test_a_need_is_taken_whole_or_not_at_all() -> None:
    space = Space({PAGES: 4, SLOTS: 2})
    held = space.take({PAGES: [3], SLOTS: [1]})
    assert held == {PAGES: [Span(0, 3)], SLOTS: [Span(0, 1)]}
    assert space.take({SLOTS: [1], PAGES: [2]}) == PAGES
    assert space.take({PAGES: [1], SLOTS: [1, 1]}) == SLOTS
    assert [space.ranges[place].num_free for place in (PAGES, SLOTS)] == [1, 1]
    space.give(held)
    space.check([])


def test_enough_in_pieces_is_not_enough_in_one() -> None:
    space = Space({PAGES: 3})
    first, middle, last = (space.take({PAGES: [1]}) for _ in range(3))
    space.give(first)
    space.give(last)
    assert space.amounts_to({PAGES: [2]})
    assert not space.fits({PAGES: [2]}, PAGES)
    assert not space.amounts_to({PAGES: [3]})

    moves = list(space.slide(PAGES, [middle]))

    assert moves == [(0, 0, Span(1, 1))]
    assert middle == {PAGES: [Span(0, 1)]}
    assert space.fits({PAGES: [2]}, PAGES)
    space.check([middle])
