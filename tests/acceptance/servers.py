"""Start the server that clients meet: the command of another environment, on a port of its own."""

from __future__ import annotations

import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COMMAND = os.environ.get("ACCEPTANCE_SERVER", "oneplusn")
START_S = 120
STOP_S = 60
TAIL = 4000  # characters of a log that are worth showing


@dataclass(frozen=True)
class Server:
    """Where a running server listens, and the key that it demands."""

    url: str
    key: str = "a-key-of-the-clients"

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@contextmanager
def serving(log: Path) -> Iterator[Server]:
    """Serve the demo model until the block ends; its log must hold no error then.

    The demo's chat template knows no tools, so `--tool-parser` says how they are called.
    """
    command = [COMMAND, "serve", "--port", "0", "--threads", "1", "--tool-parser", "hermes"]
    environment = {**os.environ, "ONEPLUSN_API_KEY": Server.key, "ONEPLUSN_LOG_LEVEL": "info"}
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr, env=environment) as run:
        try:
            yield Server(_address(run, log))
        finally:
            run.terminate()
            try:
                code = run.wait(STOP_S)
            except subprocess.TimeoutExpired:
                run.kill()
                raise
    text = log.read_text()
    assert code == 0, text[-TAIL:]
    fault = re.search(r"^.*( ERROR |Traceback).*$", text, re.MULTILINE)
    assert fault is None, text[fault.start() :][:TAIL]


def _address(run: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until a server is ready; return its address."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and run.poll() is None:
        found = re.search(r"listening on (http://\S+);", log.read_text())
        if found and _is_ready(found[1]):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(f"no server is ready after {START_S} s:\n{log.read_text()[-TAIL:]}")


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, TimeoutError):
        return False
