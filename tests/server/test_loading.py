"""The collector of garbage: silent while the engine loads, with little to look at afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from oneplusn.server.engine_process import loading


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_loaded_is_not_looked_through_again() -> None:
    with loading():
        assert not gc.isenabled()
        kept = [[] for _ in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(kept)
    assert not any(item is kept for item in gc.get_objects())


def test_a_load_that_fails_leaves_the_collector_as_it_was() -> None:
    with pytest.raises(MemoryError), loading():
        raise MemoryError
    assert gc.isenabled()
