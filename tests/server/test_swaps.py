"""Adapters in and out of an engine that has room for fewer than there are."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from bundles import write_adapter
from oneplusn.server.settings import Settings
from scripted_engine import ScriptedCore
from serving import Live, serving, wait_until

NAMES = ("one", "two", "three")


@pytest.fixture
def own(tmp_path) -> Iterator[Live]:
    """A server with three adapters of one task each, two of which fit."""
    adapters = {
        name: write_adapter(tmp_path / name, tasks=(f"{name}-task",), method="lora", seed=seed)
        for seed, name in enumerate(NAMES)
    }
    settings = Settings(model="tiny-base", adapter=adapters, data=tmp_path / "data")
    with serving(settings, tmp_path / "model", ScriptedCore(room=2)) as running:
        yield running


@pytest.fixture
def http(own) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own.url, timeout=10) as client:
        yield client


def answers(http: httpx.Client, name: str) -> str | None:
    """The version that a request to an adapter's task is answered by."""
    answer = http.post("/generate", json={"task": f"{name}-task", "inputs": "x"})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-oneplusn-adapter"]


def resident(own: Live) -> set[str]:
    return {
        version.adapter
        for version in own.server.registry.active()
        if version.digest in own.core.resident
    }


def test_every_adapter_answers_however_few_fit(own, http) -> None:
    assert resident(own) == {"two", "three"}
    for name in NAMES * 3:
        assert answers(http, name) == f"{name}@1"
        assert name in resident(own)
        assert len(own.core.resident) == 2


def test_one_that_is_pinned_stays_whoever_needs_room(own, http) -> None:
    assert http.post("/v1/adapters/one:pin").status_code == 200
    for name in ("two", "three", "two"):
        answers(http, name)
        assert resident(own) == {"one", name}


def test_after_a_restart_the_pinned_come_first_and_the_rest_on_demand(own, http) -> None:
    http.post("/v1/adapters/two:pin")
    http.post("/generate", json={"task": None, "inputs": "crash"})
    wait_until(lambda: own.server.engine.restarts == 1 and own.server.ready)

    assert len(own.core.resident) == 2
    assert "two" in resident(own)
    assert own.core.pinned == {v.digest for v in own.server.registry.versions("two")}
    for name in NAMES:
        assert answers(http, name) == f"{name}@1"


def test_one_that_was_unloaded_comes_back_when_it_is_asked_for(own, http) -> None:
    assert http.post("/v1/adapters/two:unload").status_code == 200
    assert "two" not in resident(own)
    assert answers(http, "two") == "two@1"
    assert "two" in resident(own)
