"""What a load consists of: when each request is due, whom it asks, how long it is.

Everything follows from one seed. Times, tasks, lengths and texts are drawn from generators of their
own, so that two loads that differ in one of them are equal in the others.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, repeat, takewhile
from typing import Any, Literal

from oneplusn.loadtest.prompts import Line

POPULARITIES = ("identical", "uniform", "distinct", "zipf:S")
LENGTHS = ("N", "uniform:LOW-HIGH", "normal:MEAN,SD,MOST", "lognormal:MEDIAN,SIGMA,MOST")


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
    prompt: str | tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True, slots=True)
class Length:
    """A number of tokens, or a distribution of it.

    Attributes:
        low: The smallest; the mean of a normal distribution, the median of a lognormal.
        high: The largest.
        deviation: Standard deviation: of a normal distribution in tokens, of a lognormal that of
            the logarithm.
    """

    low: int
    high: int
    kind: Literal["uniform", "normal", "lognormal"] = "uniform"
    deviation: float = 0.0

    def __str__(self) -> str:
        if self.kind != "uniform":
            return f"{self.kind}:{self.low},{self.deviation:g},{self.high}"
        return f"{self.low}" if self.low == self.high else f"uniform:{self.low}-{self.high}"

    @classmethod
    def parse(cls, text: str) -> Length:
        """Read `64`, `uniform:32-128`, `normal:128,32,512` or `lognormal:64,0.8,512`.

        Raises:
            ValueError: It is none of these, or has no value of 1 or more.
        """
        kind, _, rest = text.rpartition(":")
        try:
            length = _LENGTHS[kind](*re.split("[,-]", rest))
        except (KeyError, TypeError, ValueError):
            msg = f"{text!r} is no length; give one of {', '.join(LENGTHS)}"
            raise ValueError(msg) from None
        if not (1 <= length.low <= length.high and 0 <= length.deviation < math.inf):
            msg = f"{text!r} has no length of 1 or more tokens in order; give one as in uniform:1-9"
            raise ValueError(msg)
        return length

    def draw(self, rng: random.Random) -> int:
        """Return one length; what a bell draws beyond 1 and the largest is put there."""
        if self.kind == "uniform":
            return rng.randint(self.low, self.high)
        if self.kind == "normal":
            drawn = round(rng.gauss(self.low, self.deviation))
        else:
            drawn = round(self.low * rng.lognormvariate(0.0, self.deviation))
        return min(max(drawn, 1), self.high)


_LENGTHS: dict[str, Callable[..., Length]] = {
    "": lambda count: Length(int(count), int(count)),
    "uniform": lambda low, high: Length(int(low), int(high)),
    "normal": lambda mean, sd, most: Length(int(mean), int(most), "normal", float(sd)),
    "lognormal": lambda mid, sd, most: Length(int(mid), int(most), "lognormal", float(sd)),
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
        burstiness: Shape of the gamma distribution of the gaps between arrivals: 1 for a Poisson
            process, less for bursts, more for an even flow. Their coefficient of variation is
            burstiness ** -0.5.
        ramp_to: What the rate has grown or fallen to at the end; None if it stays.
    """

    tasks: tuple[str, ...]
    popularity: Popularity
    input_tokens: Length
    output_tokens: Length
    rate: float | None
    seed: int
    lines: tuple[Line, ...] = ()
    burstiness: float = 1.0
    ramp_to: float | None = None

    def requests(self) -> Iterator[Planned]:
        """Yield the requests of a closed loop, without end."""
        return self._requests(repeat(0.0))

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
        end = math.inf if duration is None else warmup + duration
        times = takewhile(lambda at: at < end, self._arrivals(warmup, duration))
        chosen = list[Planned]()
        counted = 0
        for planned in self._requests(times):
            counted += planned.at >= warmup
            if requests is not None and counted > requests:
                break
            chosen.append(planned)
        return chosen

    def generator(self, name: str) -> random.Random:
        """Return the generator from which one kind of thing is drawn."""
        return random.Random(f"{self.seed} {name}")

    def _requests(self, times: Iterator[float]) -> Iterator[Planned]:
        popular = self.popularity.draws(self.tasks, self.generator("tasks"))
        lengths = self.generator("lengths")
        lines = cycle(self.generator("lines").sample(self.lines, len(self.lines)) or [Line()])
        for index, (at, task, line) in enumerate(zip(times, popular, lines, strict=False)):
            inputs, outputs = self.input_tokens.draw(lengths), self.output_tokens.draw(lengths)
            inputs = (line.input_tokens or inputs) if line.prompt is None else 0
            outputs = line.output_tokens or outputs
            yield Planned(index, at, line.task or task, inputs, outputs, line.prompt)

    def _arrivals(self, warmup: float, duration: float | None) -> Iterator[float]:
        """Yield when requests are due.

        Gaps of mean 1 are drawn, and added up to the number of requests that the rate lets expect
        by then; so a rate that changes stretches the same gaps.
        """
        assert self.rate is not None
        rng, expected = self.generator("arrivals"), 0.0
        slope = 0.0 if self.ramp_to is None else (self.ramp_to - self.rate) / (duration or math.inf)
        while True:
            expected += rng.gammavariate(self.burstiness, 1 / self.burstiness)
            beyond = expected - self.rate * warmup
            if beyond <= 0:
                yield expected / self.rate
                continue
            # beyond = rate t + slope t^2 / 2, solved for t; a rate that falls may never get there.
            square = self.rate**2 + 2 * slope * beyond
            if square < 0:
                return
            yield warmup + 2 * beyond / (self.rate + math.sqrt(square))
