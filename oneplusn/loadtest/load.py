"""Load a server over HTTP and measure it: any server that speaks OpenAI's routes."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx

from oneplusn.loadtest import load_report, options, progress
from oneplusn.loadtest.churn import Churn, Package
from oneplusn.loadtest.dialects import DIALECTS, Dialect
from oneplusn.loadtest.discover import Inquiry, NothingToAsk
from oneplusn.loadtest.drive import Driver, Limits, Outcome
from oneplusn.loadtest.figures import by_task, errors, figures, swaps, warnings
from oneplusn.loadtest.prompts import Line, PromptFileWrong, Words, known_words, read_lines
from oneplusn.loadtest.report import cpu_model
from oneplusn.loadtest.stream import LoadFailed
from oneplusn.loadtest.transport import Server, raise_open_files, reach
from oneplusn.loadtest.workload import Planned, Workload

EXIT_FAILED = 1
EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
PROBE_INPUT_TOKENS = 8
PROBE_OUTPUT_TOKENS = 1

declare = options.declare
EXAMPLES = options.EXAMPLES


@dataclass(frozen=True, slots=True)
class Composer:
    """Makes the bytes of requests."""

    server: Server
    dialect: Dialect
    words: Words
    workload: Workload
    extra: dict[str, Any]

    def __call__(self, planned: Planned) -> bytes:
        """Return one request; its text follows from the seed and its place in the load."""
        prompt = planned.prompt
        if prompt is None:
            rng = self.workload.generator(f"text {planned.index}")
            prompt = self.words.text(planned.input_tokens, rng)
        body = self.dialect.body(planned.task, prompt, planned.output_tokens)
        return self.server.post(self.dialect.path, json.dumps({**body, **self.extra}).encode())

    def probe(self, task: str) -> bytes:
        """Return a short request to a task, with a text that nobody sent before."""
        at_random = time.perf_counter_ns()
        return self(Planned(at_random, 0.0, task, PROBE_INPUT_TOKENS, PROBE_OUTPUT_TOKENS))


@dataclass(slots=True)
class Load:
    """Everything that is known before the first request is sent."""

    args: argparse.Namespace
    composer: Composer
    churn: Churn | None
    environment: dict[str, Any]

    @property
    def limits(self) -> Limits:
        """When it ends."""
        args = self.args
        return Limits(args.duration, args.num_requests, args.warmup, args.timeout, args.retries)


def run(args: argparse.Namespace) -> int:
    """Run `oneplusn loadtest`; return the exit status."""
    try:
        options.check(args)
        load = _prepare(args)
    except (
        options.Mistake,
        PromptFileWrong,
        NothingToAsk,
        LoadFailed,
        OSError,
        httpx.HTTPError,
    ) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return EXIT_MISTAKE
    outcome = asyncio.run(drive(load))
    report = describe(load, outcome)
    print(load_report.render(report))
    if args.out:
        load_report.write(args.out, report, outcome)
    if outcome.interrupted:
        return EXIT_INTERRUPTED
    churned = report["churn"] or {"failed": 0}
    return EXIT_FAILED if report["failed"] or churned["failed"] else 0


def _prepare(args: argparse.Namespace) -> Load:
    """Find the server, its tasks and its tokens, and upload what will be replaced."""
    raise_open_files()
    server = reach(args.url, args.api_key)
    dialect = DIALECTS[args.endpoint]
    lines: Iterable[Line] = ()
    if args.prompts:
        lines = read_lines(args.prompts, chat=args.endpoint == "chat")
    with Inquiry(args.url, args.api_key) as inquiry:
        environment = _environment(args.url, inquiry.description())
        churn = _churn(args, server, dialect)
        tasks = args.tasks or inquiry.tasks()
        workload = Workload(
            tasks=tasks,
            popularity=args.popularity,
            input_tokens=args.input_tokens,
            output_tokens=args.output_tokens,
            rate=args.rate,
            seed=args.seed,
            lines=tuple(lines),
        )
        words = known_words(inquiry.count(tasks[0]), workload.generator("words"))
    composer = Composer(server, dialect, words, workload, args.extra_body)
    if churn is not None:
        churn.ask = composer.probe
    return Load(args, composer, churn, environment)


def _churn(args: argparse.Namespace, server: Server, dialect: Dialect) -> Churn | None:
    """Upload the first version of the adapter that will change, so that it is listed."""
    if args.churn is None:
        return None
    name, folders = args.churn_adapter
    packages = [Package.read(name, folder) for folder in folders]
    churn = Churn(server, dialect, name, cycle(packages), args.churn, args.timeout)
    churn.prepare()
    return churn


async def drive(load: Load) -> Outcome:
    """Send the load. The first Ctrl-C ends it, a second one ends the program."""
    args = load.args
    driver = Driver(load.composer.server, load.composer.dialect, load.composer, load.limits)
    loop = asyncio.get_running_loop()

    def interrupt(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        driver.halt()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)
    async with asyncio.TaskGroup() as beside:
        shown = beside.create_task(progress.show(driver, quiet=args.quiet))
        if load.churn is not None:
            beside.create_task(load.churn.run(delay=args.warmup))
        await asyncio.sleep(0)  # they get ready before the clock runs
        try:
            return await _send(driver, load)
        finally:
            shown.cancel()
            if load.churn is not None:
                load.churn.halted.set()


async def _send(driver: Driver, load: Load) -> Outcome:
    args, workload = load.args, load.composer.workload
    if args.rate is None:
        return await driver.run_closed(workload.requests(), args.concurrency)
    schedule = workload.schedule(
        duration=args.duration, requests=args.num_requests, warmup=args.warmup
    )
    return await driver.run_open(schedule)


def describe(load: Load, outcome: Outcome) -> dict[str, Any]:
    """Return the whole report."""
    args, workload = load.args, load.composer.workload
    found = figures(outcome)
    failures = (record.failure for record in outcome.counted)
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": load.composer.dialect.backend,
        "backend": load.composer.dialect.backend,
        "label": None,
        "model_id": workload.tasks[0],
        "tokenizer_id": None,
        "num_prompts": len(outcome.counted),
        "request_rate": args.rate or "inf",
        "burstiness": 1.0,
        "max_concurrency": args.concurrency,
        "popularity": str(workload.popularity),
        "input_tokens": str(workload.input_tokens),
        "output_tokens": str(workload.output_tokens),
        "seed": workload.seed,
        "arguments": _arguments(args),
        **found,
        "tasks": by_task(outcome),
        "errors": errors(failures),
        "churn": None if load.churn is None else swaps(load.churn, outcome),
        "warnings": warnings(found),
        "environment": load.environment,
    }


def _arguments(args: argparse.Namespace) -> dict[str, str]:
    """Return what was asked for, without the key."""
    names = {*vars(args)} - {"api_key", "command"}
    return {
        name: str(value) for name in sorted(names) if (value := getattr(args, name)) is not None
    }


def _environment(url: str, server: dict[str, Any]) -> dict[str, Any]:
    """Describe the machine of the client, and what the server tells of itself."""
    return {
        "url": url,
        "cpu": cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "server": server,
    }
