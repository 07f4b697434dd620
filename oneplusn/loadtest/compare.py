"""Compare reports of loads: the ratio of every figure, and whether it could be chance."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oneplusn.loadtest.bootstrap import (
    BLOCKS,
    CONFIDENCE,
    Blocks,
    Ratio,
    cut,
    mean_ratio,
    percentile_ratio,
)
from oneplusn.loadtest.document import Block, Charts, Heading, Table, Text, markdown, save, shown
from oneplusn.loadtest.drive import Record
from oneplusn.loadtest.figures import TIMES
from oneplusn.loadtest.mistake import Mistake
from oneplusn.loadtest.saved import Run, common, differences, read_run
from oneplusn.loadtest.timeline import distributions

PAIRED_SHARE = 0.9
"""Of the requests of the larger load, that both have answered, from which on they are paired."""

THROUGHPUT = "output_throughput_while_sending"
LABELS = {"ttft": "TTFT", "itl": "inter-token", "tpot": "TPOT", "e2el": "end to end"}
PERCENTS = {"p50": 50, "p90": 90, "p99": 99}
COMPARED = (
    *(("ttft", kind) for kind in ("mean", "p50", "p90", "p99")),
    *(("itl", kind) for kind in ("mean", "p50", "p99")),
    ("tpot", "mean"),
    *(("e2el", kind) for kind in ("mean", "p50", "p99")),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of two runs, more of which is better or worse.

    Attributes:
        least: Share by which it has to differ to be called different.
    """

    name: str
    found: Ratio
    least: float
    more_is_better: bool = False

    @property
    def verdict(self) -> str:
        """What can be said of it."""
        if self.found.low is None:
            return "too few to tell"
        if not self.found.differs(self.least):
            return "no difference"
        return "better" if (self.found.ratio > 1) == self.more_is_better else "worse"

    @property
    def content(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = self.found
        return {
            "figure": self.name,
            "first": found.first,
            "second": found.second,
            "ratio": found.ratio,
            "low": found.low,
            "high": found.high,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run beside the first.

    Attributes:
        paired: How many requests both have, if they are compared in pairs; 0 if they are not.
    """

    first: Run
    second: Run
    paired: int
    figures: Sequence[Figure]


def run(args: argparse.Namespace) -> int:
    """Run `oneplusn loadtest compare`; return the exit status."""
    if len(args.reports) < 2:
        raise Mistake(f"{args.reports[0]} alone cannot be compared; give two reports or more")
    first, *others = runs = [read_run(path) for path in args.reports]
    for other in others:
        if (differing := differences(first, other)) and not args.force:
            raise Mistake(
                f"{first.name} and {other.name} are of different loads: {'; '.join(differing)}. "
                "--force compares them nevertheless"
            )
    compared = [compare(first, other, args.least) for other in others]
    title = f"Loads compared with {first.name}"
    blocks = list(_blocks(runs, compared))
    if args.out:
        content = [
            {"name": found.second.name, "paired": found.paired, "figures": _contents(found)}
            for found in compared
        ]
        save(args.out / "compare", title, blocks, {"first": first.name, "others": content})
    print(markdown(title, blocks))
    return 0


def compare(first: Run, second: Run, least: float) -> Comparison:
    """Return every figure of the second run over that of the first."""
    if first.records is None or second.records is None:
        return Comparison(first, second, 0, list(_reported(first, second, least)))
    both = common(first, second, share=PAIRED_SHARE)
    sides = [
        [r for r in run.counted if both is None or r.planned.index in both]
        for run in (first, second)
    ]
    figures = list[Figure]()
    throughput = mean_ratio(_tokens(first), _tokens(second), paired=False)
    if throughput is not None:
        figures.append(Figure("output tokens/s", throughput, least, more_is_better=True))
    for name, kind in COMPARED:
        one, other = (_times(records, name) for records in sides)
        ratio = (
            mean_ratio(one, other, paired=both is not None)
            if kind == "mean"
            else percentile_ratio(one, other, PERCENTS[kind], paired=both is not None)
        )
        if ratio is not None:
            figures.append(Figure(f"{LABELS[name]} {kind}, ms", ratio, least))
    return Comparison(first, second, len(both or ()), figures)


def _reported(first: Run, second: Run, least: float) -> Iterator[Figure]:
    """Yield what the reports say, where requests were not kept: ratios without confidence."""
    keys = {f"{kind}_{name}_ms": f"{LABELS[name]} {kind}, ms" for name, kind in COMPARED}
    for key, label in {THROUGHPUT: "output tokens/s", **keys}.items():
        one, other = first.report[key], second.report[key]
        if one and other:
            yield Figure(label, Ratio(one, other), least, more_is_better=key == THROUGHPUT)


def _times(records: Sequence[Record], name: str) -> Blocks:
    """Return one kind of time, by blocks of neighbouring requests."""
    answers = [record.answer for record in records if record.answer is not None]
    take = TIMES[name]
    return [
        np.array([value for answer in answers[block] for value in take(answer)])
        for block in cut(len(answers))
    ]


def _tokens(run: Run) -> Blocks:
    """Return tokens per second of stretches between the warm-up and the end of sending."""
    seconds = run.report["sending_seconds"]
    found = np.zeros(BLOCKS)
    for record in run.records or ():
        if (answer := record.answer) is None:
            continue
        for when in answer.times:
            if 0 <= when < seconds:
                found[int(when / seconds * BLOCKS)] += answer.tokens / len(answer.times)
    return list((found * BLOCKS / max(seconds, 1e-9)).reshape(BLOCKS, 1))


def _contents(found: Comparison) -> list[dict[str, Any]]:
    return [figure.content for figure in found.figures]


def _blocks(runs: Sequence[Run], compared: Sequence[Comparison]) -> Iterator[Block]:
    for found in compared:
        yield from _comparison(found)
    kept = {run.name: run.counted for run in runs if run.records is not None}
    yield Charts(distributions(kept))
    yield Heading("Of what to be careful")
    yield Text(
        f"An interval holds the ratio with {CONFIDENCE:.0%} confidence, by what differed within "
        "the loads; a difference of less than --least is called none. It knows nothing of what "
        "changed between them, as the machine's clock or its neighbours: measure the first once "
        "more after the others, and compare it with itself."
    )
    for run in runs:
        yield from (Text(f"{run.name}: {line}.") for line in run.report["warnings"])


def _comparison(found: Comparison) -> Iterator[Block]:
    first, second = found.first, found.second
    yield Heading(f"{second.name} over {first.name}")
    if differing := differences(first, second):
        yield Text(f"{'; '.join(differing)}.", alarm="Different loads")
    if first.records is None or second.records is None:
        yield Text("Without the requests.jsonl of both, nothing can be said of confidence.")
    elif found.paired:
        yield Text(f"Paired: {found.paired} requests that were sent in both.")
    else:
        yield Text("Not paired: other requests were sent, or too few of the same.")
    rows = [
        [
            figure.name,
            shown(figure.found.first),
            shown(figure.found.second),
            f"{figure.found.ratio:.3f}x",
            _interval(figure.found),
            figure.verdict,
        ]
        for figure in found.figures
    ]
    yield Table(["", "first", "second", "ratio", "interval", ""], rows)
    failed = [str(run.report["failed"]) for run in (first, second)]
    yield Text(f"Failed requests: {' and '.join(failed)}.")


def _interval(found: Ratio) -> str:
    if found.low is None or found.high is None:
        return "-"
    return f"{found.low:.3f} to {found.high:.3f}"
