"""Name a task of an adapter version, the way a request carries it to the engine."""

from __future__ import annotations

import msgspec


class TaskRef(msgspec.Struct, frozen=True):
    """One task of one adapter version, with its weight in a blend.

    Attributes:
        digest: Content digest of the adapter version, `sha256:<64 hex>`.
        task: Name of the task within that version.
        weight: Factor of its gates; 1 for a request that names a single task.
    """

    digest: str
    task: str
    weight: float = 1.0
