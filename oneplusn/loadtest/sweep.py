"""Send a load for each of several values of one thing, and show what changes with it."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from oneplusn.loadtest.chart import Chart, Series
from oneplusn.loadtest.document import Block, Charts, Heading, Table, Text, markdown, save, shown
from oneplusn.loadtest.measure import EXIT_INTERRUPTED, Target, find, measure, status
from oneplusn.loadtest.mistake import Mistake
from oneplusn.loadtest.workload import Length

SEEDS_APART = 1000
"""Between two points, so that no prefix cache knows the texts of the one before."""

AXES = {
    "concurrency": "clients",
    "rate": "requests/s",
    "tasks": "distinct tasks",
    "input-tokens": "tokens of a prompt",
    "output-tokens": "tokens of an answer",
}
FIGURES = {
    "Output tokens/s": ("tokens/s", {"": "output_throughput_while_sending"}),
    "Inter-token time": ("ms", {"p50": "p50_itl_ms", "p99": "p99_itl_ms"}),
    "Time to first token": ("ms", {"p50": "p50_ttft_ms", "p99": "p99_ttft_ms"}),
}
Point = Mapping[str, Any]
"""The report of a load, and the `value` at which it was sent."""


def run(args: argparse.Namespace) -> int:
    """Run `oneplusn loadtest sweep`; return the exit status."""
    target = find(args)
    points = sweep(args, target)
    blocks = list(_blocks(args, points, target))
    name = f"Loads on {args.url}"
    if args.out:
        whole = {"over": args.over[0], "environment": target.environment, "points": points}
        save(args.out / "sweep", name, blocks, whole)
        _draw(args, points)
    print(markdown(name, blocks))
    statuses = [status(args, dict(point)) for point in points]
    return EXIT_INTERRUPTED if EXIT_INTERRUPTED in statuses else max(statuses)


def sweep(args: argparse.Namespace, target: Target, *, label: str = "") -> list[dict[str, Any]]:
    """Send the loads one after the other; return the report of each, with its `value`.

    Args:
        args: Options of a sweep, checked.
        target: The server.
        label: What to call it while it runs.

    Raises:
        Mistake: There are fewer tasks than the largest value.
    """
    kind, values = args.over
    if kind == "tasks" and values[-1] > len(target.tasks):
        raise Mistake(
            f"--over tasks goes up to {values[-1]:g}, and there are {len(target.tasks)} tasks; "
            "end there, or name more with --tasks"
        )
    points = list[dict[str, Any]]()
    for number, value in enumerate(values, 1):
        varied, aim = _vary(args, target, value, number)
        shown_as = f"{label}{kind} {value:g} ({number}/{len(values)}) "
        report, _ = measure(varied, aim, label=shown_as)
        points.append({"value": value, **report})
        if report["interrupted"]:
            break
    return points


def _vary(
    args: argparse.Namespace, target: Target, value: float, number: int
) -> tuple[argparse.Namespace, Target]:
    """Return the options and the target of one point."""
    varied, kind = copy.copy(args), args.over[0]
    varied.seed = args.seed + SEEDS_APART * number
    if kind == "tasks":
        return varied, replace(target, tasks=target.tasks[: int(value)])
    if kind == "concurrency":
        varied.processes = min(args.processes, int(value))
    is_length = kind in ("input-tokens", "output-tokens")
    given = Length(int(value), int(value)) if is_length else value
    setattr(varied, kind.replace("-", "_"), given)
    return varied, target


def curves(kind: str, runs: Mapping[str, Sequence[Point]]) -> list[Chart]:
    """Return throughput, inter-token time and time to first token over the values.

    Args:
        kind: What was varied.
        runs: The points of each sweep by its name, which may be empty for a single one.
    """
    charts = list[Chart]()
    for title, (unit, keys) in FIGURES.items():
        lines = [
            Series(
                ", ".join(filter(None, [name, which])),
                [(point["value"], point[key]) for point in points if point[key] is not None],
                "marked",
            )
            for name, points in runs.items()
            for which, key in keys.items()
        ]
        charts.append(Chart(title, AXES[kind], unit, lines, scale="values"))
    return charts


def point_table(kind: str, points: Sequence[Point]) -> Table:
    """Return a row per point."""
    judged = any(point["slo"] for point in points)
    head = [AXES[kind], "output tokens/s", "requests/s", "TTFT p50 / p99 ms"]
    head += ["inter-token p50 / p99 ms", "failed", "client, cores"]
    rows = [
        [
            f"{point['value']:g}",
            shown(point["output_throughput_while_sending"]),
            shown(point["request_throughput"]),
            f"{shown(point['p50_ttft_ms'])} / {shown(point['p99_ttft_ms'])}",
            f"{shown(point['p50_itl_ms'])} / {shown(point['p99_itl_ms'])}",
            str(point["failed"]),
            shown(point["client_cpu_share"]),
            *([_met(point["slo"])] if judged else []),
        ]
        for point in points
    ]
    return Table([*head, *(["met the limits"] if judged else [])], rows)


def _met(slo: Mapping[str, Any]) -> str:
    return "-" if slo["share"] is None else f"{slo['share']:.1%}"


def _blocks(args: argparse.Namespace, points: Sequence[Point], target: Target) -> Iterator[Block]:
    kind, where = args.over[0], target.environment
    yield from warnings(kind, points)
    yield Charts(curves(kind, {"": points}))
    yield point_table(kind, points)
    yield Heading("Setting")
    varied = {kind.replace("-", "_"), "over", "seed", "out", "quiet"}
    same = points[0]["arguments"].items()
    yield Table(["", ""], [[name, value] for name, value in same if name not in varied])
    yield Text(
        f"{where['cpu']}, {where['cores']} cores; load average before: {where['load_before']}."
    )


def warnings(kind: str, points: Sequence[Point]) -> Iterator[Text]:
    """Yield what is doubtful, with the values where it is."""
    for point in points:
        for line in point["warnings"]:
            yield Text(f"{line}.", alarm=f"Warning at {point['value']:g} {AXES[kind]}")


def _draw(args: argparse.Namespace, points: Sequence[Point]) -> None:
    """Draw the curves as PNG, if there is what it takes."""
    try:
        from oneplusn.loadtest.picture import draw
    except ImportError:
        print("loadtest: no sweep.png without matplotlib (extra `train`)", file=sys.stderr)
        return
    draw(args.out / "sweep.png", [curves(args.over[0], {"": points})])
