"""Keep JSON in an output ending: lengths of strings, runs of space and digits, the last tokens.

A grammar says what may come next; it does not see to it that an output comes to an end. A model
can stay in a string or a number, or emit newlines, until its tokens are spent, and what it leaves
is no JSON. So the guard reads along, knows where in the document the output is, and narrows what
the grammar allows: to what fits into a string, to something other than space, and, with the last
tokens, to what closes the string, array or object that is open. It never takes the last token away
that the grammar allows. Knows numpy, no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from oneplusn.server.grammars import JsonRules
from oneplusn.server.json_schemas import (
    MAX_LENGTH,
    Place,
    element,
    length_limits,
    member,
    narrowest_lengths,
)

Bits = npt.NDArray[np.int32]

MAX_RUN = 64  # of space and digits
# Tokens kept for what must still be said, beside one for everything that is open.
MAX_RESERVE = 32
ARGUMENTS = frozenset(("arguments", "parameters"))

_SPACE = frozenset(b" \t\n\r")
_DIGITS = frozenset(b"0123456789")
_CONTINUATION = bytes(range(0x80, 0xC0))
_QUOTE, _BACKSLASH, _COMMA, _BRACE, _U = b'"\\,{u'
_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{0,4}|.)?", re.DOTALL)
_CONTENT = re.compile(rb'(?:[^"\\]|\\(?:u[0-9a-fA-F]{0,4}|[^u])?)*', re.DOTALL)


def pack(allowed: npt.NDArray[np.bool_]) -> Bits:
    """Write booleans [V] as the bits of int32 [V / 32 rounded up], the first lowest."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, np.bool_)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view(np.int32)


class TokenTable:
    """What every token of a vocabulary does to a JSON string. Made once, shared by all sequences.

    Attributes:
        vocab: Bytes of each token; empty = it has no text.
        closers: Tokens that begin with a closing bracket.
        not_space: Tokens that do not begin with space.
        not_run: Tokens that begin neither with space nor with a digit.
        single: Tokens of one byte.
        longest: Most characters that a token adds to a string.
    """

    def __init__(self, vocab: Sequence[bytes]) -> None:
        self.vocab = vocab
        firsts = np.array([token[0] if token else 256 for token in vocab], np.int16)
        self.closers = pack(np.isin(firsts, list(b"]}")))
        self.not_space = pack(~np.isin(firsts, [*_SPACE, 256]))
        self.not_run = pack(~np.isin(firsts, [*_SPACE, *_DIGITS, 256]))
        self.single = pack(np.array([len(token) == 1 for token in vocab]))
        # Read from inside a string: its characters before the quote that ends it, and whether
        # there is one.
        self._head = np.array([len(token.translate(None, _CONTINUATION)) for token in vocab])
        self._ends = np.zeros(len(vocab), np.bool_)
        # Of the strings that begin in the token, the shortest that it ends and the longest; read
        # from inside a string (row 0) and from outside (row 1).
        self._shortest = np.full((2, len(vocab)), MAX_LENGTH)
        self._longest = np.zeros((2, len(vocab)), np.int64)
        for index, token in enumerate(vocab):
            if _QUOTE in token or _BACKSLASH in token:
                self._read_inside(index, token)
                self._read_outside(index, token, 0, row=1)
        self.longest = int(self._head.max(initial=0))
        self.within = lru_cache(maxsize=None)(self._within)
        self.beyond = lru_cache(maxsize=None)(self._beyond)
        self.fitting = lru_cache(maxsize=64)(self._fitting)

    def _read_inside(self, index: int, token: bytes) -> None:
        size, end = _content(token, 0)
        self._head[index], self._ends[index] = size, end < len(token)
        self._read_outside(index, token, end + 1, row=0)

    def _read_outside(self, index: int, token: bytes, start: int, *, row: int) -> None:
        while (quote := token.find(_QUOTE, start)) >= 0:
            size, end = _content(token, quote + 1)
            self._longest[row, index] = max(self._longest[row, index], size)
            if end < len(token):
                self._shortest[row, index] = min(self._shortest[row, index], size)
            start = end + 1

    def _within(self, count: int) -> Bits:
        """Mark tokens that take a string at most `count` characters further."""
        return pack(self._head <= count)

    def _beyond(self, count: int) -> Bits:
        """Mark tokens that do not end a string before `count` more characters."""
        return pack(~self._ends | (self._head >= count))

    def _fitting(self, least: int, most: int, *, inside: bool) -> Bits:
        """Mark tokens in which no string begins that is too short or too long."""
        row = 0 if inside else 1
        return pack((self._shortest[row] >= least) & (self._longest[row] <= most))


@dataclass(slots=True)
class _Container:
    """An object or an array that is open.

    Attributes:
        places: What it must match.
        is_object: Which of the two it is.
        key: Key of the value that is next or under way; None = a key is next.
        name: Text under "name", which tells the tool in a call.
    """

    places: list[Place]
    is_object: bool
    key: str | None = None
    name: str = ""


class JsonGuard:
    """Reads one output along, and narrows what may come next.

    Attributes:
        was_cut: Whether more could have been said, had there been tokens left.
    """

    def __init__(self, rules: JsonRules, table: TokenTable, max_tokens: int) -> None:
        """Start at the beginning of an output of at most `max_tokens`."""
        self.was_cut = False
        self._rules = rules
        self._table = table
        self._reserve = min(MAX_RESERVE, max_tokens // 8)
        self._narrowest = _narrowest(rules)
        self._trigger = rules.trigger.encode()
        self._recent = b""
        self._has_begun = False
        self._in_json = False
        self._open: list[_Container] = []
        self._string: bytearray | None = None
        self._num_chars = 0
        self._limits = (0, MAX_LENGTH)
        self._escape = 0  # bytes that the escape under way still needs, at least
        self._run = 0
        self._in_number = False

    def feed(self, token: int) -> None:
        """Read a token that was picked."""
        for byte in self._table.vocab[token]:
            if self._string is not None:
                self._feed_string(self._string, byte)
            elif self._in_json:
                self._feed_structure(byte)
            elif not self._has_begun and byte not in _SPACE:
                self._begin(byte)
            else:
                self._feed_free(byte)

    def narrow(self, allowed: Bits, *, num_left: int) -> None:
        """Take from the allowed tokens what would keep the JSON from ending.

        Args:
            allowed: What the grammar allows; changed in place, never to nothing.
            num_left: Tokens that the output may still have.
        """
        if not self._in_json and self._has_begun:
            return
        needed = len(self._open) + (self._string is not None) + self._reserve
        is_closing = num_left <= needed
        if self._string is not None:
            self._narrow_string(allowed, is_closing=is_closing)
        elif self._open:
            self._narrow_structure(allowed, is_closing=is_closing)
        if self._narrowest is not None:
            inside = self._string is not None
            _keep(allowed, self._table.fitting(*self._narrowest, inside=inside))

    def _narrow_structure(self, allowed: Bits, *, is_closing: bool) -> None:
        table = self._table
        if is_closing and self._close(allowed, table.closers):
            return
        if self._run >= MAX_RUN or (is_closing and self._in_number):
            _keep(allowed, table.not_run)
        elif is_closing:
            _keep(allowed, table.not_space)

    def _narrow_string(self, allowed: Bits, *, is_closing: bool) -> None:
        table = self._table
        if self._escape:
            # The table reads tokens as they are outside an escape; one byte cannot reach out.
            if self._narrowest is not None:
                _keep(allowed, table.single)
            return
        least, most = (limit - self._num_chars for limit in self._limits)
        if least > 0:
            _keep(allowed, table.beyond(min(least, table.longest + 1)))
        if is_closing and self._close(allowed, table.within(0)):
            return
        if most < table.longest:
            _keep(allowed, table.within(max(most, 0)))

    def _close(self, allowed: Bits, closing: Bits) -> bool:
        """Leave only tokens that close what is open, if there are any; say whether."""
        other = allowed & ~closing & self._table.not_space
        if not _keep(allowed, closing):
            return False
        self.was_cut = self.was_cut or bool(other.any())
        return True

    def _begin(self, byte: int) -> None:
        """Decide by its first character whether the output is JSON from its beginning."""
        self._has_begun = True
        rules = self._rules
        is_whole = not rules.tools or rules.schema is not None or not rules.trigger
        starts = b"{" if rules.tools else b'{["'
        if is_whole and byte in starts:
            self._in_json = True
            self._feed_structure(byte)
        else:
            self._feed_free(byte)

    def _feed_free(self, byte: int) -> None:
        """Look for the trigger in text that is no JSON."""
        if not self._trigger:
            return
        self._recent = (self._recent + bytes([byte]))[-len(self._trigger) :]
        if self._recent == self._trigger:
            self._recent, self._in_json, self._run = b"", True, 0

    def _feed_string(self, string: bytearray, byte: int) -> None:
        string.append(byte)
        if self._escape:
            # No digit of \u0000 is a u.
            self._escape = 4 if self._escape == 1 and byte == _U else self._escape - 1
        elif byte == _BACKSLASH:
            self._escape = 1
            self._num_chars += 1
        elif byte == _QUOTE:
            self._end_string(bytes(string[:-1]))
        elif not 0x80 <= byte < 0xC0:
            self._num_chars += 1

    def _end_string(self, content: bytes) -> None:
        self._string = None
        inner = self._open[-1] if self._open else None
        if inner is None or not inner.is_object:
            return
        if inner.key is None:
            inner.key = _decoded(content)
        elif inner.key == "name":
            inner.name = _decoded(content)

    def _feed_structure(self, byte: int) -> None:
        self._in_number = byte in _DIGITS
        self._run = self._run + 1 if self._in_number or byte in _SPACE else 0
        inner = self._open[-1] if self._open else None
        if byte == _QUOTE:
            is_key = inner is not None and inner.is_object and inner.key is None
            self._string = bytearray()
            self._num_chars = 0
            self._limits = (0, MAX_LENGTH) if is_key else length_limits(self._value_places())
        elif byte in b"{[":
            self._open.append(_Container(self._value_places(), byte == _BRACE))
        elif byte in b"]}" and inner is not None:
            self._open.pop()
            # Where a trigger begins JSON, its end is the end of the value.
            self._in_json = bool(self._open) or not self._trigger
        elif byte == _COMMA and inner is not None:
            inner.key = None

    def _value_places(self) -> list[Place]:
        """Find what the value that begins now must match."""
        if self._narrowest is None:
            return []
        if not self._open:
            schema = self._rules.schema
            return [Place(schema, schema)] if schema is not None else []
        inner = self._open[-1]
        if not inner.is_object:
            return element(inner.places)
        key = inner.key or ""
        tool = self._rules.tools.get(inner.name)
        if tool is not None and len(self._open) == 1 and key in ARGUMENTS:
            return [Place(tool, tool)]
        return member(inner.places, key)


def _narrowest(rules: JsonRules) -> tuple[int, int] | None:
    """Return the largest minimum and the smallest maximum of all strings; None = no lengths."""
    schemas = [*rules.tools.values(), *([] if rules.schema is None else [rules.schema])]
    lengths = [narrowest_lengths(schema) for schema in schemas]
    least = max((least for least, _ in lengths), default=0)
    most = min((most for _, most in lengths), default=MAX_LENGTH)
    return (least, most) if least or most < MAX_LENGTH else None


def _keep(allowed: Bits, wanted: Bits) -> bool:
    """Leave of the allowed tokens only the wanted ones, if there are any; say whether."""
    both = allowed & wanted
    if not both.any():
        return False
    allowed[:] = both
    return True


def _content(token: bytes, start: int) -> tuple[int, int]:
    """Count the characters of a string's content from `start`, and find where it ends.

    An escape is one character, where it begins, even when the token does not finish it.
    """
    match = _CONTENT.match(token, start)
    assert match is not None
    content = _ESCAPE.sub(b"x", match[0]) if _BACKSLASH in match[0] else match[0]
    return len(content.translate(None, _CONTINUATION)), match.end()


def _decoded(content: bytes) -> str:
    """Read the inside of a JSON string."""
    text: str = json.loads(f'"{content.decode(errors="replace")}"', strict=False)
    return text
