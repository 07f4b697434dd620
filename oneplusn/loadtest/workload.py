"""What a load consists of: when each request is due, whom it asks, how long it is.

Everything follows from one seed. Times, tasks, lengths and texts are drawn from generators of their
own, so that two loads that differ in one of them are equal in the others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, repeat, takewhile

from oneplusn.loadtest.dialects import Prompt
from oneplusn.loadtest.prompts import Line

POPULARITIES = ("identical", "uniform", "distinct", "zipf:S")
LENGTHS = ("N", "uniform:LOW-HIGH", "lognormal:MEDIAN,SIGMA,MOST")


@dataclass(frozen=True, slots=True)
class Planned:
    """One request of a load.

    Attributes:
        index: Its place in the load, and the seed of its text.
        at: Seconds after the start when it is due; 0 in a closed loop.
        task: The model, task or adapter that it asks.
        input_tokens: Tokens of the text that is made for it; 0 if a file brings the text.
        prompt: What a file brings; None if a text is made.
    """

    index: int
    at: float
    task: str
    input_tokens: int
    output_tokens: int
    prompt: Prompt | None = None


@dataclass(frozen=True, slots=True)
class Length:
    """A number of tokens, or a distribution of it.

    Attributes:
        low: The smallest, or the median of a lognormal.
        high: The largest.
        sigma: Standard deviation of the logarithm; None for a uniform distribution.
    """

    low: int
    high: int
    sigma: float | None = None

    def __str__(self) -> str:
        if self.sigma is not None:
            return f"lognormal:{self.low},{self.sigma:g},{self.high}"
        return f"{self.low}" if self.low == self.high else f"uniform:{self.low}-{self.high}"

    @classmethod
    def parse(cls, text: str) -> Length:
        """Read `64`, `uniform:32-128` or `lognormal:64,0.8,512`.

        Raises:
            ValueError: It is none of these, or has no value of 1 or more.
        """
        kind, _, rest = text.rpartition(":")
        try:
            length = _LENGTHS[kind](*re.split("[,-]", rest))
        except (KeyError, TypeError, ValueError):
            msg = f"{text!r} is no length; give one of {', '.join(LENGTHS)}"
            raise ValueError(msg) from None
        if not 1 <= length.low <= length.high or (length.sigma or 0) < 0:
            msg = f"{text!r} has no length of 1 or more tokens in order"
            raise ValueError(msg)
        return length

    def draw(self, rng: random.Random) -> int:
        """Return one length."""
        if self.sigma is None:
            return rng.randint(self.low, self.high)
        drawn = round(self.low * rng.lognormvariate(0.0, self.sigma))
        return min(max(drawn, 1), self.high)


_LENGTHS: dict[str, Callable[..., Length]] = {
    "": lambda count: Length(int(count), int(count)),
    "uniform": lambda low, high: Length(int(low), int(high)),
    "lognormal": lambda median, sigma, most: Length(int(median), int(most), float(sigma)),
}


@dataclass(frozen=True, slots=True)
class Popularity:
    """Whom requests ask.

    Attributes:
        kind: `identical` asks the first task, `uniform` any, `distinct` one after the other so that
            neighbours differ, `zipf` the i-th with a share of i ** -exponent.
    """

    kind: str
    exponent: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind}:{self.exponent:g}" if self.kind == "zipf" else self.kind

    @classmethod
    def parse(cls, text: str) -> Popularity:
        """Read `identical`, `uniform`, `distinct` or `zipf:1.1`.

        Raises:
            ValueError: It is none of these.
        """
        kind, _, exponent = text.partition(":")
        try:
            if kind == "zipf" and float(exponent) >= 0:
                return cls(kind, float(exponent))
        except ValueError:
            pass
        if text not in POPULARITIES[:3]:
            msg = f"{text!r} is no popularity; give one of {', '.join(POPULARITIES)}"
            raise ValueError(msg)
        return cls(text)

    def draws(self, tasks: Sequence[str], rng: random.Random) -> Iterator[str]:
        """Yield tasks without end."""
        if self.kind == "identical":
            yield from repeat(tasks[0])
        if self.kind == "distinct":
            yield from cycle(tasks)
        shares = [rank**-self.exponent for rank in range(1, len(tasks) + 1)]
        bounds = list(accumulate(shares))
        while True:
            (task,) = rng.choices(tasks, cum_weights=bounds)
            yield task


@dataclass(frozen=True, slots=True)
class Workload:
    """What requests are like, but for their texts.

    Attributes:
        rate: Requests per second of an open loop; None for a closed one.
        lines: Prompts from a file, drawn one after the other in an order of the seed's.
    """

    tasks: tuple[str, ...]
    popularity: Popularity
    input_tokens: Length
    output_tokens: Length
    rate: float | None
    seed: int
    lines: tuple[Line, ...] = ()

    def requests(self) -> Iterator[Planned]:
        """Yield requests without end."""
        popular = self.popularity.draws(self.tasks, self.generator("tasks"))
        lengths = self.generator("lengths")
        lines = cycle(self.generator("lines").sample(self.lines, len(self.lines)) or [None])
        drawn = zip(self._times(), popular, lines, strict=False)
        for index, (at, task, line) in enumerate(drawn):
            inputs, outputs = self.input_tokens.draw(lengths), self.output_tokens.draw(lengths)
            if line is None:
                yield Planned(index, at, task, inputs, outputs)
            else:
                outputs = line.output_tokens or outputs
                yield Planned(index, at, line.task or task, 0, outputs, line.prompt)

    def schedule(
        self, *, duration: float | None, requests: int | None, warmup: float = 0.0
    ) -> list[Planned]:
        """Return an open loop's requests, all of them known before the first is sent.

        Args:
            duration: Seconds after the warm-up until which requests are due.
            requests: How many are due after the warm-up at most.
            warmup: Seconds before anything counts.
        """
        assert duration is not None or requests is not None
        end = float("inf") if duration is None else warmup + duration
        chosen = list[Planned]()
        counted = 0
        for planned in takewhile(lambda request: request.at < end, self.requests()):
            counted += planned.at >= warmup
            if requests is not None and counted > requests:
                break
            chosen.append(planned)
        return chosen

    def generator(self, name: str) -> random.Random:
        """Return the generator from which one kind of thing is drawn."""
        return random.Random(f"{self.seed} {name}")

    def _times(self) -> Iterator[float]:
        """Yield when requests are due: a Poisson process in an open loop."""
        if self.rate is None:
            yield from repeat(0.0)
            return
        rng, at = self.generator("arrivals"), 0.0
        while True:
            at += rng.expovariate(self.rate)
            yield at
