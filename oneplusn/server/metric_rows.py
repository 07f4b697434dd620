"""Which metrics there are: to add one, add a row here, its line in the document, and what feeds it.

Durations are in seconds, sizes in bytes. Label values are bounded: routes, codes and reasons by
what the server knows, tasks by a cap. Distributions over tasks are summaries, that is a sum and a
count: buckets for every one of 200 tasks would be some ten thousand series.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "oneplusn_"

MetricType = Literal["counter", "gauge", "histogram", "summary"]

_COUNTS = (*range(17), 24, 32, 48, 64, 96, 128, 192, 256)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (*_SHORT, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Row:
    """One metric.

    Attributes:
        name: Without the prefix, and without `_total` for counters.
        help: What it says, in one sentence.
        labels: Names of its labels.
        buckets: Upper bounds of a histogram's buckets, ascending, without infinity.
    """

    name: str
    type: MetricType
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exposed(self) -> str:
        """Its name in a scrape."""
        return f"{PREFIX}{self.name}{'_total' if self.type == 'counter' else ''}"


def _counter(name: str, text: str, *labels: str) -> Row:
    return Row(name, "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> Row:
    return Row(name, "gauge", text, labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Row:
    return Row(name, "histogram", text, buckets=buckets)


def _by_task(name: str, text: str) -> Row:
    return Row(name, "summary", text, ("task",))


_REQUESTS = (
    _counter("requests", "HTTP requests answered.", "route", "status", "code"),
    _gauge("http_connections", "Connections of clients that are open."),
    _counter("queue_rejected", "Requests turned away before they were computed.", "reason"),
    _counter("auth_failures", "Requests without the API key, or with a wrong one."),
    _counter("client_disconnects", "Requests whose client went away early.", "phase"),
    _counter("stream_backpressure_aborts", "Sequences ended because their reader was too slow."),
)

_SEQUENCES = (
    _counter("generations", "Sequences ended.", "task", "finish_reason"),
    _counter("prompt_tokens", "Prompt tokens accepted.", "task"),
    _counter("cached_prompt_tokens", "Those found in the prefix cache.", "task"),
    _counter("generation_tokens", "Tokens generated.", "task"),
    _histogram("request_prompt_tokens", "Prompt length.", _TOKENS),
    _histogram("request_generation_tokens", "Output length.", _TOKENS),
    _histogram("request_params_max_tokens", "Most tokens that a sequence may generate.", _TOKENS),
    _histogram(
        "time_to_first_token_seconds",
        "From the hand-over to the engine to the first token.",
        _LONG,
    ),
    _histogram("inter_token_latency_seconds", "From one token of a sequence to its next.", _SHORT),
    _histogram(
        "e2e_request_latency_seconds",
        "From the hand-over to the engine to the end of the sequence.",
        _LONG,
    ),
    _histogram(
        "request_queue_time_seconds", "From the hand-over to a sequence's first step.", _LONG
    ),
    _histogram("request_prefill_time_seconds", "From the first step to the first token.", _LONG),
    _histogram("request_decode_time_seconds", "From the first token to the last.", _LONG),
    _histogram("request_inference_time_seconds", "From the first step to the last token.", _LONG),
    _by_task("task_time_to_first_token_seconds", "Time to the first token, by task."),
    _by_task(
        "task_time_per_output_token_seconds",
        "Mean time between the tokens of a sequence, by task.",
    ),
    _by_task("task_e2e_request_latency_seconds", "Duration of sequences, by task."),
)

_ENGINE = (
    _gauge("build_info", "Always 1; says what runs.", "version", "python", "torch", "triton"),
    _gauge("num_requests_running", "Sequences that hold KV blocks."),
    _gauge("num_requests_waiting", "Sequences that wait for blocks, rows or an adapter."),
    _gauge("kv_cache_usage_ratio", "Share of the KV blocks in use, 0 to 1."),
    _gauge("kv_cache_blocks", "KV blocks that there are."),
    _counter("preemptions", "Sequences that lost their KV blocks to others."),
    _counter("engine_restarts", "Engines started after the first."),
    _histogram("engine_step_seconds", "Duration of a step.", _SHORT),
    _gauge("engine_last_step_timestamp_seconds", "When the latest step ended, in Unix time."),
    _histogram("batch_tokens", "Rows of a step's batch.", _TOKENS),
    _histogram(
        "batch_distinct_tasks",
        "Tasks and blends that shared a step, the base not counted.",
        _COUNTS,
    ),
    _histogram(
        "batch_distinct_clusters",
        "Clusters that shared a step, the base not counted.",
        _COUNTS,
    ),
)

_ADAPTERS = (
    _gauge("adapters_resident", "Adapter versions in the engine's memory."),
    _gauge("adapter_resident_bytes", "Memory that they hold."),
    _gauge("adapter_memory_bytes", "Memory that there is for them."),
    _counter("adapter_cache_hits", "Sequences that found their adapter versions resident."),
    _counter("adapter_cache_misses", "Sequences that had to wait for an adapter version."),
    _counter("adapter_cache_evictions", "Adapter versions that made room for others."),
    _histogram(
        "adapter_load_seconds", "From asking the engine for a version until it is there.", _LONG
    ),
    _histogram(
        "adapter_swap_seconds",
        "From a checked upload, or the request, until a version is active.",
        _LONG,
    ),
)

_REGISTRY = (
    _counter("registry_uploads", "Uploads of adapters by outcome.", "result", "reason"),
    _counter("registry_upload_bytes", "Bytes received in uploads."),
    _gauge("registry_blob_bytes", "Size of the contents of all versions."),
    _gauge("registry_disk_free_bytes", "Room left on the disk of the data folder."),
    _gauge("registry_generation", "How often the registry has been changed."),
    _counter("registry_gc_removed", "Files removed that no version needed any more."),
    _counter("registry_corrupt_blobs", "Contents put aside because they were damaged."),
)

METRICS = (*_REQUESTS, *_SEQUENCES, *_ENGINE, *_ADAPTERS, *_REGISTRY)
