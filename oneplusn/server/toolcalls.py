"""Tool calls in the text of an answer: how models write them, and how they are read as they come.

Two forms are known: `<tool_call>{"name": …, "arguments": {…}}</tool_call>` anywhere in the text, as
Hermes and Qwen models write it, and a bare `{"name": …, "parameters": {…}}` in place of the text,
several with semicolons between them, as Llama 3 does. Reading yields the same however the text is
cut: a whole answer is read as one piece.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from oneplusn.server.toolcall_json import SPACE, CallReader

PYTHON_TAG = "<|python_tag|>"


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer outside calls."""

    text: str


@dataclass(frozen=True, slots=True)
class Begun:
    """A call of a tool, the first that is heard of it."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of a call's arguments; all pieces of a call make one JSON text."""

    index: int
    text: str


Event = Text | Begun | Arguments


class ToolReader(Protocol):
    """Reads the text of one answer."""

    def push(self, text: str) -> list[Event]:
        """Take a piece of the answer; return what is certain."""

    def finish(self) -> list[Event]:
        """Return the rest, when no more text will come."""


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a family of models writes calls.

    Attributes:
        begin: What stands before the name of the tool.
        middle: What stands between the name and the arguments.
        end: What stands after them.
        separator: What stands between two calls.
        mark: What announces a call within text; empty = calls stand in place of the text.
        signs: Texts of which any in a chat template gives the form away.
    """

    begin: str
    middle: str
    end: str
    separator: str
    mark: str
    signs: tuple[str, ...]

    def opening(self, name: str) -> str:
        """Write a call up to its arguments."""
        return f"{self.begin}{name}{self.middle}"

    def reader(self, names: Collection[str]) -> ToolReader:
        """Start reading an answer that may call the named tools."""
        return MarkedReader(self.mark, f"</{self.mark[1:]}") if self.mark else BareReader(names)


FORMS = {
    "hermes": CallForm(
        '<tool_call>\n{"name": "',
        '", "arguments": ',
        "}\n</tool_call>",
        "\n",
        "<tool_call>",
        ("<tool_call>",),
    ),
    "llama3": CallForm(
        '{"name": "', '", "parameters": ', "}", "; ", "", (PYTHON_TAG, '"parameters": ')
    ),
}
MARKS = frozenset(("<tool_call>", "</tool_call>"))


def guess_form(chat_template: str | None) -> str | None:
    """Name the form that a chat template teaches; None = none that is known."""
    if chat_template is None:
        return None
    found = (
        name for name, form in FORMS.items() if any(sign in chat_template for sign in form.signs)
    )
    return next(found, None)


@dataclass(slots=True)
class ToolAnswer:
    """What an answer has become: its text and its calls, as OpenAI's clients read them."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def take(self, events: Iterable[Event]) -> None:
        """Add what was read."""
        for event in events:
            match event:
                case Text(text):
                    self.text += text
                case Begun(_, call_id, name):
                    function = {"name": name, "arguments": ""}
                    self.calls.append({"id": call_id, "type": "function", "function": function})
                case Arguments(index, text):
                    self.calls[index]["function"]["arguments"] += text


def read_answer(reader: ToolReader, text: str) -> ToolAnswer:
    """Read a whole answer."""
    answer = ToolAnswer()
    answer.take(reader.push(text))
    answer.take(reader.finish())
    return answer


class _Calls:
    """The calls of one answer: numbers them, and tells what is heard of them."""

    def __init__(self) -> None:
        self.count = 0
        self.current = CallReader()
        self._has_told = False

    def begin(self) -> None:
        """Start to read another call."""
        self.current = CallReader()
        self._has_told = False

    def tell(self) -> list[Event]:
        """Return what is new of the current call."""
        call = self.current
        events: list[Event] = []
        if call.name is None:
            return events
        if not self._has_told:
            self._has_told = True
            events.append(Begun(self.count, f"call_{uuid.uuid4().hex[:24]}", call.name))
            self.count += 1
        arguments = call.take_arguments()
        if arguments:
            events.append(Arguments(self.count - 1, arguments))
        return events

    @property
    def is_told(self) -> bool:
        """Whether something of the current call has been told already."""
        return self._has_told


class MarkedReader:
    """Reads answers whose calls stand between marks, with text around them."""

    def __init__(self, mark: str, end_mark: str) -> None:
        self._mark = mark
        self._end_mark = end_mark
        self._held = ""
        self._calls = _Calls()
        self._state: Literal["text", "call", "end"] = "text"

    def push(self, text: str) -> list[Event]:
        """Take a piece of the answer; return what is certain."""
        events: list[Event] = []
        self._held += text
        while self._held and self._read(events):
            pass
        if self._state == "call":
            events += self._calls.tell()
        return _joined(events)

    def finish(self) -> list[Event]:
        """Return the rest, when no more text will come."""
        held, self._held = self._held, ""
        if self._state == "call" and not self._calls.is_told:
            held = self._mark + self._calls.current.raw + held
        elif self._state == "end" or (self._calls.count and not held.strip()):
            held = ""
        return [Text(held)] if held else []

    def _read(self, events: list[Event]) -> bool:
        """Read on in the text that is held; say whether there may be more to read."""
        if self._state == "call":
            return self._read_call(events)
        return self._read_end() if self._state == "end" else self._read_text(events)

    def _read_text(self, events: list[Event]) -> bool:
        before, mark, after = self._held.partition(self._mark)
        if mark:
            # Space between text and a call belongs to neither.
            events += [Text(before.rstrip(SPACE))] if before.strip(SPACE) else []
            self._state, self._held = "call", after
            self._calls.begin()
            return True
        certain = len(before) - _begun_at_end(before, self._mark)
        certain = len(before[:certain].rstrip(SPACE))
        if certain:
            events.append(Text(before[:certain]))
            self._held = before[certain:]
        return False

    def _read_call(self, events: list[Event]) -> bool:
        call = self._calls.current
        for position, char in enumerate(self._held, 1):
            call.feed(char)
            if call.is_broken or call.is_done:
                self._held = self._held[position:]
                events += self._calls.tell()
                if call.is_done or self._calls.is_told:
                    self._state = "end"
                else:
                    events.append(Text(self._mark + call.raw))
                    self._state = "text"
                return True
        self._held = ""
        return False

    def _read_end(self) -> bool:
        """Pass over what stands between a call and its end mark."""
        _, mark, after = self._held.partition(self._end_mark)
        if mark:
            self._state, self._held = "text", after
            return True
        self._held = self._held[len(self._held) - _begun_at_end(self._held, self._end_mark) :]
        return False


class BareReader:
    """Reads answers that are calls from beginning to end, or text from beginning to end."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._calls = _Calls()
        self._lead = ""
        self._state: Literal["start", "text", "call", "end", "over"] = "start"

    def push(self, text: str) -> list[Event]:
        """Take a piece of the answer; return what is certain."""
        if self._state == "text":
            return [Text(text)] if text else []
        if self._state == "over":
            return []
        events: list[Event] = []
        self._held += text
        while self._held and self._read(events):
            pass
        if self._state == "call" and self._calls.current.name in self._names:
            events += self._calls.tell()
        return _joined(events)

    def finish(self) -> list[Event]:
        """Return the rest, when no more text will come."""
        text = self._lead + self._held
        if self._state == "call" and not self._calls.is_told:
            text = self._lead + self._calls.current.raw
        self._held = self._lead = ""
        return [Text(text)] if text and not self._calls.count else []

    def _read(self, events: list[Event]) -> bool:
        """Read on in the text that is held; say whether there may be more to read."""
        if self._state == "call":
            return self._read_call(events)
        return self._read_start(events) if self._state == "start" else self._read_end()

    def _read_start(self, events: list[Event]) -> bool:
        text = self._held.lstrip(SPACE)
        if PYTHON_TAG.startswith(text):
            return False
        space = len(self._held) - len(text)
        self._lead, self._held = self._lead + self._held[:space], text
        if text.startswith(PYTHON_TAG):
            self._held = text.removeprefix(PYTHON_TAG)
        elif text[0] == "{":
            self._state = "call"
        else:
            self._give_up(events, text)
        return True

    def _read_call(self, events: list[Event]) -> bool:
        call = self._calls.current
        for position, char in enumerate(self._held, 1):
            call.feed(char)
            is_other = call.is_broken or (call.name is not None and call.name not in self._names)
            if is_other and not self._calls.count:
                self._give_up(events, call.raw + self._held[position:])
                return False
            if is_other or call.is_done:
                events += [] if is_other else self._calls.tell()
                self._held = self._held[position:]
                self._state = "end"
                return True
        self._held = ""
        return False

    def _read_end(self) -> bool:
        """Look for another call behind one; anything else is passed over."""
        self._held = self._held.lstrip(f"{SPACE};")
        if not self._held.startswith("{"):
            self._state = "end" if not self._held else "over"
            self._held = ""
            return False
        self._calls.begin()
        self._state = "call"
        return True

    def _give_up(self, events: list[Event], text: str) -> None:
        """Take the whole answer for text."""
        events.append(Text(self._lead + text))
        self._state, self._held, self._lead = "text", "", ""


def _joined(events: list[Event]) -> list[Event]:
    """Join pieces of text, and pieces of one call's arguments, that follow each other."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Text) and isinstance(last, Text):
            joined[-1] = Text(last.text + event.text)
        elif (
            isinstance(event, Arguments)
            and isinstance(last, Arguments)
            and event.index == last.index
        ):
            joined[-1] = Arguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined


def _begun_at_end(text: str, mark: str) -> int:
    """Count the last characters of `text` that may be the beginning of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
