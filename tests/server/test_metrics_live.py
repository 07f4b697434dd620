"""What happens to a server shows in its metrics: sequences, adapters, restarts, refusals."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bundles import write_adapter
from oneplusn.adapters.registry import Registry
from oneplusn.server.bridge import AsyncEngine
from oneplusn.server.messages import Sampling, Submit
from oneplusn.server.metrics import EndedSequence, Metrics
from oneplusn.server.registry_metrics import follow_registry
from oneplusn.server.settings import Settings
from oneplusn.server.streams import MAX_BUFFERED
from serving import Live, ScriptedCore, launch, serving, wait_until


def samples(metrics: Metrics) -> dict[str, float]:
    """Every line of a scrape, by all that comes before its value."""
    lines = re.findall(r"^oneplusn_(\S+) (\S+)$", metrics.scrape().decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def ended(**other: object) -> EndedSequence:
    values = {
        "label": "add",
        "reason": "stop",
        "is_complete": True,
        "tokens": 5,
        "cached_tokens": 16,
        "queued": 0.25,
        "first": 1.0,
        "last": 3.0,
        "whole": 3.5,
    }
    return EndedSequence(**{**values, **other})


def test_a_sequence_that_ended_well() -> None:
    metrics = Metrics()
    metrics.observe_sequence(ended())

    found = samples(metrics)

    expected = {
        'generations_total{task="add",finish_reason="stop"}': 1,
        'generation_tokens_total{task="add"}': 5,
        'cached_prompt_tokens_total{task="add"}': 16,
        "request_generation_tokens_sum": 5,
        "request_queue_time_seconds_sum": 0.25,
        "request_prefill_time_seconds_sum": 0.75,
        "request_decode_time_seconds_sum": 2,
        "request_inference_time_seconds_sum": 2.75,
        "e2e_request_latency_seconds_sum": 3.5,
        'task_time_to_first_token_seconds_sum{task="add"}': 1,
        'task_time_per_output_token_seconds_sum{task="add"}': 0.5,
        'task_e2e_request_latency_seconds_sum{task="add"}': 3.5,
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("other", "counted"),
    [
        ({"is_complete": False, "reason": "abort"}, {"queue", "prefill", "task_ttft"}),
        ({"is_complete": False, "first": None, "queued": None}, set()),
        ({"tokens": 1, "last": 1.0}, {"queue", "prefill", "task_ttft", "e2e", "task_e2e"}),
        ({"queued": None}, {"task_ttft", "e2e", "task_e2e", "task_tpot"}),
    ],
    ids=["cancelled", "cancelled-while-waiting", "one-token", "queue-unknown"],
)
def test_what_a_sequence_did_not_reach_is_not_observed(other, counted) -> None:
    metrics = Metrics()
    metrics.observe_sequence(ended(**other))
    found = samples(metrics)
    names = {
        "queue": "request_queue_time_seconds_count",
        "prefill": "request_prefill_time_seconds_count",
        "e2e": "e2e_request_latency_seconds_count",
        "task_ttft": 'task_time_to_first_token_seconds_count{task="add"}',
        "task_tpot": 'task_time_per_output_token_seconds_count{task="add"}',
        "task_e2e": 'task_e2e_request_latency_seconds_count{task="add"}',
    }
    assert {short for short, name in names.items() if found.get(name)} == counted


@pytest.fixture
def own(adapter_folders, tmp_path) -> Iterator[Live]:
    settings = Settings(
        model="tiny-base",
        data=tmp_path / "data",
        adapter={"sums": adapter_folders["sums"]},
        max_upload=1 << 17,
    )
    with serving(settings, tmp_path / "model", ScriptedCore()) as running:
        yield running


@pytest.fixture
def http(own) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own.url, timeout=10) as client:
        yield client


def upload(http: httpx.Client, folder: Path, name: str = "letters") -> httpx.Response:
    files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
    return http.post("/v1/adapters", data={"name": name}, files=files)


def ask(http: httpx.Client, task: str | None, inputs: str = "x") -> httpx.Response:
    return http.post("/generate", json={"task": task, "inputs": inputs})


def test_adapters_that_come_and_go(own, http, tmp_path) -> None:
    before = samples(own.server.metrics)
    folder = write_adapter(tmp_path / "letters", tasks=("vowels", "upper"))
    size = sum(path.stat().st_size for path in folder.iterdir())

    assert upload(http, folder).status_code == 201
    assert upload(http, folder, name="others").status_code == 409
    ask(http, "upper")
    ask(http, None)
    active = own.server.registry.adapter("letters").active
    own.core.evict(active.digest)
    wait_until(lambda: active.digest not in own.server.engine.resident)
    ask(http, "upper")

    found = samples(own.server.metrics)
    grown = {name: value - before.get(name, 0) for name, value in found.items()}
    assert grown["adapter_cache_hits_total"] == 1
    assert grown["adapter_cache_misses_total"] == 1
    assert grown["adapter_cache_evictions_total"] == 1
    assert grown["adapter_load_seconds_count"] == 2
    assert grown["adapter_swap_seconds_count"] == 1
    assert grown['registry_uploads_total{result="kept",reason=""}'] == 1
    assert grown['registry_uploads_total{result="refused",reason="adapter_exists"}'] == 1
    assert grown["registry_upload_bytes_total"] > 2 * size
    assert grown["registry_blob_bytes"] == active.num_bytes
    assert grown["registry_generation"] >= 1
    assert 0 < found["registry_disk_free_bytes"] <= shutil.disk_usage(own.server.data).total


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ({"files": {"files": ("a.tar", b"x" * (1 << 17))}}, "payload_too_large"),
        ({"json": {"name": "letters"}}, "unsupported_media_type"),
        ({"data": {"name": "letters"}, "files": {"files": ("a.bin", b"x")}}, "pickle_rejected"),
        ({"files": {"files": ("a.tar", b"x")}}, "missing_field"),
    ],
)
def test_whatever_an_upload_is_refused_for_is_counted(own, http, sent, reason) -> None:
    error = http.post("/v1/adapters", **sent).json()["error"]
    assert error["code"] == reason
    name = f'registry_uploads_total{{result="refused",reason="{reason}"}}'
    assert samples(own.server.metrics)[name] == 1


@pytest.mark.parametrize("change", ["activate", "rollback", "activate-after-deactivation"])
def test_every_change_of_the_active_version_is_timed(own, http, tmp_path, change) -> None:
    for seed in (1, 2):
        folder = write_adapter(tmp_path / f"v{seed}", tasks=("vowels",), seed=seed)
        upload(http, folder).raise_for_status()
    if change == "activate-after-deactivation":
        http.post("/v1/adapters/letters:deactivate").raise_for_status()
    before = samples(own.server.metrics)["adapter_swap_seconds_count"]

    if change == "activate":
        answer = http.put("/v1/adapters/letters", json={"version": 1})
    else:
        answer = http.post("/v1/adapters/letters:rollback")

    assert answer.status_code == 200, answer.text
    assert samples(own.server.metrics)["adapter_swap_seconds_count"] == before + 1


def test_a_restart_is_counted(own, http) -> None:
    assert samples(own.server.metrics)["engine_restarts_total"] == 0
    ask(http, None, "crash")
    wait_until(lambda: own.server.ready)
    assert samples(own.server.metrics)["engine_restarts_total"] == 1


@pytest.mark.parametrize(
    ("inputs", "parameters", "status", "reason"),
    [
        ("hi", {}, 200, "stop"),
        ("hi", {"max_new_tokens": 1}, 200, "length"),
        ("endless", {"max_new_tokens": 200, "timeout": 0.02}, 504, "timeout"),
        ("fail", {}, 500, "error"),
        ("crash", {}, 503, "error"),
    ],
)
def test_a_sequence_is_counted_under_what_ended_it(
    own, http, inputs, parameters, status, reason
) -> None:
    body = {"task": None, "inputs": inputs, "parameters": parameters}
    assert http.post("/generate", json=body).status_code == status
    ended = {
        name: value
        for name, value in samples(own.server.metrics).items()
        if name.startswith("generations_total")
    }
    assert ended == {f'generations_total{{task="tiny-base",finish_reason="{reason}"}}': 1}


def test_the_log_says_that_a_stream_came_to_its_deadline(http, caplog) -> None:
    caplog.set_level("INFO", "oneplusn.access")
    parameters = {"max_new_tokens": 200, "timeout": 0.02}
    http.post("/generate_stream", json={"inputs": "endless", "parameters": parameters})
    wait_until(lambda: bool(caplog.records))
    assert caplog.records[-1].fields["finish_reason"] == "timeout"


def test_a_full_queue_turns_requests_away(tmp_path) -> None:
    core = ScriptedCore(paused=True)
    settings = Settings(model="tiny-base", max_queue=1)
    with serving(settings, tmp_path, core) as own, httpx.Client(base_url=own.url) as http:
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(ask, http, None)
            wait_until(lambda: bool(core.submitted))
            assert ask(http, None).status_code == 429
            core.paused = False
            first.result()
        assert samples(own.server.metrics)['queue_rejected_total{reason="full"}'] == 1


def test_a_client_that_leaves_before_its_answer_was_waiting(own, http) -> None:
    own.core.paused = True
    with pytest.raises(httpx.ReadTimeout):
        http.post("/generate", json={"task": None, "inputs": "x"}, timeout=0.3)
    name = 'client_disconnects_total{phase="waiting"}'
    wait_until(lambda: samples(own.server.metrics).get(name) == 1)
    ended = 'generations_total{task="tiny-base",finish_reason="abort"}'
    assert samples(own.server.metrics)[ended] == 1


@pytest.mark.anyio
async def test_a_reader_that_is_too_slow_is_counted(tmp_path) -> None:
    core, metrics = ScriptedCore(step_seconds=0), Metrics()
    engine = AsyncEngine(launch(core, tmp_path), metrics, max_queue=1)
    await engine.start()
    sampling = Sampling(max_tokens=10 * MAX_BUFFERED)
    engine.stream(Submit("slow", list(b"endless"), (), sampling))
    await asyncio.to_thread(core.cancelled_once.wait, 10)
    await engine.close()
    assert samples(metrics)["stream_backpressure_aborts_total"] == 1


def test_damaged_and_removed_contents_are_counted(tmp_path) -> None:
    registry, metrics = Registry(tmp_path, base_name="base"), Metrics()
    follow_registry(metrics, registry, tmp_path)
    digest = "sha256:" + "ab" * 32
    registry.blob(digest).mkdir()

    assert registry.sweep(now=lambda: 1e12) == ["ab" * 32]
    registry.quarantine(digest, "a test says so")
    registry.close()

    found = samples(metrics)
    assert found["registry_gc_removed_total"] == 1
    assert found["registry_corrupt_blobs_total"] == 1
