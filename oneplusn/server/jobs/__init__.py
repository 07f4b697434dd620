"""What workers do: one module a job, and the table of them.

A job module has `Request`, a msgspec struct; `run(request)`, which returns another; and `NEEDS`,
the modules that a worker imports before its first job. Imports of torch and the like are inside
`run`, because the API process loads the job's module for its structs. To add a job, add a module
and a row. A module with `warm(request)` loads there what is kept for later jobs, and its own
`SECONDS` of processor time and `MEMORY_BYTES` count from then on.
"""

from __future__ import annotations

from typing import NamedTuple

MIB = 1 << 20


class Job(NamedTuple):
    """A kind of job, and what one of them may take.

    Attributes:
        module: Where it is.
        lane: Jobs of a lane share a process and wait for each other.
        seconds: Of wall clock and of processor time.
        memory_bytes: Address space, beyond that of an idle worker.
    """

    module: str
    lane: str
    seconds: float
    memory_bytes: int


JOBS = {
    "prepare": Job("oneplusn.server.jobs.prepare", "adapters", 120.0, 4096 * MIB),
    "rebuild": Job("oneplusn.server.jobs.rebuild", "adapters", 120.0, 4096 * MIB),
    "grammar": Job("oneplusn.server.jobs.grammar", "grammars", 20.0, 2048 * MIB),
}
"""Every job by its name."""
