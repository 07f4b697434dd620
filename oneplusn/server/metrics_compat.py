"""The same metrics under vLLM's names, for inference gateways and dashboards that know those.

Off by default, since names with colons break Prometheus' rules for exporters. Counters by task
become sums over the tasks, as vLLM has no such label.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from oneplusn.server.metric_rows import MetricType
from oneplusn.server.metric_series import (
    Distributions,
    LabelValues,
    Numbers,
    Series,
    distribution_heads,
    distribution_lines,
    line_head,
    preamble,
)

MAX_LISTED = 200
"""Names in a label of `lora_requests_info`; gateways read some tens of kilobytes, not more."""

_LORA = "vllm:lora_requests_info"
_LORA_LABELS = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")


class TasksInFlight(NamedTuple):
    """Names of the tasks that are answered now, and of those that wait for a first token."""

    running: set[str]
    waiting: set[str]


def _nothing_in_flight() -> TasksInFlight:
    return TasksInFlight(set(), set())


@dataclass(slots=True)
class VllmNames:
    """What vLLM's names need besides the figures.

    Attributes:
        model: Name of the base in requests.
        max_lora: Most tasks that a step can hold.
        in_flight: Asked at every scrape.
    """

    model: str
    max_lora: int
    in_flight: Callable[[], TasksInFlight] = field(default=_nothing_in_flight)


class _Name(NamedTuple):
    """A name of vLLM's, the metric of ours behind it, and which of our labels it keeps as what."""

    name: str
    source: str
    kept: tuple[str, str] | None = None


_NAMES = (
    _Name("num_requests_running", "num_requests_running"),
    _Name("num_requests_waiting", "num_requests_waiting"),
    _Name("kv_cache_usage_perc", "kv_cache_usage_ratio"),
    _Name("num_preemptions_total", "preemptions"),
    _Name("prefix_cache_queries_total", "prompt_tokens"),
    _Name("prefix_cache_hits_total", "cached_prompt_tokens"),
    _Name("prompt_tokens_total", "prompt_tokens"),
    _Name("generation_tokens_total", "generation_tokens"),
    _Name("request_success_total", "generations", ("finish_reason", "finished_reason")),
    _Name("iteration_tokens_total", "batch_tokens"),
    _Name("request_prompt_tokens", "request_prompt_tokens"),
    _Name("request_generation_tokens", "request_generation_tokens"),
    _Name("request_params_max_tokens", "request_params_max_tokens"),
    _Name("time_to_first_token_seconds", "time_to_first_token_seconds"),
    # The second is what earlier releases of vLLM call the first.
    _Name("inter_token_latency_seconds", "inter_token_latency_seconds"),
    _Name("time_per_output_token_seconds", "inter_token_latency_seconds"),
    _Name("e2e_request_latency_seconds", "e2e_request_latency_seconds"),
    _Name("request_queue_time_seconds", "request_queue_time_seconds"),
    _Name("request_prefill_time_seconds", "request_prefill_time_seconds"),
    _Name("request_decode_time_seconds", "request_decode_time_seconds"),
    _Name("request_inference_time_seconds", "request_inference_time_seconds"),
)


def vllm_lines(names: VllmNames, series: Mapping[str, Series]) -> Iterator[str]:
    """Yield the lines of every name."""
    for row in _NAMES:
        source = series[row.source]
        yield preamble(f"vllm:{row.name}", source.row.type, source.row.help)
        if isinstance(source, Numbers):
            yield from _sums(row, source, names.model)
        else:
            yield from _distribution(row, source, names.model)
    kind: MetricType = "gauge"
    yield preamble(_LORA, kind, "Tasks in flight; the value is the time of this answer.")
    yield _lora_requests(names)


def _sums(row: _Name, source: Numbers, model: str) -> Iterator[str]:
    """Yield the sums over every label but the one that is kept."""
    ours, theirs = row.kept or (None, None)
    index = None if ours is None else source.row.labels.index(ours)
    sums: defaultdict[LabelValues, float] = defaultdict(float)
    for key, value in source.values.items():
        sums[() if index is None else (key[index],)] += value
    extra = () if theirs is None else (theirs,)
    for kept, value in sums.items():
        head = line_head(f"vllm:{row.name}", ("engine", "model_name", *extra), ("0", model, *kept))
        yield f"{head}{value!r}\n"


def _distribution(row: _Name, source: Distributions, model: str) -> Iterator[str]:
    labels, values = ("engine", "model_name"), ("0", model)
    heads = distribution_heads(f"vllm:{row.name}", source.row.buckets, labels, values)
    for distribution in source.values.values():
        yield from distribution_lines(heads, distribution)


def _lora_requests(names: VllmNames) -> str:
    """Write the one line that says which tasks are in flight.

    It is made anew for every scrape and not kept, so that there is never a second one: a line for
    every set of tasks that there has been would be a series each.
    """
    running, waiting = names.in_flight()
    values = (str(names.max_lora), _listed(running), _listed(waiting))
    return f"{line_head(_LORA, _LORA_LABELS, values)}{time.time()!r}\n"


def _listed(tasks: set[str]) -> str:
    return ",".join(sorted(tasks)[:MAX_LISTED])
