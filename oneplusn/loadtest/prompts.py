"""Texts of requests: words whose number of tokens is known, or the lines of a file.

A line of a file brings a text, a chat, or only a length: a trace of lengths is one without texts.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import msgspec

from oneplusn.loadtest.mistake import Mistake

POOL_WORDS = 16_384
HEAD_WORDS = 4
PROSE = """
The river runs past an old stone house where a farmer keeps three brown dogs and one white horse.
Every morning the light comes over the hill, a train goes south to the city, and people walk to
work along a narrow street. Some of them stop to buy bread, fruit or a paper; others talk about
the game, the price of oil, or how long winter will be. By night the town is quiet again, but in
the big room under the roof a woman still reads her book near an open window and waits for rain.
"""
VOCABULARY = tuple(sorted({word.lower() for word in re.findall(r"[A-Za-z]+", PROSE)}))

Count = Callable[[str], int]
"""Tokens of a text, as the server counts them."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file of prompts; what it does not say is drawn."""

    prompt: str | tuple[dict[str, Any], ...] | None = None
    task: str | None = None
    output_tokens: int | None = None
    input_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each word costs after another one, and what a text costs beyond its words."""

    costs: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(VOCABULARY, 1))
    overhead: int = 0

    @classmethod
    def counted(cls, count: Count) -> Vocabulary:
        """Find out what the words cost by asking the server."""
        # A word costs what it adds to a text: alone it would bring special tokens, and no space.
        first = VOCABULARY[0]
        alone = count(first)
        costs = {word: count(f"{first} {word}") - alone for word in VOCABULARY}
        overhead = max(alone - costs[first], 0)
        return cls({word: max(cost, 1) for word, cost in costs.items()}, overhead)


class Words:
    """Makes texts of a wanted number of tokens, all different from their first words on."""

    def __init__(self, costs: Mapping[str, int], overhead: int, rng: random.Random) -> None:
        """Take what each word costs after another one, and what a text costs beyond its words."""
        self._costs = costs
        self._overhead = overhead
        self._names = list(costs)
        self._pool = rng.choices(self._names, k=POOL_WORDS) * 2
        self._sums = list(accumulate((costs[word] for word in self._pool), initial=0))
        self._by_cost = {cost: word for word, cost in costs.items()}

    def text(self, tokens: int, rng: random.Random) -> str:
        """Return a text of that many tokens, or as near below as its words come; one at least."""
        words = list[str]()
        left = tokens - self._overhead
        for word in rng.choices(self._names, k=HEAD_WORDS):
            if self._costs[word] <= left:
                words.append(word)
                left -= self._costs[word]
        while left > 0:
            start = rng.randrange(POOL_WORDS)
            end = bisect_right(self._sums, self._sums[start] + left) - 1
            words += self._pool[start:end]
            left -= self._sums[end] - self._sums[start]
            if end < len(self._pool):
                break
        if filler := self._by_cost.get(left):
            words.append(filler)
        return " ".join(words) or self._names[0]


def read_lines(path: Path, *, chat: bool) -> Sequence[Line]:
    """Read JSON lines: `prompt`, `messages` or `input_tokens`; if wanted `task`, `output_tokens`.

    Raises:
        Mistake: A line is none; the message has its number.
    """
    lines = list[Line]()
    try:
        content = path.read_bytes().splitlines()
    except OSError as error:
        raise Mistake(f"{path} cannot be read: {error.strerror}") from None
    for number, raw in enumerate(content, 1):
        if not raw.strip():
            continue
        try:
            lines.append(_line(raw, chat=chat))
        except ValueError as error:
            raise Mistake(f"{path}, line {number}: {error}") from None
    if not lines:
        raise Mistake(f"{path} has no line")
    return lines


class _Row(msgspec.Struct, frozen=True):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    task: str | None = None
    output_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    input_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None


def _line(raw: bytes, *, chat: bool) -> Line:
    row = msgspec.json.decode(raw, type=_Row)
    if row.messages and not chat:
        raise ValueError("messages are for --endpoint chat")
    brought = [what for what in (row.prompt, row.messages, row.input_tokens) if what]
    if len(brought) != 1:
        raise ValueError(
            "it needs one of prompt (a text), messages (a list) and input_tokens (1 or more)"
        )
    prompt = tuple(row.messages) if row.messages else row.prompt
    return Line(prompt, row.task, row.output_tokens, row.input_tokens)
