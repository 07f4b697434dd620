"""Write down what a load measured: JSON for programs, Markdown and a page for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from oneplusn.loadtest import rows
from oneplusn.loadtest.churn import Churn
from oneplusn.loadtest.document import (
    Block,
    Charts,
    Heading,
    Table,
    Text,
    Tiles,
    markdown,
    save,
    shown,
)
from oneplusn.loadtest.drive import Outcome
from oneplusn.loadtest.timeline import distributions, over_time

SHOWN_TASKS = 100
TIMES = {
    "ttft": "time to first token",
    "itl": "inter-token",
    "tpot": "time per output token",
    "e2el": "end to end",
    "dispatch_delay": "dispatch delay of the client",
    "connect": "connecting, where none was open",
}
COLUMNS = ("mean", "p50", "p90", "p95", "p99")
Report = Mapping[str, Any]


def render(report: Report) -> str:
    """Return the report as Markdown."""
    return markdown(_title(report), list(_blocks(report)))


def write(folder: Path, report: Report, outcome: Outcome, churn: Churn | None = None) -> None:
    """Write `report.json`, `.md` and `.html`, and `requests.jsonl`, into a folder."""
    swaps = [] if churn is None else [swap.started for swap in churn.measured]
    charts = [Charts(distributions({"": outcome.counted})), Charts(over_time(outcome, swaps))]
    save(folder / "report", _title(report), list(_blocks(report, charts)), report)
    rows.write(folder / rows.FILE, outcome.records, outcome.begin)


def _title(report: Report) -> str:
    return f"Load on {report['environment']['url']}"


def _blocks(report: Report, charts: Sequence[Charts] = ()) -> Iterator[Block]:
    yield from (Text(f"{line}.", alarm="Warning") for line in report["warnings"])
    if report["interrupted"]:
        yield Text("what was answered until then counts.", alarm="Interrupted")
    yield Tiles(list(_tiles(report)))
    yield from charts
    yield Table(["", ""], [[name, shown(value)] for name, value in _totals(report)])
    yield Table(["ms", *COLUMNS], [_times(label, report, name) for name, label in TIMES.items()])
    yield Text(f"Percentiles: {report['percentile_rule']}, a value that was measured.")
    if report["slo"]:
        yield from _slo(report["slo"])
    yield from _task_table(report["tasks"])
    if report["errors"]:
        yield Heading("Errors")
        yield Table(["error", "count", "for example"], _error_rows(report["errors"]))
    if report["churn"]:
        yield from _swaps(report["churn"])
    yield from _setting(report)


def _tiles(report: Report) -> Iterator[tuple[str, str]]:
    yield "output tokens/s", f"{report['output_throughput']:.1f}"
    yield "requests/s", shown(report["request_throughput"])
    for name, label in (("ttft", "time to first token"), ("itl", "inter-token")):
        yield f"{label}, p50 / p99 ms", _pair(report, name)
    if slo := report["slo"]:
        yield "met the limits", "-" if slo["share"] is None else f"{slo['share']:.1%}"
    yield "failed", f"{report['failed']} of {report['num_prompts']}"


def _totals(report: Report) -> Iterator[tuple[str, Any]]:
    yield "rate, requests/s", report["request_rate"]
    yield "clients", report["max_concurrency"]
    yield "seconds", report["duration"]
    keys = ("completed", "failed", "rejected", "aborted", "retries", "warmup_requests")
    yield from ((key.replace("_", " "), report[key]) for key in keys)
    yield "input tokens", report["total_input_tokens"]
    yield "output tokens", report["total_output_tokens"]
    yield "requests/s", report["request_throughput"]
    yield "output tokens/s", report["output_throughput"]
    yield "output tokens/s while sending", report["output_throughput_while_sending"]
    yield "most requests at once", report["max_concurrent_requests"]
    yield "client processes", report["client_processes"]
    yield "cores that the busiest of them took", report["client_cpu_share"]


def _times(label: str, found: Report, name: str) -> list[str]:
    return [label, *(shown(found[f"{column}_{name}_ms"]) for column in COLUMNS)]


def _slo(found: Report) -> Iterator[Block]:
    rows = [
        [name, f"{limit:g} ms", str(found["missed"][name])]
        for name, limit in found["limits_ms"].items()
    ]
    yield Heading("Goodput")
    if found["share"] is not None:
        yield Text(
            f"{found['share']:.1%} of the requests were answered within every limit: "
            f"{found['requests_per_s']:.2f} a second. {found['without_answer']} had no answer."
        )
    yield Table(["limit", "at most", "missed by"], rows)


def _task_table(tasks: Mapping[str, Report]) -> Iterator[Block]:
    head = ["task", "completed", "failed", "TTFT p50 / p99", "inter-token p50 / p99", "met limits"]
    rows = [
        [
            name,
            str(found["completed"]),
            str(found["failed"]),
            _pair(found, "ttft"),
            _pair(found, "itl"),
            "-" if found["slo_share"] is None else f"{found['slo_share']:.1%}",
            ", ".join(f"{label}: {count}" for label, count in found["versions"].items()),
        ]
        for name, found in list(tasks.items())[:SHOWN_TASKS]
    ]
    yield Heading("By task")
    yield Table([*head, "versions"], rows)
    if len(tasks) > SHOWN_TASKS:
        yield Text(f"{len(tasks) - SHOWN_TASKS} tasks with fewer requests are in report.json.")


def _error_rows(errors: Sequence[Report]) -> list[list[str]]:
    return [[entry["error"], str(entry["count"]), entry["examples"][0]] for entry in errors]


def _swaps(found: Report) -> Iterator[Block]:
    yield Heading(f"Swaps of {found['adapter']}")
    yield Text(
        f"{found['completed']} of {found['swaps']} swaps, {shown(found['per_s'])} per second of "
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
    yield Table(["ms", *COLUMNS], [_times(label, found, name) for name, label in labels.items()])
    if found["errors"]:
        yield Table(["error", "count", "for example"], _error_rows(found["errors"]))


def _setting(report: Report) -> Iterator[Block]:
    where = report["environment"]
    load = {name: value for name, value in report["workload"].items() if value not in (None, {})}
    load["tasks"] = f"{len(load['tasks'])}"
    yield Heading("Setting")
    yield Table(["", ""], [[name, str(value)] for name, value in load.items()])
    yield Text(
        f"{where['cpu']}, {where['cores']} cores; load average before: {where['load_before']}; "
        f"python {where['python']}. Seed {report['seed']}, {report['date']}."
    )
    if told := where["server"]:
        yield Text(
            f"The server tells: {', '.join(f'{key} {value}' for key, value in told.items())}."
        )


def _pair(found: Report, name: str) -> str:
    return f"{shown(found[f'p50_{name}_ms'])} / {shown(found[f'p99_{name}_ms'])}"
