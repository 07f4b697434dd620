"""Start what is measured in processes of their own, and leave none of them behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any

import httpx

START_LIMIT_S = 600.0
STOP_LIMIT_S = 10.0
POLL_S = 0.05
SHOWN_CHARS = 2000


class ChildFailed(Exception):
    """A process ended with an error, or took too long."""


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this interpreter, outside the current folder."""
    return [sys.executable, "-P", "-m", module, *arguments]


def named(adapters: Mapping[str, Path], option: str) -> list[str]:
    """Return `option NAME=PATH` for every adapter."""
    return [word for name, path in adapters.items() for word in (option, f"{name}={path}")]


def run_json(command: Sequence[str], *, threads: int, limit_s: float) -> Any:  # noqa: ANN401 - JSON
    """Run a command to its end and decode the last line that it prints; None if it prints none.

    Raises:
        ChildFailed: It ended with an error, or took longer than `limit_s`.
    """
    with tempfile.TemporaryFile() as log:
        try:
            done = subprocess.run(  # noqa: S603 - our own modules
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                timeout=limit_s,
                env=_environment(threads),
                check=False,
            )
        except subprocess.TimeoutExpired:
            msg = f"{_shown(command)} took longer than {limit_s:.0f} s:\n{_tail(log)}"
            raise ChildFailed(msg) from None
        if done.returncode:
            msg = f"{_shown(command)} ended with exit code {done.returncode}:\n{_tail(log)}"
            raise ChildFailed(msg)
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else None


@contextmanager
def serving(options: Sequence[str], *, threads: int) -> Iterator[str]:
    """Run `oneplusn serve` on a free port of this machine; yield its address, then stop it.

    Raises:
        ChildFailed: It ended, or was not ready in time.
    """
    port = _free_port()
    command = python("oneplusn.cli", "serve", "--host", "127.0.0.1", "--port", str(port))
    command += ["--threads", str(threads), "--log-level", "warning", *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603 - our own module
            command, stdout=log, stderr=subprocess.STDOUT, env=_environment(threads)
        )
        address = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(process, address, log)
            yield address
        finally:
            _stop(process)


def _environment(threads: int) -> dict[str, str]:
    """Return this process's environment with the number of threads fixed, and no model hub."""
    count = str(threads)
    fixed = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, "TOKENIZERS_PARALLELISM": "false"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            msg = f"the server ended with exit code {process.returncode}:\n{_tail(log)}"
            raise ChildFailed(msg)
        try:
            if httpx.get(f"{address}/health/ready").status_code == HTTPStatus.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)
    msg = f"the server was not ready after {START_LIMIT_S:.0f} s:\n{_tail(log)}"
    raise ChildFailed(msg)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and end it when it does not."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_LIMIT_S)
    finally:
        process.kill()
        process.wait()


def _shown(command: Sequence[str]) -> str:
    """Return the module of a command made by `python`."""
    return command[3]


def _tail(log: IO[bytes]) -> str:
    """Return the end of what a process wrote."""
    log.seek(0)
    return log.read().decode(errors="replace").strip()[-SHOWN_CHARS:]
