"""Start servers as processes, look at their children, and leave none behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from serving import wait_until

TESTS = Path(__file__).parent
KEYS = {"message", "type", "param", "code"}
Event = dict[str, Any]


@dataclass
class Process:
    """A running server, and where its log is."""

    popen: subprocess.Popen[bytes]
    http: httpx.Client
    log: Path

    @property
    def url(self) -> str:
        return str(self.http.base_url)

    @property
    def engine(self) -> int:
        """Number of the engine's process."""
        return engine_of(self.popen.pid)

    def is_ready(self) -> bool:
        return self.http.get("/health/ready").status_code == 200

    def wait_until_ready(self) -> None:
        wait_until(self.is_ready, seconds=60)


def engine_of(server: int) -> int:
    """Find the child of a server that is its engine."""
    (engine,) = (pid for pid in children_of(server) if "ipc://" in command_of(pid))
    return engine


def children_of(pid: int) -> list[int]:
    listed = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for line in listed for child in line.split()]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[Process]:
    """Run a Python module that serves, until the block ends; it is ready when the block begins."""
    with (
        TemporaryDirectory(prefix="x") as sockets,
        log.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-P", "-m", *command],
            stderr=stderr,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([*sys.path[1:], str(TESTS)]),
                "XDG_RUNTIME_DIR": sockets,
                "ONEPLUSN_LOG_LEVEL": "info",  # stands for all that is the server's own
            },
        ) as popen,
    ):
        try:
            wait_until(lambda: popen.poll() is not None or bool(address_in(log)), seconds=60)
            with httpx.Client(base_url=address_in(log), timeout=30) as http:
                process = Process(popen, http, log)
                process.wait_until_ready()
                yield process
        finally:
            popen.kill()


def address_in(log: Path) -> str:
    found = re.search(r"listening on (http://\S+);", log.read_text())
    return found[1] if found else ""


class Streams:
    """Streams on threads, all of which have begun: what each got last, and when it ended."""

    def __init__(self, pool: Executor, url: str, bodies: Sequence[Mapping[str, Any]]) -> None:
        self._begun = threading.Semaphore(0)
        self._ends = [pool.submit(self._read, url, body) for body in bodies]
        for _ in bodies:
            assert self._begun.acquire(timeout=30)

    def _read(self, url: str, body: Mapping[str, Any]) -> tuple[Event, float]:
        with httpx.stream("POST", f"{url}/generate_stream", json=body, timeout=30) as answer:
            events = (json.loads(line[6:]) for line in answer.iter_lines() if line)
            first = next(events)
            self._begun.release()
            *_, last = first, *events
        return last, time.monotonic()

    def ends(self) -> tuple[list[Event], float]:
        """Return the last events, and when the last stream ended."""
        ends = [future.result(timeout=30) for future in self._ends]
        return [event for event, _ in ends], max(when for _, when in ends)


def error_of(event: Event) -> tuple[str, set[str]]:
    return event["error"]["code"], set(event["error"])
