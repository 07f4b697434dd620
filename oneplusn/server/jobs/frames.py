"""What goes through the pipes between the API process and a worker: length, then msgpack."""

from __future__ import annotations

from typing import IO

import msgspec

from oneplusn import errors
from oneplusn.errors import OneplusnError, WorkerFailed

MAX_FRAME_BYTES = 64 << 20
OUT_OF_MEMORY = "worker_memory"
UNAVAILABLE = "worker_unavailable"
CRASHED = "worker_crashed"
FATAL = (OUT_OF_MEMORY, UNAVAILABLE)
"""Codes after which a worker ends itself."""
_LENGTH_BYTES = 4


class Call(msgspec.Struct, frozen=True):
    """Run a job.

    Attributes:
        kind: Its name in the table of jobs.
        request: The job's own struct.
        seconds: Processor time that it may take.
        memory_bytes: Address space that it may add.
    """

    kind: str
    request: msgspec.Raw
    seconds: float
    memory_bytes: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """What the job returned."""

    result: msgspec.Raw


class Failed(msgspec.Struct, frozen=True, tag=True):
    """What the job raised: the name of a class of `oneplusn.errors`, and what it carries."""

    kind: str
    message: str
    code: str
    param: str | None = None

    @classmethod
    def of(cls, error: OneplusnError) -> Failed:
        """Take an exception apart."""
        return cls(type(error).__name__, error.message, error.code, error.param)

    def error(self) -> OneplusnError:
        """Put the exception together again."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, OneplusnError)):
            kind = WorkerFailed
        return kind(self.message, code=self.code, param=self.param)


Reply = Done | Failed


def write_frame(pipe: IO[bytes], data: bytes) -> None:
    """Send one message."""
    assert len(data) <= MAX_FRAME_BYTES, f"a message of {len(data)} bytes"
    pipe.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> bytes | None:
    """Receive one message; None when the other side has gone."""
    length = int.from_bytes(pipe.read(_LENGTH_BYTES), "little")
    if not 0 < length <= MAX_FRAME_BYTES:
        return None
    data = pipe.read(length)
    return data if len(data) == length else None
