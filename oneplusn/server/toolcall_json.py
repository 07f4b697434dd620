"""One tool call, a JSON object with a name and arguments, read as it comes."""

from __future__ import annotations

import json

SPACE = " \t\n\r"
_ARGUMENTS = frozenset(("arguments", "parameters"))


class CallReader:
    """One call as it is read, character by character; its members come in any order.

    Attributes:
        raw: All that was read.
        name: Of the tool, once it is known.
        is_done: Whether the object is closed.
        is_broken: Whether it is no object, or has no name.
    """

    def __init__(self) -> None:
        self.raw = ""
        self.name: str | None = None
        self.is_done = False
        self.is_broken = False
        self._is_open = False
        self._key: str | None = None
        self._value = ""
        self._depth = 0  # of the value under way; the object around it is not counted
        self._in_string = False
        self._is_escaped = False
        self._is_streamed = False
        self._has_arguments = False
        self._arguments = ""
        self._space = ""

    def feed(self, char: str) -> None:
        """Take a character; it must be neither done nor broken."""
        self.raw += char
        if not self._is_open:
            self._is_open = char == "{"
            self.is_broken = not self._is_open and char not in SPACE
        elif self._in_string:
            self._add(char)
            self._in_string = self._is_escaped or char != '"'
            self._is_escaped = char == "\\" and not self._is_escaped
        elif self._depth == 0 and char in ",}":
            self._end_member()
            self._end(char)
        elif self._depth == 0 and char == ":" and self._key is None:
            key = _decoded(self._value)
            self._key, self._value = str(key), ""
            self.is_broken = not isinstance(key, str)
        else:
            self._depth += (char in "{[") - (char in "}]")
            self.is_broken = self._depth < 0
            self._in_string = char == '"'
            self._add(char)

    def take_arguments(self) -> str:
        """Return what is new of the arguments; they are held back until the name is known."""
        if self.name is None:
            return ""
        new, self._arguments = self._arguments, ""
        return new

    def _add(self, char: str) -> None:
        """Add a character to the value under way."""
        begins = not self._value.strip() and char not in SPACE
        if begins and self._key in _ARGUMENTS and not self._has_arguments:
            # Arguments may be JSON within a string, which is read when it is whole.
            self._has_arguments = True
            self._is_streamed = char != '"'
        if not self._is_streamed:
            self._value += char
        elif self._depth == 0 and not self._in_string and char in SPACE:
            self._space += char
        else:
            self._value = "streamed"
            self._arguments += self._space + char
            self._space = ""

    def _end_member(self) -> None:
        value, key = self._value.strip(), self._key
        if key is None:
            # An object may be empty, and some models end it with a comma too many.
            self.is_broken = bool(value)
        elif key == "name":
            name = _decoded(value)
            self.name = name if isinstance(name, str) and name else None
            self.is_broken = self.name is None
        elif key in _ARGUMENTS and not self._is_streamed:
            text = _decoded(value)
            self._arguments += text if isinstance(text, str) else ""
        self._key, self._value, self._space, self._is_streamed = None, "", "", False

    def _end(self, char: str) -> None:
        if char == "}" and not self.is_broken:
            self.is_done = self.name is not None
            self.is_broken = self.name is None
            self._arguments += "" if self._has_arguments else "{}"


def _decoded(text: str) -> object:
    """Read a JSON value; None if it is none."""
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None
