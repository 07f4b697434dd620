"""Send a part of a load from a process of its own; started by `crew`, told by lines of JSON.

It reads its job, says that it is ready, reads when to start, tells how it goes, and in the end
everything that it measured. Another line, or the end of its input, ends the load early: so nothing
stays behind whose parent died.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import msgspec

from oneplusn.loadtest.drive import Counts
from oneplusn.loadtest.job import Job, Sender
from oneplusn.loadtest.rows import Part, to_part
from oneplusn.loadtest.transport import raise_open_files

EVERY_S = 0.25
LINE_LIMIT = 1 << 31
"""Bytes of a line: a part holds every time of every token."""

Message = Counts | Part


async def work() -> None:
    """Do what the lines say."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(LINE_LIMIT)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    sender = Sender(msgspec.json.decode(await lines.readline(), type=Job))
    tell(sender.counts)
    start = msgspec.json.decode(await lines.readline(), type=float)

    async def tell_often() -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            tell(sender.counts)

    async def halt_if_told() -> None:
        await lines.readline()
        sender.halt()

    beside = [asyncio.create_task(tell_often()), asyncio.create_task(halt_if_told())]
    outcome = await sender.run(start)
    for task in beside:
        task.cancel()
    tell(to_part(outcome))


def tell(message: Message) -> None:
    """Write one line to the parent."""
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    """Run until the load is over; Ctrl-C is the parent's to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_open_files()
    asyncio.run(work())


if __name__ == "__main__":
    main()
