"""Adapters for a registry, and what can be seen of it."""

from __future__ import annotations

from pathlib import Path

from bundles import small_bundle
from oneplusn.adapters.registry import Registry

LETTERS = small_bundle(tasks=("vowels", "upper"))
LETTERS_2 = small_bundle(tasks=("vowels", "lower"), seed=2)
LETTERS_3 = small_bundle(tasks=("vowels", "lower"), seed=3)
SUMS = small_bundle(tasks=("add",), seed=4)


def contents(folder: Path) -> set[str]:
    """List what lies in a data folder beside the database."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if not path.name.startswith("registry.db")
    }


def active(registry: Registry, name: str = "letters") -> int | None:
    """Return the number of an adapter's active version."""
    version = registry.adapter(name).active
    return version and version.number
