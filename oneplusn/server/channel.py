"""The socket between the API and the engine: one message a frame, and no send ever waits.

A pair over ipc in a private folder, made anew for every life of the engine, so that nothing that
an earlier one said is ever read. Neither end bounds its queue: what the API sends is bounded by
`--max-queue`, what the engine sends by the streams, since one that is not read is cancelled.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq

from oneplusn.errors import ConfigError
from oneplusn.server.messages import FromEngine, ToEngine

MAX_PER_TURN = 16
"""Messages read before the event loop gets a turn for everything else."""
LAST_WORDS_MS = 1000
"""How long an engine that ends may wait for the API to take what it said last."""
_SHORT = "/tmp"  # noqa: S108 - a private folder is made in it
_MAX_FOLDER_BYTES = 80
"""A socket's address has 107 bytes; this leaves room for `/1nxxxxxxxx/<number>`."""

Context = zmq.Context[zmq.Socket[bytes]]


def socket_folder(bases: Iterable[str | None] | None = None) -> Path:
    """Make a folder for sockets that no other user can enter and whose path is short.

    Args:
        bases: Folders to make it in, the best first; this user's own for sockets, then those for
            temporary files.

    Raises:
        ConfigError: None of them can be used.
    """
    if bases is None:
        bases = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), _SHORT)
    for base in bases:
        if base and len(os.fsencode(base)) <= _MAX_FOLDER_BYTES:
            with suppress(OSError):
                return Path(tempfile.mkdtemp(prefix="1n", dir=base))
    msg = f"no folder for a socket can be made below {_MAX_FOLDER_BYTES} bytes; make /tmp writable"
    raise ConfigError(msg)


class ApiEnd:
    """The API's end. Lives on the event loop."""

    def __init__(self, context: Context, path: Path, receive: Receiver) -> None:
        """Wait at `path`, and hand every message to `receive`."""
        self.address = f"ipc://{path}"
        self._receive = receive
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self._socket = _pair(context)
        self._socket.bind(self.address)
        self._file: int = self._socket.FD
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._file, self.read)

    def send(self, message: ToEngine) -> None:
        """Hand a message over; nobody gets it if the engine is gone."""
        if self._socket.closed:
            return
        with suppress(zmq.Again):
            self._socket.send(self._encode(message), zmq.NOBLOCK)
        # Sending may swallow the signal that there is something to read.
        self._loop.call_soon(self.read)

    def read(self) -> None:
        """Deliver what has come, a few messages at a time.

        The file signals only what is new, so this goes on by itself until nothing is left.
        """
        left = True
        try:
            for _ in range(MAX_PER_TURN):
                if self._socket.closed:
                    break
                self._receive(self._decode(self._socket.recv(zmq.NOBLOCK)))
        except zmq.Again:
            left = False
        finally:
            if left and not self._socket.closed:
                self._loop.call_soon(self.read)

    def close(self) -> None:
        """Stop listening."""
        if not self._socket.closed:
            self._loop.remove_reader(self._file)
            self._socket.close(linger=0)


class EngineEnd:
    """The engine's end. Lives on the engine's thread."""

    def __init__(self, address: str) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToEngine).decode
        self._context = Context()
        self._socket = _pair(self._context)
        self._socket.connect(address)

    def wait(self, seconds: float) -> None:
        """Sleep until a message is there, but no longer than `seconds`."""
        self._socket.poll(int(seconds * 1000))

    def receive(self) -> list[ToEngine]:
        """Take the messages that are there, without waiting for more."""
        messages: list[ToEngine] = []
        with suppress(zmq.Again):
            while True:
                messages.append(self._decode(self._socket.recv(zmq.NOBLOCK)))
        return messages

    def send(self, message: FromEngine) -> None:
        """Hand a message over."""
        self._socket.send(self._encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """Let the API take what was said last, and leave."""
        self._socket.close(linger=LAST_WORDS_MS)
        self._context.term()


Receiver = Callable[[FromEngine], None]


def _pair(context: Context) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    return socket
