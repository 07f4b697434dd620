"""vLLM's names: as gateways and dashboards expect them, and one series for the tasks in flight."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from oneplusn.server.metrics import Metrics
from oneplusn.server.metrics_compat import MAX_LISTED, TasksInFlight, VllmNames
from oneplusn.server.settings import Settings
from serving import Live, serving, wait_until

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
LABELS = {"engine": "0", "model_name": "base"}
LORA = "vllm:lora_requests_info"

# Read by inference gateways (the first five), and by common dashboards.
EXPECTED = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    LORA: "gauge",
    "vllm:num_preemptions": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
}


@pytest.fixture
def names() -> VllmNames:
    return VllmNames("base", 64)


@pytest.fixture
def metrics(names) -> Metrics:
    metrics = Metrics("base", vllm=names)
    metrics.set("num_requests_running", 3)
    metrics.set("kv_cache_usage_ratio", 0.5)
    for task in ("a", "b"):
        metrics.count("prompt_tokens", 10, task=task)
        metrics.count("generations", 2, task=task, finish_reason="stop")
        metrics.count("generations", 1, task=task, finish_reason="length")
    metrics.observe("time_to_first_token_seconds", 0.02)
    return metrics


def families(metrics: Metrics) -> dict[str, object]:
    text = metrics.scrape().decode()
    return {f.name: f for f in text_string_to_metric_families(text) if f.name.startswith("vllm:")}


def samples(metrics: Metrics, name: str) -> list[tuple[dict[str, str], float]]:
    return [(sample.labels, sample.value) for sample in families(metrics)[name].samples]


def test_without_the_setting_there_are_none() -> None:
    assert families(Metrics("base")) == {}


def test_every_expected_name_is_there_with_its_type(metrics) -> None:
    found = {name: family.type for name, family in families(metrics).items()}
    assert found.items() >= EXPECTED.items()


def test_the_document_lists_them(metrics) -> None:
    declared = re.findall(r"^# TYPE (vllm:\w+) ", metrics.scrape().decode(), re.MULTILINE)
    documented = re.findall(r"^\| `(vllm:\w+)` \|", DOCUMENT.read_text("utf-8"), re.MULTILINE)
    assert sorted([*documented, LORA]) == sorted(declared)


def test_gauges_are_the_same(metrics) -> None:
    assert samples(metrics, "vllm:num_requests_running") == [(LABELS, 3)]
    assert samples(metrics, "vllm:kv_cache_usage_perc") == [(LABELS, 0.5)]


def test_counters_are_sums_over_the_tasks(metrics) -> None:
    assert samples(metrics, "vllm:prompt_tokens") == [(LABELS, 20)]
    assert samples(metrics, "vllm:request_success") == [
        ({**LABELS, "finished_reason": "stop"}, 4),
        ({**LABELS, "finished_reason": "length"}, 2),
    ]


def test_histograms_keep_their_buckets(metrics) -> None:
    found = families(metrics)["vllm:time_to_first_token_seconds"].samples
    buckets = {s.labels["le"]: s.value for s in found if s.name.endswith("_bucket")}
    assert (buckets["0.01"], buckets["0.025"], buckets["+Inf"]) == (0, 1, 1)
    assert all(sample.labels.items() >= LABELS.items() for sample in found)


def test_the_tasks_in_flight_are_named(metrics, names) -> None:
    names.in_flight = lambda: TasksInFlight({"b", "a"}, {"c"})
    before = time.time()
    ((labels, value),) = samples(metrics, LORA)
    assert labels == {
        "max_lora": "64",
        "running_lora_adapters": "a,b",
        "waiting_lora_adapters": "c",
    }
    assert before <= value <= time.time()


def test_5000_changes_leave_one_series(metrics, names) -> None:
    running: set[str] = set()
    names.in_flight = lambda: TasksInFlight(running, running)
    seen = set()
    for step in range(5000):
        running.clear()
        running.update(f"task-{(step * 31 + k * k) % 64}" for k in range(8))
        if step % 100 == 0:
            ((labels, _),) = samples(metrics, LORA)
            seen.add(labels["running_lora_adapters"])
    assert len(seen) > 10
    assert len(samples(metrics, LORA)) == 1
    assert metrics.scrape().count(LORA.encode() + b"{") == 1


def test_a_label_lists_no_more_than_a_gateway_reads(metrics, names) -> None:
    names.in_flight = lambda: TasksInFlight({f"task-{i}" for i in range(5000)}, set())
    ((labels, _),) = samples(metrics, LORA)
    assert len(labels["running_lora_adapters"].split(",")) == MAX_LISTED


@pytest.fixture(scope="module")
def compatible(adapter_folders, tmp_path_factory) -> Iterator[Live]:
    settings = Settings(
        model="tiny-base", adapter=adapter_folders, metrics_compat="vllm", max_num_seqs=12
    )
    with serving(settings, tmp_path_factory.mktemp("model")) as running:
        yield running


def test_a_server_names_the_tasks_of_its_requests(compatible) -> None:
    metrics, core = compatible.server.metrics, compatible.core

    def lora() -> dict[str, str]:
        ((labels, _),) = samples(metrics, LORA)
        return labels

    def ask(task: str) -> httpx.Response:
        body = {"task": task, "inputs": "endless", "parameters": {"max_new_tokens": 200}}
        return httpx.post(f"{compatible.url}/generate", json=body, timeout=20)

    assert lora() == {
        "max_lora": "12",
        "running_lora_adapters": "",
        "waiting_lora_adapters": "",
    }
    with ThreadPoolExecutor(2) as threads:
        core.step_seconds = 0.01
        first = threads.submit(ask, "add")
        wait_until(lambda: lora()["running_lora_adapters"] == "add")
        core.paused = True
        second = threads.submit(ask, "upper")
        wait_until(lambda: lora()["waiting_lora_adapters"] == "upper")
        assert lora()["running_lora_adapters"] == "add"
        core.paused, core.step_seconds = False, 0
        assert {first.result().status_code, second.result().status_code} == {200}
    assert lora()["running_lora_adapters"] == lora()["waiting_lora_adapters"] == ""
    assert httpx.get(f"{compatible.url}/metrics").text.count(LORA + "{") == 1
