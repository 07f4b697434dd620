"""Write down what a load measured: JSON for programs, Markdown for people, a line per request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from oneplusn.loadtest.drive import Outcome, Record
from oneplusn.loadtest.report import table

SHOWN_TASKS = 20
TIMES = {
    "ttft": "time to first token",
    "itl": "inter-token",
    "tpot": "time per output token",
    "e2el": "end to end",
    "dispatch_delay": "dispatch delay of the client",
    "connect": "connecting, where none was open",
}
COLUMNS = ("mean", "p50", "p90", "p95", "p99")


def write(folder: Path, report: Mapping[str, Any], outcome: Outcome) -> None:
    """Write `report.json`, `report.md` and `requests.jsonl` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (folder / "report.md").write_text(f"{render(report)}\n", encoding="utf-8")
    with (folder / "requests.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(_row(r, outcome.begin))}\n" for r in outcome.records)


def _row(record: Record, begin: float) -> dict[str, Any]:
    """Describe one request; times in seconds after the warm-up."""
    planned, answer, failure = record.planned, record.answer, record.failure
    row: dict[str, Any] = {
        "index": planned.index,
        "task": planned.task,
        "counts": record.counts,
        "due": record.due - begin,
        "sent": record.sent - begin,
        "asked_input_tokens": planned.input_tokens,
        "asked_output_tokens": planned.output_tokens,
    }
    if failure is not None:
        row |= {"error": failure.group, "message": str(failure)}
    if answer is not None:
        row |= {
            "ended": answer.ended - begin,
            "input_tokens": answer.prompt_tokens,
            "output_tokens": answer.tokens,
            "cached_tokens": answer.cached_tokens,
            "versions": answer.versions,
            "ttft": answer.first_token_s if answer.times else None,
            "itls": answer.gaps_s,
        }
    return row


def render(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    return "\n\n".join(_parts(report))


def _parts(report: Mapping[str, Any]) -> Iterator[str]:
    where = report["environment"]
    yield f"# Load on {where['url']}"
    yield from (f"**Warning:** {line}." for line in report["warnings"])
    if report["interrupted"]:
        yield "**Interrupted:** what was answered until then counts."
    yield table(["", ""], [[name, _shown(value)] for name, value in _totals(report)])
    rows = [_times(label, report, name) for name, label in TIMES.items()]
    yield table(["ms", *COLUMNS], rows)
    yield f"Percentiles: {report['percentile_rule']}, a value that was measured."
    yield from _task_table(report["tasks"])
    if report["errors"]:
        yield "## Errors"
        yield table(
            ["error", "count", "for example"],
            [
                [entry["error"], str(entry["count"]), _cell(entry["examples"][0])]
                for entry in report["errors"]
            ],
        )
    if swaps := report["churn"]:
        yield from _swap_parts(swaps)
    yield (
        f"{where['cpu']}, {where['cores']} cores; load average before: {where['load_before']}; "
        f"python {where['python']}. Seed {report['seed']}."
    )
    if told := where["server"]:
        yield f"The server tells: {', '.join(f'{key} {value}' for key, value in told.items())}."


def _totals(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "endpoint", report["backend"]
    yield "rate, requests/s", report["request_rate"]
    yield "clients", report["max_concurrency"]
    yield "popularity", report["popularity"]
    yield "seconds", report["duration"]
    keys = ("completed", "failed", "rejected", "aborted", "retries", "warmup_requests")
    yield from ((key.replace("_", " "), report[key]) for key in keys)
    yield "input tokens", report["total_input_tokens"]
    yield "output tokens", report["total_output_tokens"]
    yield "requests/s", report["request_throughput"]
    yield "output tokens/s", report["output_throughput"]
    yield "output tokens/s while sending", report["output_throughput_while_sending"]
    yield "most requests at once", report["max_concurrent_requests"]
    yield "processor time of the client, cores", report["client_cpu_share"]


def _times(label: str, found: Mapping[str, Any], name: str) -> list[str]:
    return [label, *(_shown(found[f"{column}_{name}_ms"]) for column in COLUMNS)]


def _task_table(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    head = ["task", "completed", "failed", "TTFT p50 / p99", "inter-token p50 / p99", "versions"]
    rows = [
        [
            name,
            str(found["completed"]),
            str(found["failed"]),
            _pair(found, "ttft"),
            _pair(found, "itl"),
            ", ".join(f"{label}: {count}" for label, count in found["versions"].items()),
        ]
        for name, found in list(tasks.items())[:SHOWN_TASKS]
    ]
    yield "## By task"
    yield table(head, rows)
    if len(tasks) > SHOWN_TASKS:
        yield f"{len(tasks) - SHOWN_TASKS} tasks with fewer requests are in report.json."


def _swap_parts(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"## Swaps of {found['adapter']}"
    yield (
        f"{found['completed']} of {found['swaps']} swaps, {_shown(found['per_s'])} per second of "
        f"{found['asked_per_s']:g} asked, {found['upload_bytes'] / 1e6:.1f} MB each; "
        f"{found['failed']} failed."
    )
    labels = {
        "upload": "upload",
        "upload_to_first_token": "upload to first token of the new version",
        "others_itl": "others, inter-token",
        "others_itl_during_uploads": "others, inter-token, during uploads",
        "others_itl_between_uploads": "others, inter-token, between uploads",
    }
    yield table(["ms", *COLUMNS], [_times(label, found, name) for name, label in labels.items()])
    yield from (f"{entry['count']} x {_cell(entry['examples'][0])}" for entry in found["errors"])


def _pair(found: Mapping[str, Any], name: str) -> str:
    return f"{_shown(found[f'p50_{name}_ms'])} / {_shown(found[f'p99_{name}_ms'])}"


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    """Keep a server's text inside its cell."""
    return text.replace("|", "\\|").replace("\n", " ")
