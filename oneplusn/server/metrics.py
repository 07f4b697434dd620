"""The metrics of one server: who feeds them, and how they are read.

`metric_rows.py` lists them, `docs/metrics.md` explains them, and a test compares both with a live
scrape.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from oneplusn import __version__
from oneplusn.server.logs import PROBES, RequestRecord
from oneplusn.server.messages import Stats, StepStats
from oneplusn.server.metric_rows import METRICS
from oneplusn.server.metric_series import Distributions, Numbers, Series, preamble, series_of
from oneplusn.server.metrics_compat import VllmNames, vllm_lines

MAX_TASK_LABELS = 200
OTHER = "other"
BLEND = "blend"

# Why a request was not computed, by the code of its error.
_REJECTIONS = {
    "queue_full": "full",
    "too_many_connections": "connections",
    "draining": "draining",
    "engine_stopped": "unavailable",
    "engine_dead": "unavailable",
}
# How far a request was when its client left, by the status of the answer.
_PHASES = {None: "receiving", 499: "waiting"}


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedSequence:
    """A sequence that has ended. Times are in seconds from its hand-over to the engine.

    Attributes:
        label: Value of the task label.
        reason: Why it ended.
        is_complete: It was neither cancelled nor lost.
        tokens: Generated.
        cached_tokens: Of its prompt, found in the prefix cache.
        queued: Until its first step; None if that is not known.
        first: Until its first token; None if it got none.
        last: Until its latest token.
        whole: Until its end.
    """

    label: str
    reason: str
    is_complete: bool
    tokens: int
    cached_tokens: int
    queued: float | None
    first: float | None
    last: float
    whole: float


class Metrics:
    """The metrics of one server. All methods are called on the event loop's thread.

    Attributes:
        series: What every metric holds, by name.
        vllm: Set to expose them under vLLM's names, too.
    """

    def __init__(self, base_name: str = "base", *, vllm: VllmNames | None = None) -> None:
        """Begin at zero; the base and blends have a task label of their own from the start."""
        self.vllm = vllm
        self.series: dict[str, Series] = {row.name: series_of(row) for row in METRICS}
        self._followed: dict[str, Callable[[], float]] = {}
        self._tasks = {name: name for name in (base_name, BLEND)}
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        self.set(
            "build_info",
            1,
            version=__version__,
            python=platform.python_version(),
            torch=_installed("torch"),
            triton=_installed("triton"),
        )

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        series = self.series[name]
        assert isinstance(series, Numbers)
        series.add(amount, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        series = self.series[name]
        assert isinstance(series, Numbers)
        series.set(value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add an observation to a histogram or a summary."""
        series = self.series[name]
        assert isinstance(series, Distributions)
        series.observe(value, labels)

    def follow(self, name: str, read: Callable[[], float]) -> None:
        """Ask for the value of a gauge, or of a counter kept elsewhere, at every scrape.

        What raises an `OSError` keeps the value that it had.
        """
        self._followed[name] = read

    def task_label(self, task: str) -> str:
        """Return the label value of a task: its name, or `other` once the cap is reached.

        The first tasks keep their own value for the life of the process, so that no series ever
        changes its meaning.
        """
        if task not in self._tasks and len(self._tasks) < MAX_TASK_LABELS:
            self._tasks[task] = task
        return self._tasks.get(task, OTHER)

    def observe_request(self, record: RequestRecord) -> None:
        """Record how a request was answered."""
        self.count(
            "requests",
            route=record.route,
            status=str(record.status or "none"),
            code=record.code or "",
        )
        if record.disconnect:
            self.count("client_disconnects", phase=_PHASES.get(record.status, "streaming"))
        if record.status == 401:
            self.count("auth_failures")
        reason = _rejection(record)
        if reason is not None:
            self.count("queue_rejected", reason=reason)

    def observe_sequence(self, end: EndedSequence) -> None:
        """Record what became of a sequence."""
        task = end.label
        self.count("generations", task=task, finish_reason=end.reason)
        self.count("generation_tokens", end.tokens, task=task)
        self.count("cached_prompt_tokens", end.cached_tokens, task=task)
        if end.first is not None:
            self.observe("task_time_to_first_token_seconds", end.first, task=task)
            if end.queued is not None:
                self.observe("request_queue_time_seconds", end.queued)
                self.observe("request_prefill_time_seconds", end.first - end.queued)
        if end.is_complete:
            self._observe_complete(end)

    def observe_step(self, stats: StepStats) -> None:
        """Record what one step of the engine did."""
        self.set("num_requests_running", stats.running)
        self.set("num_requests_waiting", stats.waiting)
        self.set("kv_cache_usage_ratio", stats.kv_usage)
        if not stats.num_tokens:
            return
        self.count("preemptions", stats.preemptions)
        self.set("engine_last_step_timestamp_seconds", time.time())
        self.observe("engine_step_seconds", stats.step_seconds)
        self.observe("batch_tokens", stats.num_tokens)
        self.observe("batch_distinct_tasks", stats.distinct_tasks)
        self.observe("batch_distinct_clusters", stats.distinct_clusters)

    def observe_occupancy(self, stats: Stats) -> None:
        """Record how large the engine's two budgets are."""
        self.set("kv_cache_blocks", stats.kv_blocks)
        self.set("adapter_memory_bytes", stats.pool_bytes)

    def scrape(self) -> bytes:
        """Return every metric in Prometheus' text format."""
        for name, read in self._followed.items():
            with suppress(OSError):
                self.set(name, read())
        return "".join(self._lines()).encode() + generate_latest(self._process)

    def _observe_complete(self, end: EndedSequence) -> None:
        self.observe("request_generation_tokens", end.tokens)
        self.observe("e2e_request_latency_seconds", end.whole)
        self.observe("task_e2e_request_latency_seconds", end.whole, task=end.label)
        if end.queued is not None:
            self.observe("request_inference_time_seconds", end.last - end.queued)
        if end.first is None:
            return
        decode = end.last - end.first
        self.observe("request_decode_time_seconds", decode)
        if end.tokens > 1:
            each = decode / (end.tokens - 1)
            self.observe("task_time_per_output_token_seconds", each, task=end.label)

    def _lines(self) -> Iterator[str]:
        for series in self.series.values():
            row = series.row
            yield preamble(row.exposed, row.type, row.help)
            yield from series.lines()
        if self.vllm is not None:
            yield from vllm_lines(self.vllm, self.series)


def _rejection(record: RequestRecord) -> str | None:
    """Say why a request was turned away before it was computed, if it was."""
    if record.route.startswith(PROBES):
        return None
    if record.code == "deadline_exceeded" and record.ttft_ms is None:
        return "deadline"
    return _REJECTIONS.get(record.code or "")


def _installed(distribution: str) -> str:
    """Return the version of a package without importing it; empty if it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
