"""Measure one load: find the server, send, and put down what came of it."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import platform
import signal
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from oneplusn.loadtest import progress
from oneplusn.loadtest.caveats import caveats
from oneplusn.loadtest.churn import Churn, Package
from oneplusn.loadtest.crew import Crew
from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.discover import Inquiry
from oneplusn.loadtest.drive import Limits, Outcome
from oneplusn.loadtest.figures import by_task, errors, figures, swaps
from oneplusn.loadtest.job import Job, Sender
from oneplusn.loadtest.processes import ChildFailed
from oneplusn.loadtest.prompts import Line, Vocabulary, read_lines
from oneplusn.loadtest.report import cpu_model
from oneplusn.loadtest.transport import Server, raise_open_files, reach
from oneplusn.loadtest.workload import Workload

EXIT_FAILED = 1
EXIT_SLOW = 3
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of a server before it is loaded.

    Attributes:
        tasks: Whom to ask.
        lines: Prompts of a file.
        churn: What replaces an adapter meanwhile, its first version uploaded.
    """

    server: Server
    tasks: tuple[str, ...]
    vocabulary: Vocabulary
    lines: tuple[Line, ...]
    environment: dict[str, Any]
    churn: Churn | None = None


def find(args: argparse.Namespace, vocabulary: Vocabulary | None = None) -> Target:
    """Find the server, its tasks and its tokens, and upload what will be replaced.

    Args:
        args: Options of a load or a sweep, checked.
        vocabulary: Words of texts and what they cost; the server is asked if None.

    Raises:
        Mistake: It lists no task, or the file of prompts cannot be read.
        LoadFailed: It cannot be reached, or refuses the adapter that will change.
        httpx.HTTPError: It does not answer as HTTP has it.
    """
    raise_open_files()
    server = reach(args.url, args.api_key)
    lines = read_lines(args.prompts, chat=args.endpoint == "chat") if args.prompts else ()
    with Inquiry(args.url, args.api_key) as inquiry:
        environment = _environment(args.url, inquiry.description())
        churn = _churn(args, server)
        tasks = args.tasks or inquiry.tasks()
        if vocabulary is None:
            count = inquiry.count(tasks[0])
            vocabulary = Vocabulary() if count is None else Vocabulary.counted(count)
    return Target(server, tasks, vocabulary, tuple(lines), environment, churn)


def _churn(args: argparse.Namespace, server: Server) -> Churn | None:
    """Upload the first version of the adapter that will change, so that it is listed."""
    if args.churn is None:
        return None
    name, folders = args.churn_adapter
    packages = [Package.read(name, folder) for folder in folders]
    dialect = DIALECTS[args.endpoint]
    churn = Churn(server, dialect, name, cycle(packages), args.churn, args.timeout)
    churn.prepare()
    return churn


def plan(args: argparse.Namespace, target: Target) -> Job:
    """Return the load that the options describe."""
    return Job(
        server=target.server,
        endpoint=args.endpoint,
        vocabulary=target.vocabulary,
        workload=Workload(
            tasks=target.tasks,
            popularity=args.popularity,
            input_tokens=args.input_tokens,
            output_tokens=args.output_tokens,
            rate=args.rate,
            seed=args.seed,
            lines=target.lines,
            burstiness=args.burstiness or 1.0,
            ramp_to=args.ramp_to,
        ),
        limits=Limits(args.duration, args.num_requests, args.warmup, args.timeout, args.retries),
        concurrency=args.concurrency,
        extra=args.extra_body,
    )


def measure(
    args: argparse.Namespace, target: Target, *, label: str = ""
) -> tuple[dict[str, Any], Outcome]:
    """Send a load; return its report, and all that was measured.

    Raises:
        ChildFailed: A client process died.
    """
    job = plan(args, target)
    if target.churn is not None:
        target.churn.ask = job.composer.probe
    outcome = asyncio.run(_send(args, job, target.churn, label))
    return _describe(args, target, job.workload, outcome), outcome


async def _send(args: argparse.Namespace, job: Job, churn: Churn | None, label: str) -> Outcome:
    """Send the load. The first Ctrl-C ends it, a second one ends the program."""
    sender = Sender(job) if args.processes == 1 else Crew(job, args.processes)
    loop = asyncio.get_running_loop()

    def interrupt(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        sender.halt()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)
    look = progress.show(lambda: sender.counts, job.limits, label=label, quiet=args.quiet)
    try:
        async with asyncio.TaskGroup() as beside:
            shown = beside.create_task(look)
            if churn is not None:
                beside.create_task(churn.run(delay=args.warmup))
            await asyncio.sleep(0)  # they get ready before the clock runs
            try:
                return await sender.run()
            finally:
                shown.cancel()
                if churn is not None:
                    churn.halted.set()
    except* ChildFailed as group:
        raise group.exceptions[0] from None


def status(args: argparse.Namespace, report: dict[str, Any]) -> int:
    """Return the exit status that a load deserves; a bound on goodput decides alone."""
    if report["interrupted"]:
        return EXIT_INTERRUPTED
    if args.min_goodput is not None:
        return 0 if args.min_goodput.is_met(report["slo"]) else EXIT_SLOW
    churned = report["churn"] or {"failed": 0}
    return EXIT_FAILED if report["failed"] or churned["failed"] else 0


def _describe(
    args: argparse.Namespace, target: Target, workload: Workload, outcome: Outcome
) -> dict[str, Any]:
    """Return the whole report."""
    found = figures(outcome, args.slo)
    backend = DIALECTS[args.endpoint].backend
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": None,
        "model_id": workload.tasks[0],
        "tokenizer_id": None,
        "num_prompts": len(outcome.counted),
        "request_rate": workload.rate or "inf",
        "burstiness": workload.burstiness,
        "max_concurrency": args.concurrency,
        "seed": workload.seed,
        "workload": _workload(args, workload),
        "arguments": _arguments(args),
        **found,
        "tasks": by_task(outcome, args.slo),
        "errors": errors(record.failure for record in outcome.counted),
        "churn": None if target.churn is None else swaps(target.churn, outcome),
        "warnings": caveats(found),
        "environment": target.environment,
    }


def _workload(args: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    """Return what two loads have in common whose figures can be compared."""
    return {
        "endpoint": args.endpoint,
        "tasks": list(workload.tasks),
        "popularity": str(workload.popularity),
        "input tokens": str(workload.input_tokens),
        "output tokens": str(workload.output_tokens),
        "prompts": _digest(workload.lines),
        "extra body": args.extra_body,
        "rate": workload.rate,
        "burstiness": workload.rate and workload.burstiness,
        "ramp to": workload.ramp_to,
        "clients": args.concurrency,
        "swaps per second": args.churn,
    }


def _digest(lines: tuple[Line, ...]) -> str | None:
    """Tell files of prompts apart; None without one."""
    return hashlib.sha256(repr(lines).encode()).hexdigest()[:16] if lines else None


def _arguments(args: argparse.Namespace) -> dict[str, str]:
    """Return what was asked for, without the key."""
    names = {*vars(args)} - {"api_key", "command", "verb"}
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
