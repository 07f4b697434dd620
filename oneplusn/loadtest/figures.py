"""From what a load measured to its figures, under the names that `vllm bench serve` writes."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from oneplusn.loadtest.churn import Churn, Swap
from oneplusn.loadtest.drive import Outcome, Record
from oneplusn.loadtest.slo import Slo, judge
from oneplusn.loadtest.stats import PERCENTILE_RULE, most_at_once, most_per_second, spread
from oneplusn.loadtest.stream import Answer, LoadFailed

EXAMPLES = 3
MS = 1e3


def _tpot(answer: Answer) -> list[float]:
    if not answer.times or answer.tokens < 2:
        return []
    return [(answer.ended - answer.times[0]) / (answer.tokens - 1) * MS]


TIMES: Mapping[str, Callable[[Answer], list[float]]] = {
    "ttft": lambda answer: [answer.first_token_s * MS] if answer.times else [],
    "tpot": _tpot,
    "itl": lambda answer: [gap * MS for gap in answer.gaps_s],
    "e2el": lambda answer: [(answer.ended - answer.sent) * MS],
}
"""What is timed of an answer, in ms.

`ttft` goes from sending to the first text, `itl` from one event with text to the next, `e2el` from
sending to the end of the stream; `tpot` spreads the time after the first text over the tokens after
the first.
"""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request with its answer."""

    record: Record
    answer: Answer


def answered(records: Iterable[Record]) -> list[Answered]:
    """Return those that have an answer."""
    return [Answered(record, record.answer) for record in records if record.answer is not None]


def figures(outcome: Outcome, slo: Slo | None = None) -> dict[str, Any]:
    """Return everything about the load as a whole."""
    judged = None if slo is None else judge(slo, outcome.counted, _seconds(outcome))
    return {
        **_totals(outcome),
        "request_goodput": judged and judged["requests_per_s"],
        "slo": judged,
        **latencies([item.answer for item in answered(outcome.counted)]),
        **spread("dispatch_delay_ms", [(r.sent - r.due) * MS for r in outcome.counted]),
        **spread("connect_ms", [r.connecting_s * MS for r in outcome.counted if r.connecting_s]),
        "client_processes": len(outcome.cpu_shares),
        "client_cpu_share": max(outcome.cpu_shares, default=None),
        "client_cpu_shares": outcome.cpu_shares,
        "interrupted": outcome.interrupted,
    }


def _seconds(outcome: Outcome) -> float:
    """Return the time from the first request that counts to the last answer, never 0."""
    counted = outcome.counted
    start = min((record.sent for record in counted), default=outcome.begin)
    end = max((item.answer.ended for item in answered(counted)), default=start)
    return max(end - start, 1e-9)


def _totals(outcome: Outcome) -> dict[str, Any]:
    counted = outcome.counted
    done = answered(counted)
    answers = [item.answer for item in done]
    seconds = _seconds(outcome)
    start = min((record.sent for record in counted), default=outcome.begin)
    inputs, outputs = sum(_inputs(item) for item in done), sum(item.tokens for item in answers)
    failed = [record for record in counted if record.failure is not None]
    times = sorted(when for answer in answers for when in answer.times)
    return {
        "duration": seconds,
        "sending_seconds": outcome.end_of_sending - outcome.begin,
        "completed": len(done),
        "failed": len(failed),
        "aborted": len(counted) - len(done) - len(failed),
        "rejected": sum(_is_rejection(record.failure) for record in failed),
        "retries": sum(record.retries for record in counted),
        "completed_without_text": sum(not answer.times for answer in answers),
        "warmup_requests": len(outcome.records) - len(counted),
        "warmup_failed": sum(r.failure is not None for r in outcome.records) - len(failed),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "cached_input_tokens": sum(answer.cached_tokens for answer in answers),
        "request_throughput": len(done) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "output_throughput_while_sending": _rate_while_sending(outcome),
        "max_output_tokens_per_s": float(most_per_second(times, start)),
        "max_concurrent_requests": most_at_once((a.sent, a.ended) for a in answers),
        "tokens_per_event": outputs / len(times) if times else None,
        "tokens_counted_by": "server" if all(a.counted for a in answers) else "events",
        "percentile_rule": PERCENTILE_RULE,
    }


def latencies(answers: Sequence[Answer]) -> dict[str, float | None]:
    """Return the times that requests took, each described by its spread."""
    found = dict[str, float | None]()
    for name, take in TIMES.items():
        found |= spread(f"{name}_ms", [time for answer in answers for time in take(answer)])
    return found


def by_task(outcome: Outcome, slo: Slo | None = None) -> dict[str, dict[str, Any]]:
    """Return the figures of every task, the most asked one first."""
    groups = dict[str, list[Record]]()
    for record in outcome.counted:
        groups.setdefault(record.planned.task, []).append(record)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return {task: _task(records, slo) for task, records in ordered}


def _task(records: Sequence[Record], slo: Slo | None) -> dict[str, Any]:
    answers = [item.answer for item in answered(records)]
    versions = Counter(label for answer in answers for label in answer.versions)
    return {
        "requests": len(records),
        "completed": len(answers),
        "failed": sum(record.failure is not None for record in records),
        "total_output_tokens": sum(answer.tokens for answer in answers),
        "cached_input_tokens": sum(answer.cached_tokens for answer in answers),
        "versions": dict(sorted(versions.items())),
        "slo_share": None if slo is None else judge(slo, records, 1.0)["share"],
        **latencies(answers),
    }


def errors(failures: Iterable[LoadFailed | None]) -> list[dict[str, Any]]:
    """Return failures by kind, the most frequent first, each with a few different messages."""
    groups = dict[str, list[str]]()
    for failure in failures:
        if failure is not None:
            groups.setdefault(failure.group, []).append(str(failure))
    return [
        {"error": group, "count": len(texts), "examples": list(dict.fromkeys(texts))[:EXAMPLES]}
        for group, texts in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]


def swaps(churn: Churn, outcome: Outcome) -> dict[str, Any]:
    """Return how swaps went, and what the requests to other adapters noticed."""
    measured = churn.measured
    done = [swap for swap in measured if swap.first_token is not None]
    others = [a for r in outcome.counted if r.planned.task not in churn.tasks and (a := r.answer)]
    busy = [(swap.started, swap.answered) for swap in measured if swap.answered is not None]
    during, between = split_gaps(others, busy)
    return {
        "adapter": churn.name,
        "asked_per_s": churn.per_second,
        "swaps": len(measured),
        "completed": len(done),
        "failed": sum(swap.failure is not None for swap in measured),
        "per_s": _per_second(done),
        "upload_bytes": churn.num_bytes,
        **spread("upload_ms", [(s.answered - s.started) * MS for s in done if s.answered]),
        **spread(
            "upload_to_first_token_ms",
            [(s.first_token - s.started) * MS for s in done if s.first_token],
        ),
        **spread("others_itl_ms", [gap * MS for gap in (*during, *between)]),
        **spread("others_itl_during_uploads_ms", [gap * MS for gap in during]),
        **spread("others_itl_between_uploads_ms", [gap * MS for gap in between]),
        "errors": errors(swap.failure for swap in measured),
    }


def split_gaps(
    answers: Iterable[Answer], spans: Sequence[tuple[float, float]]
) -> tuple[list[float], list[float]]:
    """Part the gaps between tokens into those that overlap a span and those that do not.

    Args:
        answers: Whose gaps.
        spans: One after the other, without overlap.
    """
    during, between = list[float](), list[float]()
    ends = [end for _, end in spans]
    for answer in answers:
        for start, end in pairwise(answer.times):
            index = bisect_right(ends, start)
            touched = index < len(spans) and spans[index][0] < end
            (during if touched else between).append(end - start)
    return during, between


def _inputs(item: Answered) -> int:
    told = item.answer.prompt_tokens
    return item.record.planned.input_tokens if told is None else told


def _is_rejection(failure: LoadFailed | None) -> bool:
    return failure is not None and failure.group.startswith("HTTP 429")


def _rate_while_sending(outcome: Outcome) -> float | None:
    """Return tokens per second between the warm-up and the last request, whoever they are for."""
    seconds = outcome.end_of_sending - outcome.begin
    if seconds <= 0:
        return None
    tokens = 0.0
    for item in answered(outcome.records):
        times = item.answer.times
        inside = sum(outcome.begin <= when < outcome.end_of_sending for when in times)
        tokens += inside * item.answer.tokens / max(len(times), 1)
    return tokens / seconds


def _per_second(done: Sequence[Swap]) -> float | None:
    if len(done) < 2:
        return None
    return (len(done) - 1) / (done[-1].started - done[0].started)
