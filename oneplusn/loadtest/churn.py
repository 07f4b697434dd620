"""Replace an adapter again and again while a load runs, and time what that takes.

Each swap uploads the other one of two prepared folders through `POST /v1/adapters`, or activates
the version that an earlier upload made, then asks a task of it: the new version is there when the
answer to such a request names it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec

from oneplusn.loadtest.dialects import Dialect
from oneplusn.loadtest.exchange import Exchange, Pool
from oneplusn.loadtest.stream import Answer, LoadFailed, Reader
from oneplusn.loadtest.transport import Server

ROUTE = "/v1/adapters"
ACCEPTED = (HTTPStatus.OK, HTTPStatus.CREATED)


@dataclass(frozen=True, slots=True)
class Package:
    """An upload, ready to be sent.

    Attributes:
        content: Which of the versions it is, as the caller calls it.
        body: The form.
        boundary: What parts the form's fields.
    """

    content: str
    body: bytearray
    boundary: str

    @property
    def closing(self) -> bytes:
        """What the form has after the last file."""
        return f"\r\n--{self.boundary}--\r\n".encode()

    @classmethod
    def read(cls, name: str, folder: Path) -> Package:
        """Put the files of a folder into a form, in the order of their names.

        Raises:
            OSError: It cannot be read.
        """
        package = cls(str(folder), bytearray(), secrets.token_hex(16))
        package._add('name="name"', name.encode())
        for path in sorted(folder.iterdir()):
            if path.is_file():
                package._add(f'name="files"; filename="{path.name}"', path.read_bytes())
        package.body.extend(package.closing)
        return package

    def _add(self, disposition: str, data: bytes) -> None:
        opening = "\r\n" if self.body else ""
        head = f"{opening}--{self.boundary}\r\nContent-Disposition: form-data; {disposition}"
        self.body.extend(f"{head}\r\n\r\n".encode())
        self.body.extend(data)


@dataclass(slots=True)
class Swap:
    """One upload or activation, and the first request to its version.

    Attributes:
        content: Which package it was.
        due: When it should have begun, in seconds on the clock of `time.perf_counter`.
        started: When it began.
        answered: When the server had answered it.
        version: Label of the version that is active since.
        first_token: When the first token of that version arrived.
        failure: What went wrong, if something did.
    """

    content: str
    due: float
    started: float
    answered: float | None = None
    version: str | None = None
    first_token: float | None = None
    failure: LoadFailed | None = None


@dataclass(slots=True)
class Churn:
    """Swaps at even distances.

    Attributes:
        name: The adapter's.
        packages: What is uploaded, one after the other.
        ask: Makes a request to a task; needed to run.
        how: Whether a version that the server has is sent again ("upload"), activated by its number
            ("activate"), or left as it is ("ask"), so that the requests alone can be measured.
        tasks: Tasks of the adapter, known after the first upload.
        numbers: Versions by the content of what made them.
        swaps: What was done.
        prepared: How many of them were before the load.
        num_bytes: Size of an upload.
        halted: Set to end the swaps, after the one that is under way.
    """

    server: Server
    dialect: Dialect
    name: str
    packages: Iterator[Package]
    per_second: float
    timeout: float
    ask: Callable[[str], bytes] | None = None
    how: Literal["upload", "activate", "ask"] = "upload"
    tasks: tuple[str, ...] = ()
    swaps: list[Swap] = field(default_factory=list)
    prepared: int = 1
    num_bytes: int = 0
    halted: asyncio.Event = field(default_factory=asyncio.Event)
    numbers: dict[str, int] = field(default_factory=dict)

    def prepare(self, count: int = 1) -> None:
        """Upload the first packages, so that the tasks are there, and versions to go back to.

        Raises:
            LoadFailed: The server refuses one.
        """
        for package in islice(self.packages, count):
            self.num_bytes = len(package.body)
            description = self._upload(package)
            self.tasks = tuple(description.get("tasks") or (self.name,))
            now = time.perf_counter()
            self.swaps.append(Swap(package.content, now, now, now, description["id"], now))
        self.prepared = count

    @property
    def measured(self) -> list[Swap]:
        """What was swapped under load."""
        return self.swaps[self.prepared :]

    async def run(self, *, delay: float = 0.0) -> None:
        """Swap until halted, from `delay` seconds on; what fails is noted."""
        due = time.perf_counter() + delay
        while True:
            due += 1 / self.per_second
            # Drawn ahead of its time, since making it may take a while.
            package = next(self.packages)
            if await self._is_halted(due - time.perf_counter()):
                return
            await self._swap(package, due)

    async def _is_halted(self, seconds: float) -> bool:
        """Wait that long, or until halted."""
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self.halted.wait()
        except TimeoutError:
            return False
        return True

    async def _swap(self, package: Package, due: float) -> None:
        before = self.swaps[-1]
        content = before.content if self.how == "ask" else package.content
        swap = Swap(content, due, time.perf_counter())
        self.swaps.append(swap)
        try:
            # In a thread with a blocking socket: the loop would stall on megabytes.
            if self.how == "ask":
                description = {"id": before.version}
            else:
                send = self._upload if self.how == "upload" else self._activate
                description = await asyncio.to_thread(send, package)
            swap.answered, swap.version = time.perf_counter(), description["id"]
            answer = await self._probe()
        except LoadFailed as error:
            swap.failure = error
            return
        if answer.versions != (swap.version,):
            named = ", ".join(answer.versions) or "none"
            msg = f"{swap.version} was active, and the next answer named {named}"
            swap.failure = LoadFailed(msg, group="another version answered")
        elif answer.times:
            swap.first_token = answer.times[0]

    async def _probe(self) -> Answer:
        assert self.ask is not None
        reader = Reader(self.dialect)
        exchange = Exchange(self.ask(self.tasks[0]), reader)
        pool = Pool(self.server)
        await exchange.run(pool, limit_s=self.timeout)
        pool.close()
        return reader.finish(exchange.sent)

    def _upload(self, package: Package) -> dict[str, Any]:
        """Send a package; return the server's description of the version.

        Raises:
            LoadFailed: It cannot be reached, refuses, or answers something else.
        """
        headers = {"Content-Type": f"multipart/form-data; boundary={package.boundary}"}
        description = self._told("upload", "POST", ROUTE, package.body, headers)
        if isinstance(number := description.get("version"), int):
            self.numbers[package.content] = number
        return description

    def _activate(self, package: Package) -> dict[str, Any]:
        """Activate the version that a package has made; as `_upload` where it has made none."""
        if package.content not in self.numbers:
            return self._upload(package)
        body = msgspec.json.encode({"version": self.numbers[package.content]})
        headers = {"Content-Type": "application/json"}
        return self._told("activation", "PUT", f"{ROUTE}/{self.name}", body, headers)

    def _told(
        self, what: str, method: str, path: str, body: bytes | bytearray, headers: dict[str, str]
    ) -> dict[str, Any]:
        status, content = self.server.send(method, path, body, headers, limit_s=self.timeout)
        if status not in ACCEPTED:
            shown = content[:500].decode(errors="replace")
            msg = f"the {what} was answered {status}: {shown}"
            raise LoadFailed(msg, group=f"{what} {status}")
        try:
            description = msgspec.json.decode(content)
        except msgspec.DecodeError:
            description = None
        if not isinstance(description, dict) or not isinstance(description.get("id"), str):
            msg = f"the {what}'s answer names no version: {content[:200]!r}"
            raise LoadFailed(msg, group=what)
        return description
