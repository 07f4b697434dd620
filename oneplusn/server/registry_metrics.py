"""What the metrics say of the data folder, asked for at every scrape."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

from oneplusn.adapters.registry import Registry
from oneplusn.server.metrics import Metrics


def follow_registry(metrics: Metrics, registry: Registry, folder: Path) -> None:
    """Keep the metrics of a registry and its data folder at what they are."""

    @lru_cache(maxsize=1)
    def blob_bytes(_generation: int) -> int:
        versions = (version for adapter in registry.adapters() for version in adapter.versions)
        return sum({version.digest: version.num_bytes for version in versions}.values())

    metrics.follow("registry_generation", lambda: registry.generation)
    metrics.follow("registry_blob_bytes", lambda: blob_bytes(registry.generation))
    metrics.follow("registry_gc_removed", lambda: registry.num_swept)
    metrics.follow("registry_corrupt_blobs", lambda: registry.num_quarantined)
    metrics.follow("registry_disk_free_bytes", lambda: shutil.disk_usage(folder).free)
