"""Serve the demo model on a free port, send it all tasks at once over HTTP, show what came back."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http import HTTPStatus

import httpx
from tqdm import tqdm

from oneplusn.demo.tasks import TASKS, examples
from oneplusn.errors import EngineStopped, ServingError

START_TIMEOUT_S = 120.0
CONCURRENCY = 64
SEED = 7
HISTOGRAM = "oneplusn_batch_distinct_tasks_bucket"


@dataclass(frozen=True, slots=True)
class Question:
    """One input, what its task should answer, and whether the bare base is asked instead."""

    task: str
    text: str
    expected: str
    adapted: bool


@dataclass(slots=True)
class Tally:
    """What one task answered so far."""

    right: int = 0
    base_right: int = 0
    sample: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True)
class Row:
    """One task of the result."""

    task: str
    cluster: str
    method: str
    accuracy: float
    base_accuracy: float
    n: int


@dataclass(frozen=True, slots=True)
class Result:
    """What one run measured."""

    tasks: list[Row]
    max_tasks_per_step: int
    requests: int
    seconds: float
    samples: dict[str, tuple[str, str]] = field(default_factory=dict)


def questions(n: int) -> list[Question]:
    """Draw n held-out inputs a task, each asked of the task and of the base, in mixed order."""
    drawn = [
        Question(task, text, expected, adapted)
        for task in TASKS
        for text, expected in examples(task, "heldout", n, SEED)
        for adapted in (True, False)
    ]
    random.Random(SEED).shuffle(drawn)
    return drawn


@contextmanager
def server(threads: int | None) -> Iterator[str]:
    """Run `oneplusn serve` on a free port of this machine; yield its address, then stop it.

    Raises:
        EngineStopped: it ended, or was not ready in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-P", "-m", "oneplusn.cli", "serve", "--model", "demo"]
    command += ["--port", str(port), "--log-level", "warning"]
    command += ["--token-budget", "512"]  # room for the prompts of all tasks in one step
    command += [] if threads is None else ["--threads", str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 - our own command
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, address)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            message = f"the server ended with exit code {process.returncode} before it was ready"
            raise EngineStopped(message)
        try:
            if httpx.get(f"{address}/health/ready").status_code == HTTPStatus.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    message = f"the server was not ready after {START_TIMEOUT_S:.0f} s"
    raise EngineStopped(message)


def check(answer: httpx.Response) -> httpx.Response:
    """Return the answer, or raise what the server said.

    Raises:
        ServingError: with the server's words.
    """
    if answer.is_success:
        return answer
    message = f"{answer.url.path} answered {answer.status_code}: {answer.text[:500]}"
    raise ServingError(message)


async def ask_all(address: str, asked: list[Question], *, quiet: bool) -> dict[str, Tally]:
    """Send every question, CONCURRENCY at a time; count the exact matches."""
    tallies = {task: Tally() for task in TASKS}
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        with tqdm(total=len(asked), unit="request", disable=quiet) as bar:

            async def ask(question: Question) -> None:
                body = {
                    "task": question.task if question.adapted else None,
                    "inputs": question.text,
                    "parameters": {"max_new_tokens": 48, "temperature": 0},
                }
                async with gate:
                    answer = await client.post("/generate", json=body)
                check(answer)
                text = answer.json()["generated_text"]
                tally = tallies[question.task]
                if question.adapted:
                    tally.right += text == question.expected
                    tally.sample = tally.sample if tally.sample[0] else (question.text, text)
                else:
                    tally.base_right += text == question.expected
                bar.update()

            await asyncio.gather(*map(ask, asked))
    return tallies


def most_tasks_in_a_step(metrics: str) -> int:
    """Return the bound of the highest histogram bucket that a step fell into."""
    most, before = 0, 0.0
    for line in metrics.splitlines():
        if line.startswith(HISTOGRAM):
            bound, count = line.split('le="')[1].split('"')[0], float(line.rsplit(" ", 1)[1])
            if count > before and bound != "+Inf":
                most = int(float(bound))
            before = count
    return most


def measure(n: int, *, threads: int | None = None, quiet: bool = False) -> Result:
    """Start a server, ask everything, stop it."""
    asked = questions(n)
    with server(threads) as address:
        methods = {
            entry["name"]: entry["method"]
            for entry in check(httpx.get(f"{address}/v1/tasks")).json()["data"]
        }
        started = time.perf_counter()
        tallies = asyncio.run(ask_all(address, asked, quiet=quiet))
        seconds = time.perf_counter() - started
        most = most_tasks_in_a_step(check(httpx.get(f"{address}/metrics")).text)
    rows = [
        Row(
            task=name,
            cluster=TASKS[name].cluster,
            method=methods[name],
            accuracy=tally.right / n,
            base_accuracy=tally.base_right / n,
            n=n,
        )
        for name, tally in tallies.items()
    ]
    samples = {name: tally.sample for name, tally in tallies.items()}
    return Result(rows, most, len(asked), seconds, samples)


def render(result: Result) -> str:
    """Render the result as a table for a terminal."""
    lines = [
        f"{'task':16}{'cluster':9}{'method':10}{'accuracy':>8}{'base':>7}  example",
        *(
            f"{row.task:16}{row.cluster:9}{row.method:10}{row.accuracy:8.3f}"
            f"{row.base_accuracy:7.3f}  {' -> '.join(result.samples[row.task])}"
            for row in result.tasks
        ),
        "",
        f"{result.requests} requests in {result.seconds:.1f} s; "
        f"up to {result.max_tasks_per_step} tasks (the bare base besides) in one step",
    ]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `oneplusn demo`."""
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("-n", type=int, default=64, help="held-out inputs a task (default 64)")
    parser.add_argument("--threads", type=int, help="threads of the server's engine")


def main(args: argparse.Namespace) -> int:
    """Run `oneplusn demo`."""
    result = measure(args.n, threads=args.threads, quiet=args.json)
    if args.json:
        rows = [asdict(row) for row in result.tasks]
        print(json.dumps({"tasks": rows, "max_tasks_per_step": result.max_tasks_per_step}))
    else:
        print(render(result))
    return 0
