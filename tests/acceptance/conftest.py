"""Real clients against a real server: one server a run, and a table of what was checked.

`make acceptance` runs this folder, in environments that hold the clients and nothing of ours.
Every module names its client in CLIENT: the name, and the version that is installed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from servers import Server, serving

_clients: dict[str, tuple[str, str]] = {}
_outcomes: dict[str, Counter[str]] = {}
_notes: list[str] = []


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def notes() -> list[str]:
    """Lines to be printed below the table."""
    return _notes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        _clients[item.location[0]] = item.module.CLIENT


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes.setdefault(report.location[0], Counter())[report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("clients")
    terminalreporter.write_line(f"{'client':<32}{'version':<12}checks passed")
    for file, (name, version) in _clients.items():
        outcomes = _outcomes.get(file, Counter())
        counts = f"{outcomes['passed']} of {outcomes.total()}"
        terminalreporter.write_line(f"{name:<32}{version:<12}{counts}")
    for note in _notes:
        terminalreporter.write_line(note)
