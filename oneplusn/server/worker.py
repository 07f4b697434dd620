"""The child process that does jobs: `python -P -m oneplusn.server.worker LANE`.

It takes calls on stdin and answers on stdout, one at a time, until stdin ends. What a job may take
is set as limits of the process before it begins, so nothing that a job reads can talk itself out.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import msgspec

from oneplusn.adapters.blobs import LIMITS
from oneplusn.errors import OneplusnError, WorkerFailed
from oneplusn.server.jobs import JOBS, MIB
from oneplusn.server.jobs.frames import (
    FATAL,
    OUT_OF_MEMORY,
    UNAVAILABLE,
    Call,
    Done,
    Failed,
    Reply,
    read_frame,
    write_frame,
)

_log = logging.getLogger("oneplusn.worker")


def main(lane: str) -> None:
    """Warm up, say so, and do jobs until nobody asks any more."""
    logging.basicConfig(stream=sys.stderr, format="%(name)s %(levelname)s %(message)s")
    calls, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to the log, not between the replies
    modules = {name: import_module(job.module) for name, job in JOBS.items() if job.lane == lane}
    for module in modules.values():
        for name in module.NEEDS:
            import_module(name)
    write_frame(replies, b"warm")
    while (data := read_frame(calls)) is not None:
        call = msgspec.msgpack.decode(data, type=Call)
        set_limits(call.seconds, call.memory_bytes)
        reply = do(modules[call.kind], call)
        write_frame(replies, msgspec.msgpack.encode(reply))
        if isinstance(reply, Failed) and reply.code in FATAL:
            return


def do(module: ModuleType, call: Call) -> Reply:
    """Do one job; whatever happens in it becomes an answer."""
    try:
        request = msgspec.msgpack.decode(call.request, type=module.Request)
        _warm(module, request)
        return Done(msgspec.Raw(msgspec.msgpack.encode(module.run(request))))
    except OneplusnError as error:
        return Failed.of(error)
    except Exception as error:
        # Nobody else can answer for this job.
        if not _is_beyond_limits(error):
            _log.exception("the job %r failed", call.kind)
            return Failed.of(WorkerFailed(f"the job failed with {type(error).__name__}"))
        size = call.memory_bytes // MIB
        msg = f"it takes more than {size} MiB of memory, or a file of that size; a job may not"
        return Failed.of(WorkerFailed(msg, code=OUT_OF_MEMORY))


def _warm(module: ModuleType, request: object) -> None:
    """Load what a job keeps for later ones, if it does; its own limits count from then on.

    Raises:
        WorkerFailed: It cannot be loaded, which is not the fault of what is asked.
    """
    if not hasattr(module, "warm"):
        return
    try:
        module.warm(request)
    except OneplusnError:
        raise
    except Exception as error:
        # Whatever a library raises while it loads, this process is of no use for the job.
        _log.exception("what a job needs could not be loaded")
        msg = "what this job needs could not be loaded; the server's log says why"
        raise WorkerFailed(msg, code=UNAVAILABLE) from error
    set_limits(module.SECONDS, module.MEMORY_BYTES)


def set_limits(seconds: float, memory_bytes: int) -> None:
    """Bound what the process may take from now on, beyond what it has taken.

    Args:
        seconds: Processor time; more ends the process.
        memory_bytes: Address space, and the size of any file that it writes.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _set_soft(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime + seconds))
    _set_soft(resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes)
    _set_soft(resource.RLIMIT_FSIZE, memory_bytes)
    _set_soft(resource.RLIMIT_CORE, 0)


def _set_soft(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _is_beyond_limits(error: Exception) -> bool:
    """Recognise what Python, the system and torch say when memory or a file may not grow."""
    if isinstance(error, OSError):
        return error.errno in LIMITS
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


if __name__ == "__main__":
    main(sys.argv[1])
