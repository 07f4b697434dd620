"""Metrics: every row is in a live scrape and in the document, and labels have an end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metric_lint import problems
from oneplusn.server.logs import RequestRecord
from oneplusn.server.messages import Stats, StepStats
from oneplusn.server.metric_rows import METRICS, PREFIX
from oneplusn.server.metrics import BLEND, MAX_TASK_LABELS, OTHER, Metrics
from serving import wait_until

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def value(metrics: Metrics, line: str) -> float:
    found = re.search(
        rf"^{re.escape(PREFIX + line)} (\S+)$", metrics.scrape().decode(), re.MULTILINE
    )
    assert found is not None, f"no line {line}"
    return float(found[1])


def lines_of(metrics: Metrics, name: str) -> list[str]:
    text = metrics.scrape().decode()
    return re.findall(rf"^({PREFIX}{name}[{{ ].*)$", text, re.MULTILINE)


def request(**fields: object) -> RequestRecord:
    record = RequestRecord("id", "POST", route="/generate", status=200)
    for name, given in fields.items():
        setattr(record, name, given)
    return record


def test_a_live_scrape_declares_every_row(http) -> None:
    answer = http.get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    declared = dict(re.findall(rf"^# TYPE ({PREFIX}\w+) (\w+)$", answer.text, re.MULTILINE))
    assert declared == {row.exposed: row.type for row in METRICS}
    assert "\nprocess_resident_memory_bytes " in answer.text
    assert problems(answer.text) == []


def test_the_document_lists_every_row() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    documented = re.findall(rf"^\| `({PREFIX}\w+)` \| (\w+) \|([^|]*)\|", text, re.MULTILINE)

    assert {
        (name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in documented
    } == {(row.exposed, row.type, row.labels) for row in METRICS}
    assert len(documented) == len(METRICS)
    assert [row.name for row in METRICS if row.help not in text] == []
    assert f"first\n  {MAX_TASK_LABELS} values" in text


def test_requests_are_counted_by_route_status_and_code(http) -> None:
    http.post("/generate", json={"task": "add", "inputs": "1"})
    http.get("/v1/models/unheard-of")
    http.get("/no/such/path/1")
    http.get("/no/such/path/2")

    text = http.get("/metrics").text

    for labels in (
        'route="/generate",status="200",code=""} 1.0',
        'route="/v1/models/{model}",status="404",code="model_not_found"} 1.0',
        'route="unmatched",status="404",code="not_found"} 2.0',
    ):
        assert f"oneplusn_requests_total{{{labels}\n" in text
    assert "unheard-of" not in text


def test_a_mixed_batch_shows_in_the_histograms(http, live) -> None:
    before = value(live.server.metrics, "time_to_first_token_seconds_count")
    live.core.together = 3
    body = {"task": ["add", "upper", "vowels"], "inputs": ["a" * 30, "b" * 30, "c" * 30]}
    http.post("/generate", json=body)

    metrics = live.server.metrics
    above_two = value(metrics, 'batch_distinct_tasks_bucket{le="3.0"}') - value(
        metrics, 'batch_distinct_tasks_bucket{le="2.0"}'
    )
    assert above_two >= 30
    assert value(metrics, 'batch_distinct_clusters_bucket{le="2.0"}') > 0
    assert value(metrics, "time_to_first_token_seconds_count") == before + 3
    assert value(metrics, 'generation_tokens_total{task="upper"}') == len("UPPER*1:") + 30 + 1
    assert value(metrics, 'prompt_tokens_total{task="upper"}') == 31
    assert value(metrics, 'cached_prompt_tokens_total{task="upper"}') == 16
    assert value(metrics, 'generations_total{task="upper",finish_reason="stop"}') == 1


def test_a_task_has_its_own_latencies(http, live) -> None:
    http.post("/generate", json={"task": "vowels", "inputs": "abc"})
    http.post("/generate", json={"task": "vowels", "inputs": "abc"})

    def of(name: str) -> float:
        return value(live.server.metrics, f'task_{name}{{task="vowels"}}')

    count = of("time_to_first_token_seconds_count")
    assert count >= 2
    assert of("e2e_request_latency_seconds_count") == count
    assert of("time_per_output_token_seconds_count") == count
    first, whole = of("time_to_first_token_seconds_sum"), of("e2e_request_latency_seconds_sum")
    assert 0 < first < whole


def test_gauges_follow_the_engine(live, http) -> None:
    http.post("/generate", json={"task": None, "inputs": "x"})
    wait_until(lambda: value(live.server.metrics, "num_requests_running") == 0)
    assert value(live.server.metrics, "adapters_resident") == 2
    assert value(live.server.metrics, "adapter_resident_bytes") == 2000


def test_a_step_feeds_its_metrics(monkeypatch) -> None:
    metrics = Metrics()
    monkeypatch.setattr("time.time", lambda: 1234.5)
    metrics.observe_step(
        StepStats(
            num_tokens=40,
            distinct_tasks=12,
            distinct_clusters=3,
            running=5,
            waiting=2,
            kv_usage=0.25,
            step_seconds=0.02,
            preemptions=1,
        )
    )
    assert value(metrics, "num_requests_running") == 5
    assert value(metrics, "num_requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_ratio") == 0.25
    assert value(metrics, "preemptions_total") == 1
    assert value(metrics, "engine_last_step_timestamp_seconds") == 1234.5
    assert value(metrics, 'batch_distinct_tasks_bucket{le="11.0"}') == 0
    assert value(metrics, 'batch_distinct_tasks_bucket{le="12.0"}') == 1
    assert value(metrics, "batch_distinct_clusters_sum") == 3
    assert value(metrics, "engine_step_seconds_sum") == 0.02


def test_a_turn_without_rows_is_no_step() -> None:
    metrics = Metrics()
    metrics.observe_step(StepStats(waiting=3))
    assert value(metrics, "num_requests_waiting") == 3
    assert value(metrics, "engine_step_seconds_count") == 0
    assert lines_of(metrics, "engine_last_step_timestamp_seconds") == []


def test_the_budgets_are_told() -> None:
    metrics = Metrics()
    metrics.observe_occupancy(
        Stats(kv_blocks=64, kv_blocks_free=60, pool_bytes=4096, pool_used_bytes=512, resident=[])
    )
    assert value(metrics, "kv_cache_blocks") == 64
    assert value(metrics, "adapter_memory_bytes") == 4096


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"status": 429, "code": "queue_full"}, 'queue_rejected_total{reason="full"}'),
        ({"status": 503, "code": "draining"}, 'queue_rejected_total{reason="draining"}'),
        ({"status": 503, "code": "engine_dead"}, 'queue_rejected_total{reason="unavailable"}'),
        ({"status": 504, "code": "deadline_exceeded"}, 'queue_rejected_total{reason="deadline"}'),
        ({"status": 401, "code": "invalid_api_key"}, "auth_failures_total"),
        ({"status": None, "disconnect": True}, 'client_disconnects_total{phase="receiving"}'),
        ({"status": 499, "disconnect": True}, 'client_disconnects_total{phase="waiting"}'),
        ({"status": 200, "disconnect": True}, 'client_disconnects_total{phase="streaming"}'),
    ],
)
def test_what_went_wrong_with_a_request_is_counted(fields, line) -> None:
    metrics = Metrics()
    metrics.observe_request(request(**fields))
    assert value(metrics, line) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"status": 400, "code": "invalid_value"},
        {"status": 503, "code": "engine_stopped", "route": "/health/ready"},
        {"status": 504, "code": "deadline_exceeded", "ttft_ms": 12.0},
    ],
    ids=["answered", "refused", "probed", "begun"],
)
def test_what_is_no_rejection_is_not_counted_as_one(fields) -> None:
    metrics = Metrics()
    metrics.observe_request(request(**fields))
    for name in ("queue_rejected_total", "client_disconnects_total"):
        assert lines_of(metrics, name) == []
    assert value(metrics, "auth_failures_total") == 0


def test_a_followed_value_is_read_at_every_scrape() -> None:
    metrics = Metrics()
    readings = iter([7, 8])
    metrics.follow("registry_generation", lambda: next(readings))
    assert value(metrics, "registry_generation") == 7
    assert value(metrics, "registry_generation") == 8


def test_a_disk_that_cannot_be_asked_does_not_break_a_scrape(tmp_path) -> None:
    metrics = Metrics()
    size = tmp_path / "file"
    size.write_bytes(b"12345")
    metrics.follow("registry_disk_free_bytes", lambda: size.stat().st_size)
    assert value(metrics, "registry_disk_free_bytes") == 5
    size.unlink()
    assert value(metrics, "registry_disk_free_bytes") == 5


def test_task_labels_have_a_cap_and_never_change() -> None:
    metrics = Metrics("the-base")
    own = [metrics.task_label(f"task-{index}") for index in range(MAX_TASK_LABELS - 2)]
    assert len(set(own)) == len(own)
    assert metrics.task_label("one-more") == OTHER
    assert metrics.task_label("task-7") == "task-7"
    assert metrics.task_label("one-more") == OTHER


@pytest.mark.parametrize("name", ["the-base", BLEND])
def test_the_base_and_blends_keep_their_own_label(name) -> None:
    metrics = Metrics("the-base")
    for index in range(2 * MAX_TASK_LABELS):
        metrics.task_label(f"task-{index}")
    assert metrics.task_label(name) == name


def test_two_servers_in_a_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.count("preemptions", 3)
    assert value(other, "preemptions_total") == 0


def test_a_label_that_a_row_does_not_have_is_our_fault() -> None:
    with pytest.raises(AssertionError, match="prompt_tokens has the labels"):
        Metrics().count("prompt_tokens", 1, task="a", route="/")
