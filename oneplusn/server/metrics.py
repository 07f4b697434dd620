"""Metrics, one row each: to add one, add a row and the line that feeds it.

`docs/metrics.md` lists the rows, and a test compares it with a live scrape. Label values are
bounded: routes and statuses by what the server knows, tasks by a cap.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from oneplusn import __version__
from oneplusn.server.messages import StepStats

PREFIX = "oneplusn_"
MAX_TASK_LABELS = 200
OTHER = "other"

_COUNTS = (*range(17), 24, 32, 48, 64, 96, 128, 192, 256)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (*_SHORT, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Row:
    """One metric. `name` goes without the prefix, and without `_total` for counters."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS = (
    Row("build_info", "gauge", "Always 1; says which version runs.", ("version",)),
    Row("requests", "counter", "HTTP requests answered.", ("route", "status")),
    Row("client_disconnects", "counter", "Requests whose client went away early."),
    Row("generations", "counter", "Sequences ended.", ("task", "finish_reason")),
    Row("prompt_tokens", "counter", "Prompt tokens accepted.", ("task",)),
    Row("cached_prompt_tokens", "counter", "Those found in the prefix cache.", ("task",)),
    Row("generation_tokens", "counter", "Tokens generated.", ("task",)),
    Row("request_prompt_tokens", "histogram", "Prompt length.", buckets=_TOKENS),
    Row("request_generation_tokens", "histogram", "Output length.", buckets=_TOKENS),
    Row(
        "time_to_first_token_seconds",
        "histogram",
        "From the hand-over to the engine to the first token.",
        buckets=_LONG,
    ),
    Row(
        "inter_token_latency_seconds",
        "histogram",
        "From one token of a sequence to its next.",
        buckets=_SHORT,
    ),
    Row(
        "e2e_request_latency_seconds",
        "histogram",
        "From the hand-over to the engine to the end of the sequence.",
        buckets=_LONG,
    ),
    Row("num_requests_running", "gauge", "Sequences that hold KV blocks."),
    Row("num_requests_waiting", "gauge", "Sequences that wait for blocks, rows or an adapter."),
    Row("kv_cache_usage_ratio", "gauge", "Share of the KV blocks in use, 0 to 1."),
    Row("preemptions", "counter", "Sequences that lost their KV blocks to others."),
    Row("engine_step_seconds", "histogram", "Duration of a step.", buckets=_SHORT),
    Row("batch_tokens", "histogram", "Rows of a step's batch.", buckets=_TOKENS),
    Row(
        "batch_distinct_tasks",
        "histogram",
        "Tasks and blends that shared a step, the base not counted.",
        buckets=_COUNTS,
    ),
    Row(
        "batch_distinct_clusters",
        "histogram",
        "Clusters that shared a step, the base not counted.",
        buckets=_COUNTS,
    ),
    Row("adapters_resident", "gauge", "Adapter versions in the engine's memory."),
    Row("adapter_resident_bytes", "gauge", "Memory that they hold."),
    Row("adapter_uploads", "counter", "Uploads by outcome, an error's code or `ok`.", ("result",)),
)


class Metrics:
    """The metrics of one server. All methods are called on the event loop's thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._tasks: dict[str, str] = {}
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        for row in METRICS:
            self._add(row)
        ProcessCollector(registry=self._registry)
        self.set("build_info", 1, version=__version__)

    def _add(self, row: Row) -> None:
        name = PREFIX + row.name
        if row.type == "counter":
            self._counters[row.name] = Counter(name, row.help, row.labels, registry=self._registry)
        elif row.type == "gauge":
            self._gauges[row.name] = Gauge(name, row.help, row.labels, registry=self._registry)
        else:
            self._histograms[row.name] = Histogram(
                name, row.help, row.labels, registry=self._registry, buckets=row.buckets
            )

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def observe(self, name: str, value: float) -> None:
        """Add an observation to a histogram."""
        self._histograms[name].observe(value)

    def task_label(self, task: str) -> str:
        """Return the label value of a task: its name, or `other` once the cap is reached.

        The first tasks keep their own value for the life of the process, so that no series ever
        changes its meaning.
        """
        if task not in self._tasks and len(self._tasks) < MAX_TASK_LABELS:
            self._tasks[task] = task
        return self._tasks.get(task, OTHER)

    def observe_step(self, stats: StepStats) -> None:
        """Record what one step of the engine did."""
        self.set("num_requests_running", stats.running)
        self.set("num_requests_waiting", stats.waiting)
        self.set("kv_cache_usage_ratio", stats.kv_usage)
        if not stats.num_tokens:
            return
        self.count("preemptions", stats.preemptions)
        self.observe("engine_step_seconds", stats.step_seconds)
        self.observe("batch_tokens", stats.num_tokens)
        self.observe("batch_distinct_tasks", stats.distinct_tasks)
        self.observe("batch_distinct_clusters", stats.distinct_clusters)

    def scrape(self) -> bytes:
        """Return every metric in Prometheus' text format."""
        shown = CollectorRegistry()
        shown.register(_WithoutCreation(self._registry))
        return generate_latest(shown)


class _WithoutCreation(Collector):
    """Hide the creation times that the client library adds to every counter and histogram."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Family]:
        """Yield the families, each without its `_created` samples."""
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family
