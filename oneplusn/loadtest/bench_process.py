"""Run any server on this machine, know when it was ready, and leave none of its processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx

from oneplusn.loadtest.processes import ChildFailed

START_LIMIT_S = 600.0
STOP_LIMIT_S = 10.0
POLL_S = 0.05
SHOWN_LINES = 20


@dataclass(frozen=True, slots=True)
class Running:
    """A server that takes requests.

    Attributes:
        started: When its process was started, as `time.perf_counter` tells it.
        ready_s: Seconds that it took from there until it said that it is ready.
        log: What it writes.
    """

    address: str
    pid: int
    started: float
    ready_s: float
    log: Path


@contextmanager
def listening(
    command: Sequence[str], port: int, variables: Mapping[str, str], *, ready: str, log: Path
) -> Iterator[Running]:
    """Run a server; yield it once `ready` answers 200, then end it and all that it started.

    Args:
        command: Makes it listen on the port.
        port: Of this machine.
        variables: Its environment.
        ready: The route that is asked.
        log: Where what it writes goes.

    Raises:
        ChildFailed: It cannot be started, ended, or was not ready in time.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as written:
        started = time.perf_counter()
        try:
            process = subprocess.Popen(  # noqa: S603 - our own server, or one that the user named
                command,
                stdout=written,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        except OSError as error:
            msg = f"{command[0]} cannot be started: {error}"
            raise ChildFailed(msg) from None
        address = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(process, f"{address}{ready}", log)
            yield Running(address, process.pid, started, time.perf_counter() - started, log)
        finally:
            _stop(process)


def environment(threads: int) -> dict[str, str]:
    """Return this process's environment with the number of threads fixed, and no model hub."""
    count = str(threads)
    fixed = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            msg = f"the server ended with exit code {process.returncode}. {last_lines(log)}"
            raise ChildFailed(msg)
        with suppress(httpx.TransportError):  # nobody listens yet
            if httpx.get(url).status_code == HTTPStatus.OK:
                return
        time.sleep(POLL_S)
    msg = f"the server was not ready after {START_LIMIT_S:.0f} s. {last_lines(log)}"
    raise ChildFailed(msg)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end; end it and what is left of its group when it does not."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_LIMIT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_lines(log: Path) -> str:
    """Return the end of what a process wrote, with the name of its file."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join([f"The end of {log}:", *lines[-SHOWN_LINES:]])
