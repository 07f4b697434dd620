"""Metrics: every row is in a live scrape and in the document, and labels have an end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from oneplusn.server.messages import StepStats
from oneplusn.server.metrics import MAX_TASK_LABELS, METRICS, OTHER, PREFIX, Metrics
from serving import wait_until

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def families(text: str) -> dict[str, object]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(metrics: Metrics, line: str) -> float:
    found = re.search(
        rf"^{re.escape(PREFIX + line)} (\S+)$", metrics.scrape().decode(), re.MULTILINE
    )
    assert found is not None, f"no line {line}"
    return float(found[1])


def test_a_scrape_holds_every_row(http) -> None:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")

    scraped = families(answer.text)

    ours = {name for name in scraped if name.startswith(PREFIX)}
    assert ours == {PREFIX + row.name for row in METRICS}
    for row in METRICS:
        assert scraped[PREFIX + row.name].type == row.type


@pytest.mark.parametrize("row", METRICS, ids=lambda row: row.name)
def test_a_row_keeps_the_naming_rules(row) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", row.name)
    assert not row.name.endswith(("_total", "_count", "_sum", "_bucket", "_ms", "_created"))
    assert row.help.endswith(".")
    assert bool(row.buckets) == (row.type == "histogram")
    assert list(row.buckets) == sorted(set(row.buckets))


def test_the_document_lists_every_row() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    documented = set(re.findall(rf"^\| `({PREFIX}\w+)` \|", text, re.MULTILINE))
    exposed = {PREFIX + row.name + ("_total" if row.type == "counter" else "") for row in METRICS}
    assert documented == exposed
    for row in METRICS:
        assert row.help in text


def test_requests_are_counted_by_route_and_status(http) -> None:
    http.post("/generate", json={"task": "add", "inputs": "1"})
    http.get("/v1/models/unheard-of")
    http.get("/no/such/path/1")
    http.get("/no/such/path/2")

    text = http.get("/metrics").text

    assert 'oneplusn_requests_total{route="/generate",status="200"} 1.0' in text
    assert 'oneplusn_requests_total{route="/v1/models/{model:path}",status="404"} 1.0' in text
    assert 'oneplusn_requests_total{route="unmatched",status="404"} 2.0' in text
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
    assert value(metrics, 'generations_total{finish_reason="stop",task="upper"}') == 1


def test_gauges_follow_the_engine(live, http) -> None:
    http.post("/generate", json={"task": None, "inputs": "x"})
    wait_until(lambda: value(live.server.metrics, "num_requests_running") == 0)
    assert value(live.server.metrics, "adapters_resident") == 2
    assert value(live.server.metrics, "adapter_resident_bytes") == 2000


def test_a_step_feeds_its_metrics() -> None:
    metrics = Metrics()
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
    assert value(metrics, 'batch_distinct_tasks_bucket{le="11.0"}') == 0
    assert value(metrics, 'batch_distinct_tasks_bucket{le="12.0"}') == 1
    assert value(metrics, "batch_distinct_clusters_sum") == 3
    assert value(metrics, "engine_step_seconds_sum") == 0.02


def test_task_labels_have_a_cap_and_never_change() -> None:
    metrics = Metrics()
    first = [metrics.task_label(f"task-{index}") for index in range(MAX_TASK_LABELS)]
    assert len(set(first)) == MAX_TASK_LABELS
    assert metrics.task_label("one-more") == OTHER
    assert metrics.task_label("task-7") == "task-7"


def test_two_servers_in_a_process_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.count("preemptions", 3)
    assert value(other, "preemptions_total") == 0
