"""Start servers as processes, look at their children, and leave none behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from serving import wait_until

TESTS = Path(__file__).parent


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
