r"""Match module paths against regular expressions that an upload brings, in bounded time.

Python's matcher backtracks, so `(a|a)*b` in an `adapter_config.json` would hang whoever reads it.
Here a pattern walks over the set of all places in the text that it can have reached, one bit of an
integer each: the work is polynomial in the length of a path, and a budget counts it. What only
backtracking can do (lookaround, back references, atomic groups) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from oneplusn.adapters.checks import shown
from oneplusn.errors import AdapterInvalid

MAX_PATTERN_CHARS = 4096
STEP_BUDGET = 1_000_000
"""Nodes visited for one adapter; about a second."""

# No group and no quantifier leaves one way to match, in which Python's matcher cannot lose itself.
_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.)+\$?")

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdigit,
    "CATEGORY_NOT_DIGIT": lambda char: not char.isdigit(),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": lambda char: not char.isspace(),
    "CATEGORY_WORD": lambda char: _is_word(char),
    "CATEGORY_NOT_WORD": lambda char: not _is_word(char),
}

Nodes = Iterable[tuple[Any, Any]]


class Matcher:
    """Match the patterns of one adapter, and count the work of all of them.

    Texts are module paths: ASCII, one line, a few hundred characters at most.
    """

    def __init__(self, budget: int = STEP_BUDGET) -> None:
        self._left = budget
        self._compiled: dict[str, re.Pattern[str]] = {}
        self._parsed: dict[str, Nodes] = {}

    def fullmatch(self, pattern: str, text: str) -> bool:
        """Say whether `pattern` matches all of `text`, as `re.fullmatch` would.

        Raises:
            AdapterInvalid: `pattern_not_supported` or `pattern_too_costly`.
        """
        return self._match(pattern, text, prefix="")

    def match_tail(self, pattern: str, path: str) -> bool:
        """Say whether `pattern` matches `path` or what follows one of its dots.

        Raises:
            AdapterInvalid: `pattern_not_supported` or `pattern_too_costly`.
        """
        return self._match(pattern, path, prefix=r"(?:.*\.)?")

    def _match(self, pattern: str, text: str, *, prefix: str) -> bool:
        whole = f"{prefix}(?:{pattern})"
        self.spend(1)
        if len(pattern) <= MAX_PATTERN_CHARS and _PLAIN.fullmatch(pattern) is not None:
            if whole not in self._compiled:
                self._compiled[whole] = re.compile(whole)
            return self._compiled[whole].fullmatch(text) is not None
        try:
            if whole not in self._parsed:
                self.spend(len(pattern))
                self._parsed[whole] = _parse(whole)
            ends = _Walk(self, text).sequence(self._parsed[whole], 1)
        except (re.error, RecursionError, OverflowError, _Unsupported) as error:
            raise AdapterInvalid(
                f"pattern {shown(pattern)}: {error}; write it with literals, classes, groups, '|'"
                f" and repeats in at most {MAX_PATTERN_CHARS} characters (no lookaround, no back"
                " references, no flags), or give a list of names",
                code="pattern_not_supported",
            ) from None
        return bool(ends >> len(text))

    def spend(self, steps: int) -> None:
        """Count work.

        Raises:
            AdapterInvalid: `pattern_too_costly`, when the budget is spent.
        """
        self._left -= steps
        if self._left < 0:
            raise AdapterInvalid(
                "the patterns in adapter_config.json take too long to match against the modules;"
                " give the names of the modules instead",
                code="pattern_too_costly",
            )


class _Unsupported(Exception):
    """A construct that needs backtracking."""


class _Walk:
    """Follow a pattern through one text. Bit i of a set of places is the place before char i."""

    def __init__(self, matcher: Matcher, text: str) -> None:
        self.matcher = matcher
        self.text = text
        self.masks: dict[tuple[str, int | None], int] = {}

    def sequence(self, nodes: Nodes, places: int) -> int:
        """Return where the nodes, one after the other, can end when they start at `places`."""
        for op, argument in nodes:
            if not places:
                break
            self.matcher.spend(1)
            places = self.node(str(op), argument, places)
        return places

    def node(self, op: str, argument: Any, places: int) -> int:  # noqa: ANN401 (re's tree)
        """Return where one node can end."""
        match op:
            case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
                return (places & self.mask(op, argument)) << 1
            case "AT":
                return places & self.anchor(str(argument))
            case "BRANCH":
                ends = 0
                for nodes in argument[1]:
                    ends |= self.sequence(nodes, places)
                return ends
            case "SUBPATTERN" if not (argument[1] or argument[2]):
                return self.sequence(argument[3], places)
            case "MAX_REPEAT" | "MIN_REPEAT":
                return self.repeat(places, *argument)
        raise _Unsupported(f"{op.lower()} needs backtracking")

    def repeat(self, places: int, low: int, high: int, nodes: Nodes) -> int:
        """Return where `low` to `high` rounds of the nodes can end."""
        for _ in range(low):
            ends = self.sequence(nodes, places)
            if ends == places:
                break
            places = ends
        reached = fresh = places
        for _ in range(high - low):
            fresh = self.sequence(nodes, fresh) & ~reached
            if not fresh:
                break
            reached |= fresh
        return reached

    def mask(self, op: str, argument: Any) -> int:  # noqa: ANN401 (re's tree)
        """Return the places before a character that the node takes."""
        key = (op, id(argument) if op == "IN" else argument)
        if key not in self.masks:
            self.matcher.spend(len(self.text) * (len(argument) if op == "IN" else 1) // 8)
            takes = _predicate(op, argument)
            self.masks[key] = sum(1 << i for i, char in enumerate(self.text) if takes(char))
        return self.masks[key]

    def anchor(self, kind: str) -> int:
        """Return the places where an anchor holds."""
        size = len(self.text)
        if kind in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return 1
        if kind in ("AT_END", "AT_END_STRING"):
            return 1 << size
        inside = [False, *map(_is_word, self.text), False]
        boundary = sum(1 << i for i in range(size + 1) if inside[i] != inside[i + 1])
        return boundary if kind == "AT_BOUNDARY" else ~boundary


def _parse(pattern: str) -> Nodes:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise _Unsupported(f"it has {len(pattern)} characters")
    tree = _parser.parse(pattern)
    if tree.state.flags != re.UNICODE:
        raise _Unsupported("it sets flags")
    nodes: Nodes = tree
    return nodes


def _predicate(op: str, argument: Any) -> Callable[[str], bool]:  # noqa: ANN401 (re's tree)
    if op == "ANY":
        return lambda _: True
    if op == "LITERAL":
        return lambda char: ord(char) == argument
    if op == "NOT_LITERAL":
        return lambda char: ord(char) != argument
    negated = bool(argument) and str(argument[0][0]) == "NEGATE"
    items = [_item(str(kind), value) for kind, value in argument[negated:]]
    return lambda char: any(item(char) for item in items) != negated


def _item(kind: str, value: Any) -> Callable[[str], bool]:  # noqa: ANN401 (re's tree)
    if kind == "LITERAL":
        return lambda char: ord(char) == value
    if kind == "RANGE":
        low, high = value
        return lambda char: low <= ord(char) <= high
    return _CATEGORIES[str(value)]


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"
