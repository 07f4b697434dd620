"""Run items in a process that may be lost, and go on with another one.

A kernel that never ends cannot be stopped from within its process, and an error in one spoils
the device for all that comes after it there. So the process that reports never uses the device.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from oneplusn.kernels.smoke.outcome import Outcome

SILENCE_S = 60.0
"""Seconds that an item may take before its process is ended."""
LONG_SILENCE_S = {"": 120.0, "tune": 400.0}
"""The same before the first item, and for parts whose items take long."""
KILLED_S = 10.0
CRASHES = 2
"""After so many lost processes, a form of the kernels is not tried again."""


class Row(NamedTuple):
    """An item, and what came of it."""

    part: str
    case: str
    site: str
    way: str
    outcome: Outcome
    seconds: float

    def __str__(self) -> str:
        value, fault, left_out, note = self.outcome
        name = ", ".join(filter(None, (self.part, self.site, self.case, self.way)))
        figure = "" if value is None else f"{value:.3g}"
        said = f"FAILED: {fault}" if fault else f"left out: {left_out}" if left_out else note
        return ": ".join(filter(None, (name, figure, said)))


Command = Callable[[int, Sequence[str]], list[str]]
"""Makes a command line from the first item and the forms of the kernels to leave out."""


class Orders(NamedTuple):
    """What a process is to do.

    Attributes:
        parts: Of the whole run.
        listed: Those among them whose items are this process's.
        first: The item to begin with.
        stride: One item in so many is done.
        avoid: Forms of the kernels to leave out.
        until: Per part, when the rest of its items is left out, in seconds since the epoch.
        dry: Whether to run in Triton's interpreter.
    """

    parts: Sequence[str]
    listed: Sequence[str]
    first: int
    stride: int
    avoid: Sequence[str]
    until: Mapping[str, float]
    dry: bool


class Begun(NamedTuple):
    """An item that a process has begun."""

    item: Sequence[str]
    form: str


@dataclass
class Supervisor:
    """Processes one after the other, until all items are done.

    Attributes:
        command: Makes the command line of a process.
        show: Is given every row as it comes.
        deadline: Seconds since the epoch at which a process is ended that has not ended itself.
        stride: One item in so many is done here.
        first: The item to go on with.
        rows: What came of the items so far.
        facts: What the processes found out about the device.
    """

    command: Command
    show: Callable[[Row], None]
    deadline: float
    stride: int = 1
    first: int = 0
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    _crashes: Counter[str] = field(default_factory=Counter)
    _avoid: list[str] = field(default_factory=list)
    _begun: Begun | None = None
    _last_form: str = ""

    def run(self) -> None:
        """Do all items; stop when time is up, or when a process does not come to its first one."""
        while True:
            began_with = self.first
            reason = self._run_process()
            if not reason:
                return
            if self._begun is not None:
                self._lose(reason)
            elif self.first == began_with:
                self._add(["start", "", "", ""], Outcome(fault=reason), 0.0)
                return
            self._crashes[self._last_form] += 1
            if self._crashes[self._last_form] >= CRASHES:
                self._avoid.append(self._last_form)
            if time.time() >= self.deadline:
                return

    def _run_process(self) -> str:
        """Run a process to its end; return why it was lost, or nothing."""
        command = self.command(self.first, self._avoid)
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        process = subprocess.Popen(  # noqa: S603 - this interpreter, with a module of ours
            command, stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        try:
            while True:
                line = lines.get(timeout=self._patience())
                if line is None:
                    status = process.wait()
                    return f"the process ended with status {status}" if status else ""
                self._take(json.loads(line))
        except queue.Empty:
            return self._why_silent()
        finally:
            process.kill()
            # It may outlive this for a while, until its kernel is stopped; nobody waits for that.
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=KILLED_S)

    def _patience(self) -> float:
        """Return for how many seconds to wait for the next line."""
        return max(0.0, min(self._silence(), self.deadline - time.time()))

    def _silence(self) -> float:
        part = self._begun.item[0] if self._begun else ""
        return LONG_SILENCE_S.get(part, SILENCE_S)

    def _why_silent(self) -> str:
        if time.time() >= self.deadline:
            return "time was up"
        # It would hang again.
        self._avoid.append(self._last_form)
        return f"no answer for {self._silence():.0f} s"

    def _take(self, event: dict[str, Any]) -> None:
        """Take in what a process tells."""
        if "facts" in event:
            self.facts = event["facts"]
        elif "begin" in event:
            self._begun = Begun(event["item"], event["form"])
            self._last_form = event["form"]
            self.first = event["begin"] + self.stride
        else:
            assert self._begun is not None, event
            self._add(self._begun.item, Outcome(*event["outcome"]), event["seconds"])
            self._begun = None

    def _lose(self, reason: str) -> None:
        """Note that the item under way was lost with its process."""
        assert self._begun is not None
        late = reason == "time was up"
        outcome = Outcome(left_out=reason) if late else Outcome(fault=reason)
        self._add(self._begun.item, outcome, 0.0)
        self._begun = None

    def _add(self, item: Sequence[str], outcome: Outcome, seconds: float) -> None:
        part, case, site, way = item
        row = Row(part, case, site, way, outcome, seconds)
        self.rows.append(row)
        self.show(row)


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    """Hand on a process's lines, then None."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)
