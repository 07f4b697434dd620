"""Flip an adapter between two versions under load, and measure what everybody notices.

    python -m oneplusn.loadtest.swap --threads 2

Serves the benchmark's random model with 16 adapters of 17 MB. While streams run on all of them, one
flips between two versions, whose pages come and go; every answer must be wholly of the version that
it names. The others' inter-token times are compared with a run without swaps, in pairs. Then
versions that were never seen before are uploaded at a part of the load that the server can take.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Literal

from oneplusn.loadtest import marked
from oneplusn.loadtest.churn import Churn, Package
from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.drive import Driver, Limits, Outcome
from oneplusn.loadtest.figures import answered, swaps
from oneplusn.loadtest.fixtures import SHAPES, adapter_memory, kept
from oneplusn.loadtest.load import Composer
from oneplusn.loadtest.options import benchmark
from oneplusn.loadtest.processes import ChildFailed, named, python, run_json, serving
from oneplusn.loadtest.prompts import Words
from oneplusn.loadtest.report import machine
from oneplusn.loadtest.stats import percentile
from oneplusn.loadtest.storm import Ledger, new_versions
from oneplusn.loadtest.stream import LoadFailed
from oneplusn.loadtest.swap_report import Findings, Pair, as_json, render
from oneplusn.loadtest.transport import Server, reach
from oneplusn.loadtest.workload import Length, Popularity, Workload

ROUTE = DIALECTS["completions"]
LOAD_SHARE = 0.8
WARMUP_S = 2.0
BUILD_LIMIT_S = 600.0
ANSWER_LIMIT_S = 120.0
FIRST_PROMPT_WORD = 1000
PROMPT_WORDS = 4096
PER_FLIPPED = 3
"""Requests to other adapters between two to the one that is flipped."""


@dataclass(slots=True)
class Storm:
    """The server under test, and the load on it."""

    options: argparse.Namespace
    server: Server
    packages: list[Package]
    ledger: Ledger
    findings: Findings

    @property
    def words(self) -> dict[str, str]:
        """Content of an upload -> the word it says."""
        return {p.content: marked.word(index) for index, p in enumerate(self.packages)}

    def composer(self, number: int, rate: float | None) -> Composer:
        """Draw the load of a run: mostly the others, each in turn, the flipped one between them.

        The two runs of a pair are equal but for their texts, which a prefix cache would know.
        Lengths differ, or all streams would begin at once and wait for each other's prompts.
        """
        others, tasks = marked.others(self.options.adapters), list[str]()
        for start in range(0, len(others), PER_FLIPPED):
            tasks += [marked.FLIPPED, *others[start : start + PER_FLIPPED]]
        prompt, output = self.options.prompt, self.options.output
        workload = Workload(
            tasks=tuple(tasks),
            popularity=Popularity("distinct"),
            input_tokens=Length(prompt, prompt),
            output_tokens=Length(output - output // 2, output + output // 2),
            rate=rate,
            seed=number // 2,
        )
        rng = random.Random(number)
        known = range(FIRST_PROMPT_WORD, FIRST_PROMPT_WORD + PROMPT_WORDS)
        ids = (index % SHAPES[self.options.model].vocab for index in rng.sample(known, len(known)))
        words = Words({f"t{index}": 1 for index in ids}, 0, rng)
        return Composer(self.server, ROUTE, words, workload, {})

    async def load(self, number: int, seconds: float, rate: float | None, churn: Churn) -> Outcome:
        """Send a load, swap meanwhile, and check every answer."""
        composer = self.composer(number, rate)
        limits = Limits(seconds, None, WARMUP_S, ANSWER_LIMIT_S)
        driver = Driver(self.server, ROUTE, composer, limits, keep_text=True)
        async with asyncio.TaskGroup() as beside:
            churn.ask = composer.probe
            beside.create_task(churn.run(delay=WARMUP_S))
            if rate is None:
                await driver.run_closed(composer.workload.requests(), self.options.streams)
            else:
                schedule = composer.workload.schedule(
                    duration=seconds, requests=None, warmup=WARMUP_S
                )
                await driver.run_open(schedule)
            churn.halted.set()
        self._check(driver.outcome, churn)
        return driver.outcome

    def _check(self, outcome: Outcome, churn: Churn) -> None:
        self.ledger.learn(churn.swaps, self.words)
        failures = (swap.failure for swap in churn.swaps if swap.failure is not None)
        self.findings.faults += [f"swap: {failure}" for failure in failures]
        self.findings.faults += self.ledger.check(outcome.records)
        self.findings.requests += len(outcome.records)

    def churn(
        self,
        packages: Iterator[Package],
        per_second: float,
        how: Literal["upload", "activate", "ask"],
    ) -> Churn:
        """Prepare swaps: new uploads, with one version there, or flips between all of them."""
        churn = Churn(self.server, ROUTE, marked.FLIPPED, packages, per_second, ANSWER_LIMIT_S)
        churn.how = how
        churn.prepare(1 if how == "upload" else len(self.packages))
        self.ledger.learn(churn.swaps, self.words)
        return churn

    def run_pair(self, number: int) -> None:
        """Compare the others' times with and without swaps; which comes first alternates."""
        options = self.options
        seconds = options.flips / options.pairs / options.swaps_per_s
        runs, flips = dict[bool, Outcome](), 0
        for swapping in (False, True) if number % 2 else (True, False):
            # Who looks for the new version is load too, so the quiet run asks as often.
            how: Literal["activate", "ask"] = "activate" if swapping else "ask"
            churn = self.churn(cycle(self.packages), options.swaps_per_s, how)
            runs[swapping] = asyncio.run(self.load(2 * number + swapping, seconds, None, churn))
            if swapping:
                flips = sum(swap.version is not None for swap in churn.measured)
        pair = Pair(_others_itl_ms(runs[False]), _others_itl_ms(runs[True]), flips)
        self.findings.pairs.append(pair)
        self.findings.capacity.append(len(answered(runs[False].counted)) / seconds)

    def run_uploads(self) -> None:
        """Upload versions that were never seen, while the server has a part of its load."""
        options = self.options
        rate = LOAD_SHARE * statistics.median(self.findings.capacity)
        churn = self.churn(new_versions(self.packages), options.swaps_per_s, "upload")
        seconds = options.uploads / options.swaps_per_s
        outcome = asyncio.run(self.load(2 * options.pairs, seconds, rate, churn))
        self.findings.uploads = {"request_rate": rate, **swaps(churn, outcome)}


def main() -> int:
    """Run the benchmark; return the exit status: 1 if a target was missed."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        findings = run(options)
    except (ChildFailed, LoadFailed) as error:
        print(f"swap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("swap: interrupted", file=sys.stderr)
        return 130
    print(render(findings))
    if options.json:
        options.json.write_text(json.dumps(as_json(findings), indent=1), encoding="utf-8")
    return 1 if findings.missed else 0


def _options() -> argparse.Namespace:
    parser = benchmark("swap", __doc__, tokens=32, quick="a tiny model and a few flips")
    parser.add_argument("--adapters", type=int, default=16, help="resident (16)")
    parser.add_argument("--streams", type=int, default=16, help="at once (16)")
    parser.add_argument("--flips", type=int, default=200, help="over all pairs (200)")
    parser.add_argument("--pairs", type=int, default=5, help="runs with and without swaps (5)")
    parser.add_argument("--uploads", type=int, default=40, help="of new versions (40)")
    parser.add_argument("--swaps-per-s", type=float, default=1.0, help="(1)")
    options = parser.parse_args()
    if options.quick:
        few = {"flips": 4, "pairs": 1, "uploads": 2, "swaps_per_s": 2.0}
        vars(options).update(few, model="tiny", adapters=4, streams=4, output=8)
    positive = (
        options.threads,
        options.streams,
        options.prompt,
        options.pairs,
        options.swaps_per_s,
    )
    if min(*positive, options.flips, options.uploads) <= 0:
        parser.error("every number is above 0")
    if options.adapters < 2 or options.output < 2:
        parser.error("--adapters and --output are 2 or more")
    return options


def run(options: argparse.Namespace) -> Findings:
    """Measure everything that was asked for."""
    with kept(options.cache) as folder, tempfile.TemporaryDirectory() as data:
        fixtures = folder / f"marked-{options.model}-{options.adapters}"
        _say(f"building {fixtures}")
        build = [str(fixtures), "--model", options.model, "--adapters", str(options.adapters)]
        command = python("oneplusn.loadtest.marked", *build)
        run_json(command, threads=options.threads, limit_s=BUILD_LIMIT_S)
        _say("starting the server")
        with serving(_arguments(options, fixtures, data), threads=options.threads) as address:
            storm = _storm(options, fixtures, reach(address))
            for number in range(options.pairs):
                storm.run_pair(number)
                pair = storm.findings.pairs[-1]
                _say(f"pair {number + 1}: others' inter-token p99 at {pair.ratio:.2f}x")
            storm.run_uploads()
    return storm.findings


def _storm(options: argparse.Namespace, fixtures: Path, server: Server) -> Storm:
    names = ("model", "adapters", "streams", "prompt", "output", "flips", "swaps_per_s", "threads")
    packages = [Package.read(marked.FLIPPED, fixtures / name) for name in marked.VERSIONS]
    first = len(packages)
    fixed = {
        name: marked.word(first + index)
        for index, name in enumerate(marked.others(options.adapters))
    }
    setting = {name: getattr(options, name) for name in names}
    setting["upload_bytes"] = len(packages[0].body)
    return Storm(options, server, packages, Ledger(fixed), Findings(setting, machine()))


def _arguments(options: argparse.Namespace, fixtures: Path, data: str) -> list[str]:
    """Return the options of a server with the base and the other adapters, and room for all."""
    folders = {name: fixtures / name for name in marked.others(options.adapters)}
    room = adapter_memory(fixtures / name for name in marked.names(options.adapters))
    return [
        *("--model", str(fixtures / "base"), "--served-model-name", "base", "--data", data),
        *(*room, *named(folders, "--adapter")),
    ]


def _others_itl_ms(outcome: Outcome) -> float:
    """Return the p99 of inter-token times of requests to adapters that stayed as they are."""
    others = [i for i in answered(outcome.counted) if i.record.planned.task != marked.FLIPPED]
    return percentile((gap * 1e3 for item in others for gap in item.answer.gaps_s), 99)


def _say(line: str) -> None:
    print(f"swap: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
