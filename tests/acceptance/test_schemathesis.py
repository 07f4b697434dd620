"""Schemathesis reads the OpenAPI document, and sends what it allows and what it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from servers import serving

CLIENT = ("schemathesis", version("schemathesis"))

CONFIG = Path(__file__).with_name("schemathesis.toml")
HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
SECONDS = 170
SEED = 1


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of its own, whose adapters may come to harm."""
    with serving(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.mark.timeout(SECONDS + 120)
def test_document_is_kept(server, notes, tmp_path) -> None:
    report, counts = tmp_path / "report.json", tmp_path / "statuses.json"
    command = [
        *(Path(sys.executable).with_name("schemathesis"), "--config-file", CONFIG),
        *("run", f"{server.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {server.key}", "--seed", str(SEED)),
        *("--max-time", str(SECONDS), "--continue-on-failure"),
        *("--no-color", "--output-sanitize", "false"),
        *("--report", "json", "--report-json-path", report),
    ]
    environment = {
        **os.environ,
        "ACCEPTANCE_STATUSES": str(counts),
        "SCHEMATHESIS_HOOKS": str(HOOKS),
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stdout + done.stderr

    cases = json.loads(report.read_text())["test_cases"]
    statuses = {int(status): count for status, count in json.loads(counts.read_text()).items()}
    shown = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
    notes.append(f"schemathesis: {cases['generated']} cases, {cases['with_failures']} failures")
    notes.append(f"answers by status: {shown}")
    assert done.returncode == 0, done.stdout
    assert cases["generated"] > 1000
    assert statuses[200] > 100
    assert {status for status in statuses if status >= 500} <= {503, 504}
