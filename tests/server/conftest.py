"""Adapters and servers that the tests of the interface share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from oneplusn.server.settings import Settings
from serving import Live, serving

MODEL = "tiny-base"


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory) -> dict[str, Path]:
    """One cluster of two tasks and one of one, as folders."""
    from bundles import write_adapter

    folder = tmp_path_factory.mktemp("adapters")
    return {
        "letters": write_adapter(folder / "letters", tasks=("vowels", "upper")),
        "sums": write_adapter(folder / "sums", tasks=("add",), method="lora"),
    }


@pytest.fixture(scope="module")
def live(adapter_folders, tmp_path_factory) -> Iterator[Live]:
    """A server with three tasks, shared by the tests of a module that change nothing in it."""
    settings = Settings(model=MODEL, adapter=adapter_folders)
    with serving(settings, tmp_path_factory.mktemp("model")) as running:
        yield running


@pytest.fixture(scope="module")
def http(live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=10) as client:
        yield client
