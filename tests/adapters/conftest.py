"""A registry in a new data folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.registry import Registry, Version
from prepared_bundles import prepared

Publish = Callable[..., tuple[Version, bool]]


@pytest.fixture
def registry(tmp_path) -> Iterator[Registry]:
    opened = Registry(tmp_path / "data", base_name="base")
    yield opened
    opened.close()


@pytest.fixture
def publish(registry, tmp_path) -> Publish:
    def publish(bundle: Bundle, name: str = "letters", **options: object) -> tuple[Version, bool]:
        made, out = prepared(bundle, name, tmp_path)
        return registry.publish(made, out, **options)

    return publish
