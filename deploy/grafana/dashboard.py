"""Write the Grafana dashboard: one row of the table below is one panel.

python deploy/grafana/dashboard.py > deploy/grafana/dashboards/oneplusn.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

WIDTH, HEIGHT, COLUMNS = 8, 7, 3
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
HERE = '{instance=~"$instance"}'


class Panel(NamedTuple):
    """One panel.

    Attributes:
        unit: As Grafana calls it.
        queries: Name of a line (`{{label}}` is filled in) -> PromQL.
    """

    title: str
    unit: str
    queries: dict[str, str]
    description: str = ""


def rate(metric: str, by: str = "") -> str:
    """Return the increase a second of a counter, added up over all labels but `by`."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate(oneplusn_{metric}{HERE}[$__rate_interval]))"


def gauge(metric: str) -> str:
    """Return the sum of a gauge over the servers."""
    return f"sum (oneplusn_{metric}{HERE})"


def mean(metric: str, by: str = "") -> str:
    """Return the mean of what a histogram or a summary observed."""
    return f"{rate(f'{metric}_sum', by)} / {rate(f'{metric}_count', by)}"


def quantiles(metric: str, *shares: float) -> dict[str, str]:
    """Return percentiles of a histogram."""
    buckets = rate(f"{metric}_bucket", "le")
    return {f"p{100 * share:g}": f"histogram_quantile({share:g}, {buckets})" for share in shares}


def by_task(query: str) -> dict[str, str]:
    """Return the ten tasks with the largest values."""
    return {"{{task}}": f"topk(10, {query})"}


SECTIONS: dict[str, Sequence[Panel]] = {
    "Traffic": (
        Panel("Requests", "reqps", {"{{status}}": rate("requests_total", "status")}),
        Panel("Generated tokens", "short", by_task(rate("generation_tokens_total", "task"))),
        Panel("Prompt tokens", "short", by_task(rate("prompt_tokens_total", "task"))),
        Panel(
            "Sequences ended",
            "cps",
            {"{{finish_reason}}": rate("generations_total", "finish_reason")},
        ),
        Panel(
            "Turned away or gone",
            "cps",
            {
                "rejected: {{reason}}": rate("queue_rejected_total", "reason"),
                "client left: {{phase}}": rate("client_disconnects_total", "phase"),
                "reader too slow": rate("stream_backpressure_aborts_total"),
                "wrong key": rate("auth_failures_total"),
            },
        ),
        Panel(
            "Prompt tokens from the cache",
            "percentunit",
            {"share": f"{rate('cached_prompt_tokens_total')} / {rate('prompt_tokens_total')}"},
        ),
    ),
    "Latency": (
        Panel(
            "Time to first token", "s", quantiles("time_to_first_token_seconds", 0.5, 0.95, 0.99)
        ),
        Panel(
            "Time between tokens", "s", quantiles("inter_token_latency_seconds", 0.5, 0.95, 0.99)
        ),
        Panel("Whole sequence", "s", quantiles("e2e_request_latency_seconds", 0.5, 0.95, 0.99)),
        Panel(
            "Where the time goes, mean",
            "s",
            {
                "queue": mean("request_queue_time_seconds"),
                "prefill": mean("request_prefill_time_seconds"),
                "decode": mean("request_decode_time_seconds"),
            },
        ),
        Panel(
            "Time to first token by task, mean",
            "s",
            by_task(mean("task_time_to_first_token_seconds", "task")),
        ),
        Panel(
            "Time between tokens by task, mean",
            "s",
            by_task(mean("task_time_per_output_token_seconds", "task")),
        ),
    ),
    "Engine": (
        Panel(
            "Sequences",
            "short",
            {"running": gauge("num_requests_running"), "waiting": gauge("num_requests_waiting")},
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            {"{{instance}}": f"oneplusn_kv_cache_usage_ratio{HERE}"},
        ),
        Panel("Step", "s", quantiles("engine_step_seconds", 0.5, 0.99)),
        Panel(
            "Mixed in a step, mean",
            "short",
            {
                "tasks": mean("batch_distinct_tasks"),
                "clusters": mean("batch_distinct_clusters"),
                "rows": mean("batch_tokens"),
            },
            "How many different tasks and clusters share one batch.",
        ),
        Panel("Preemptions", "cps", {"preemptions": rate("preemptions_total")}),
        Panel(
            "Engine restarts",
            "short",
            {"{{instance}}": f"increase(oneplusn_engine_restarts_total{HERE}[$__range])"},
        ),
    ),
    "Adapters": (
        Panel("Adapter versions resident", "short", {"versions": gauge("adapters_resident")}),
        Panel(
            "Adapter memory",
            "bytes",
            {"held": gauge("adapter_resident_bytes"), "there": gauge("adapter_memory_bytes")},
        ),
        Panel(
            "Resident when asked for",
            "percentunit",
            {
                "share": f"{rate('adapter_cache_hits_total')} / "
                f"({rate('adapter_cache_hits_total')} + {rate('adapter_cache_misses_total')})"
            },
        ),
        Panel(
            "Loads and swaps",
            "s",
            {
                **{f"load {k}": v for k, v in quantiles("adapter_load_seconds", 0.5, 0.99).items()},
                **{f"swap {k}": v for k, v in quantiles("adapter_swap_seconds", 0.5, 0.99).items()},
            },
        ),
        Panel(
            "Uploads",
            "cps",
            {
                "{{result}} {{reason}}": rate("registry_uploads_total", "result, reason"),
                "damaged contents": rate("registry_corrupt_blobs_total"),
            },
        ),
        Panel(
            "Data folder",
            "bytes",
            {"adapters": gauge("registry_blob_bytes"), "free": gauge("registry_disk_free_bytes")},
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    return {
        "uid": "oneplusn",
        "title": "oneplusn",
        "tags": ["oneplusn", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "panels": list(_panels()),
    }


def _variables() -> list[dict[str, Any]]:
    instances = "label_values(oneplusn_build_info, instance)"
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
        },
        {
            "name": "instance",
            "label": "Server",
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": instances, "refId": "instance"},
            "definition": instances,
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]


def _panels() -> Iterator[dict[str, Any]]:
    """Yield a heading for every section, and its panels, three beside each other."""
    number, top = 1, 0
    for heading, panels in SECTIONS.items():
        yield {
            "id": number,
            "type": "row",
            "title": heading,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": WIDTH * COLUMNS, "h": 1},
            "panels": [],
        }
        number, top = number + 1, top + 1
        for index, panel in enumerate(panels):
            line, column = divmod(index, COLUMNS)
            place = {"x": column * WIDTH, "y": top + line * HEIGHT, "w": WIDTH, "h": HEIGHT}
            yield {**_time_series(panel), "id": number, "gridPos": place}
            number += 1
        top += -(-len(panels) // COLUMNS) * HEIGHT


def _time_series(panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": query, "legendFormat": name}
        for index, (name, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))  # noqa: T201  (this is what it is for)
