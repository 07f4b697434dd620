"""Goodput: which answers came as fast as was promised, and whether there are enough of them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from oneplusn.loadtest.drive import Record
from oneplusn.loadtest.stream import Answer

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
TIMES = ("ttft", "itl", "tpot", "e2e")
FORM = "ttft=500ms,itl=50ms,e2e=5s"
LIMIT = re.compile(r"(\w+)=(\d+(?:\.\d+)?)(\w+)")


@dataclass(frozen=True, slots=True)
class Slo:
    """How long each of the times of a request may be, in seconds."""

    limits: dict[str, float]

    def __str__(self) -> str:
        return ",".join(f"{name}={limit * 1e3:g}ms" for name, limit in self.limits.items())

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read `ttft=500ms,itl=50ms,e2e=5s`.

        Raises:
            ValueError: A part is no limit, names no time that is measured, or comes twice.
        """
        limits = dict[str, float]()
        for part in text.split(","):
            found = LIMIT.fullmatch(part.strip())
            if found is None or found[1] not in TIMES or found[3] not in UNITS:
                msg = (
                    f"{part!r} is no limit; give {', '.join(TIMES)} with a number in "
                    f"{', '.join(UNITS)}, as in {FORM}"
                )
                raise ValueError(msg)
            if found[1] in limits:
                msg = f"{found[1]} has two limits in {text!r}; give one"
                raise ValueError(msg)
            limits[found[1]] = float(found[2]) * UNITS[found[3]]
        return cls(limits)

    def missed(self, answer: Answer) -> Iterator[str]:
        """Yield the times of an answer that were longer than they may be."""
        for name, limit in self.limits.items():
            if _seconds(name, answer) > limit:
                yield name

    def is_met(self, record: Record) -> bool:
        """Whether a request was answered, and in time."""
        return record.answer is not None and not any(self.missed(record.answer))


def _seconds(name: str, answer: Answer) -> float:
    """Return a time of an answer; 0 where nothing was waited for."""
    if name == "e2e":
        return answer.ended - answer.sent
    if not answer.times:
        return 0.0
    if name == "ttft":
        return answer.first_token_s
    if name == "itl":
        return max(answer.gaps_s, default=0.0)
    return (answer.ended - answer.times[0]) / (answer.tokens - 1) if answer.tokens > 1 else 0.0


def judge(slo: Slo, counted: Iterable[Record], seconds: float) -> dict[str, Any]:
    """Return how many requests met all limits, and which limit the others missed.

    What was given up because the load was interrupted does not count.
    """
    over = [r for r in counted if r.answer is not None or r.failure is not None]
    met = sum(slo.is_met(record) for record in over)
    missed = Counter(name for r in over if r.answer is not None for name in slo.missed(r.answer))
    return {
        "limits_ms": {name: limit * 1e3 for name, limit in slo.limits.items()},
        "met": met,
        "share": met / len(over) if over else None,
        "requests_per_s": met / seconds,
        "missed": {name: missed[name] for name in slo.limits},
        "without_answer": sum(record.answer is None for record in over),
    }


@dataclass(frozen=True, slots=True)
class Bound:
    """The least goodput: a share of the requests, or a number of them per second."""

    least: float
    per_second: bool

    def __str__(self) -> str:
        return f"{self.least:g}/s" if self.per_second else f"{self.least * 100:g}%"

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Read `95%`, `0.95` or `4/s`.

        Raises:
            ValueError: It is none of these.
        """
        number, per_second = text.removesuffix("/s"), text.endswith("/s")
        try:
            least = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        except ValueError:
            least = -1.0
        most = math.inf if per_second else 1.0
        if not 0 <= least <= most or (per_second and "%" in number):
            msg = f"{text!r} is no goodput; give a share as 95% or 0.95, or a rate as 4/s"
            raise ValueError(msg)
        return cls(least, per_second)

    def is_met(self, found: dict[str, Any]) -> bool:
        """Whether what `judge` found is enough."""
        value = found["requests_per_s"] if self.per_second else found["share"]
        return value is not None and value >= self.least
