"""Measure throughput and latency over HTTP, beside other servers and libraries in the same run.

    python -m oneplusn.loadtest.bench --threads 2

Builds a random model and adapters, serves them, and sends every system the same closed loop. Every
part runs in a process of its own, one after the other. With --json a run goes on where it ended.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneplusn.loadtest import bench_options, bench_server
from oneplusn.loadtest.bench_cases import CASES, Work
from oneplusn.loadtest.bench_floors import unexcused, verdicts
from oneplusn.loadtest.bench_results import OtherSetting, Results, Share
from oneplusn.loadtest.fixtures import Fixtures, kept
from oneplusn.loadtest.peers import PEERS
from oneplusn.loadtest.peers.system import Absent, Places, System
from oneplusn.loadtest.processes import ChildFailed, python, run_json
from oneplusn.loadtest.report import machine, render
from oneplusn.loadtest.stream import LoadFailed

BUILD_LIMIT_S = 600.0
EXIT_MISSED, EXIT_UNFINISHED, EXIT_INTERRUPTED = 1, 3, 130


class OutOfTime(Exception):
    """The minutes that this run was given are over."""


def main() -> int:
    """Run the benchmark; return the exit status."""
    options = bench_options.parse(__doc__ or "")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = open_results(options)
        with kept(options.cache) as folder:
            run(results, options, folder)
    except (ChildFailed, LoadFailed, OtherSetting) as error:
        print(f"bench: {error}", file=sys.stderr)
        return EXIT_MISSED
    except OutOfTime:
        print("bench: not finished; run it again to go on", file=sys.stderr)
        return EXIT_UNFINISHED
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    print(render(results))
    missed = [] if options.no_floors else unexcused(verdicts(results))
    for line in missed:
        print(f"bench: missed: {line}", file=sys.stderr)
    own = {bench_server.OURS, bench_server.BARE}
    failed = any(own & found.keys() for found in results.missing.values())
    return EXIT_MISSED if missed or failed else 0


def open_results(options: argparse.Namespace) -> Results:
    """Return what was measured before with these options, or nothing yet.

    Raises:
        OtherSetting: The file holds results of other work, or of another machine.
    """
    names = ("streams", "rounds", "prompt", "output", "repeats", "threads")
    setting: dict[str, Any] = {name: getattr(options, name) for name in names}
    work = _work(options, options.model[0], Path())
    setting["titles"] = {case: work.title(case) for case in CASES}
    if options.json is None:
        return Results(setting, machine())
    return Results.kept(setting, machine(), options.json)


def run(results: Results, options: argparse.Namespace, folder: Path) -> None:
    """Measure everything that was asked for and is not there yet.

    Raises:
        ChildFailed: The models cannot be built.
        OutOfTime: The minutes are over.
    """
    limit = float("inf") if options.minutes is None else options.minutes * 60
    deadline = time.monotonic() + limit
    for model in options.model:
        work = _work(options, model, folder)
        _say(f"building {work.fixtures.folder}")
        build = [str(work.fixtures.folder), "--model", model, "--requests", str(work.streams)]
        command = python("oneplusn.loadtest.fixtures", *build)
        run_json(command, threads=options.threads, limit_s=BUILD_LIMIT_S)
        sink = Timed(Share(results, model), deadline)
        for group, system in systems(results, work, options):
            if group in options.again:
                results.forget(model, system.name)
            _measure(results, work, system, sink)
        if not (options.no_profile or model in results.shares):
            sink.check()
            _say(f"{model}: profiling steps")
            results.shares[model] = bench_server.shares(work)
            results.save()


def _work(options: argparse.Namespace, model: str, folder: Path) -> Work:
    return Work(
        model=model,
        streams=options.streams,
        prompt=options.prompt,
        output=options.output,
        rounds=options.rounds,
        repeats=options.repeats,
        threads=options.threads,
        fixtures=Fixtures(folder / f"{model}-{options.streams}", options.streams),
    )


def systems(
    results: Results, work: Work, options: argparse.Namespace
) -> Iterator[tuple[str, System]]:
    """Yield our server and every peer that is here by its name, and note those that are not."""
    for own in bench_server.systems(work):
        yield bench_server.OURS, own
    scratch = work.fixtures.folder / "peers"
    places = Places(options.environments, options.llama_server, options.vllm, scratch)
    for peer in options.peers:
        try:
            found = PEERS[peer](work, places)
        except Absent as why:
            _say(f"{work.model}: {peer} is absent: {why}")
            results.miss(work.model, peer, str(why))
            continue
        results.missing.get(work.model, {}).pop(peer, None)
        for system in found:
            yield peer, system


def _measure(results: Results, work: Work, system: System, sink: Timed) -> None:
    """Run what a system has not run yet; a failure is noted, and the others go on."""
    cases = [case for case in system.cases if results.lacks(work.model, system.name, case)]
    if not cases:
        return
    sink.check()
    _say(f"{work.model}: starting {system.name}")
    try:
        system.run(cases, sink)
    except (ChildFailed, LoadFailed) as error:
        _say(f"{work.model}: {system.name} failed: {error}")
        results.miss(work.model, system.name, str(error))


@dataclass(frozen=True, slots=True)
class Timed:
    """Takes what systems find, says it, and ends the run when its time is over.

    Attributes:
        deadline: On the clock of `time.monotonic`.
    """

    share: Share
    deadline: float

    def check(self) -> None:
        """Go on only if there is time.

        Raises:
            OutOfTime: There is none.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def row(self, system: str, case: str, figures: Mapping[str, Any]) -> None:
        """Take the figures of one case."""
        self.share.row(system, case, figures)
        _say(f"{self.share.model}: {system}, {case}: {figures['output_throughput']:.1f} tokens/s")

    def server(self, system: str, figures: Mapping[str, Any]) -> None:
        """Take what starting and holding the system cost."""
        self.share.server(system, figures)


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
