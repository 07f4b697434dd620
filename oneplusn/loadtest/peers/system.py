"""What all systems have in common: they are started, run their cases, and say what they found."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from oneplusn.loadtest import bench_load
from oneplusn.loadtest.bench_cases import Held, Work
from oneplusn.loadtest.bench_memory import resident
from oneplusn.loadtest.bench_process import Running, environment, free_port, last_lines, listening
from oneplusn.loadtest.dialects import Dialect
from oneplusn.loadtest.processes import ChildFailed
from oneplusn.loadtest.stream import LoadFailed

INSIDE = Path(__file__).parent / "inside"
VERSION_LIMIT_S = 60.0


class Absent(Exception):
    """A peer is not on this machine; the message says what to install or to name."""


class Sink(Protocol):
    """Where systems put what they find, as soon as they know it."""

    def check(self) -> None:
        """Raise if no other case may begin."""
        ...

    def row(self, system: str, case: str, figures: Mapping[str, Any]) -> None:
        """Take the figures of one case."""
        ...

    def server(self, system: str, figures: Mapping[str, Any]) -> None:
        """Take what starting and holding the system cost."""
        ...


class System(Protocol):
    """Something that runs cases.

    Attributes:
        name: What tables call it.
        cases: What it can run, in order.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - as above

    @property
    def cases(self) -> tuple[str, ...]: ...  # noqa: D102 - as above

    def run(self, cases: Sequence[str], sink: Sink) -> None:
        """Start, measure the cases, end.

        Raises:
            ChildFailed: It does not start, or does not answer as it should; with its last lines.
        """
        ...


@dataclass(frozen=True, slots=True)
class Places:
    """Where peers are.

    Attributes:
        environments: Folder of the peers' virtual environments; None for this interpreter.
        llama_server: llama.cpp's server; None if there is none.
        vllm: An interpreter that has vLLM; None if there is none.
        scratch: Folder for what is made for a peer from the benchmark's models.
    """

    environments: Path | None
    llama_server: Path | None
    vllm: Path | None
    scratch: Path

    def python(self, name: str) -> str:
        """Return the interpreter of a peer's environment.

        Raises:
            Absent: It was not installed.
        """
        if self.environments is None:
            return sys.executable
        found = self.environments / name / "bin" / "python"
        if not found.exists():
            msg = f"{found} is missing: `make bench-peers` installs it"
            raise Absent(msg)
        return str(found.absolute())


@dataclass(frozen=True, slots=True)
class Served:
    """A server, and how it is asked.

    Attributes:
        command: Makes its command from a port.
        held: What its memory is known to hold.
        ready: Route that answers 200 once it takes requests.
        variables: Of its environment, beside those that fix the threads.
        prepare: Makes what it reads, if that is not there.
        version: Command that prints its version, in the last line or after a word that says so.
    """

    name: str
    cases: tuple[str, ...]
    work: Work
    route: Dialect
    command: Callable[[int], list[str]]
    held: Held
    ready: str = "/health"
    variables: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], object] = lambda: None
    version: Sequence[str] = ()

    def run(self, cases: Sequence[str], sink: Sink) -> None:
        """Serve, measure the cases, stop.

        Raises:
            ChildFailed: It does not start, or does not answer as it should; with its last lines.
        """
        self.prepare()
        port = free_port()
        variables = {**environment(self.work.threads), **self.variables}
        log = self.work.fixtures.folder / "logs" / f"{self.name}.log"
        with listening(self.command(port), port, variables, ready=self.ready, log=log) as server:
            try:
                self._measure(server, cases, sink)
            except LoadFailed as error:
                msg = f"{error}. {last_lines(log)}"
                raise ChildFailed(msg) from None

    def _measure(self, server: Running, cases: Sequence[str], sink: Sink) -> None:
        first = bench_load.first_token(server.address, self.route, self.work)
        start: dict[str, Any] = {"version": version_of(self.version)} if self.version else {}
        start |= {"ready_s": server.ready_s, "first_token_s": first - server.started}
        for case in cases:
            sink.check()
            found = bench_load.measure(server.address, self.route, self.work, case)
            sink.server(self.name, {**start, **resident(server.pid), **asdict(self.held)})
            sink.row(self.name, case, found)


def version_of(command: Sequence[str]) -> str:
    """Return what a command says that its program's version is; empty where it does not."""
    found = subprocess.run(  # noqa: S603 - a peer that the user named
        command, capture_output=True, text=True, timeout=VERSION_LIMIT_S, check=False
    )
    said = re.search(r"version: *(.+)", found.stdout + found.stderr)
    last = found.stdout.split("\n")[-2:-1]
    return (said[1] if said else "".join(last)).strip()


def package_version(interpreter: str, *names: str) -> list[str]:
    """Return a command that prints the version of a package, under the first name it goes by."""
    code = (
        "import sys; from importlib.metadata import distributions as d; "
        "v = {x.name.lower(): x.version for x in d()}; "
        "print(next(f'{n} {v[n]}' for n in sys.argv[1:] if n in v))"
    )
    return [interpreter, "-P", "-c", code, *names]
