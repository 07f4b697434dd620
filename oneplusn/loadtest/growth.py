"""Measure how throughput and inter-token time grow with clients, with adapters, with context.

    python -m oneplusn.loadtest.growth --threads 2 --out docs/benchmarks

Serves a random model with 64 LoRAs, sweeps over one thing after the other, and keeps what it finds
in a file, so that one curve can be measured anew. Draws all of them into one picture.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneplusn.loadtest import options
from oneplusn.loadtest.checks import check
from oneplusn.loadtest.document import Block, Heading, Text, markdown
from oneplusn.loadtest.fixtures import SHAPES, adapter_memory, kept
from oneplusn.loadtest.growth_model import POSITIONS, RANK, adapters
from oneplusn.loadtest.measure import find
from oneplusn.loadtest.mistake import Mistake
from oneplusn.loadtest.processes import ChildFailed, named, python, run_json, serving
from oneplusn.loadtest.prompts import Vocabulary
from oneplusn.loadtest.stream import LoadFailed
from oneplusn.loadtest.sweep import curves, point_table, sweep

ADAPTERS = 64
BUILD_LIMIT_S = 600.0
BASE = "base"
FIRST_WORD = 3
"""The lowest token id that is no special token."""

DOUBLING = "1,2,4,8,16,32,64"
KEPT = (
    "value",
    "output_throughput_while_sending",
    "request_throughput",
    "completed",
    "failed",
    "p50_ttft_ms",
    "p99_ttft_ms",
    "p50_itl_ms",
    "p99_itl_ms",
    "slo",
    "client_cpu_share",
    "warnings",
)
SHOWN = ("Output tokens/s", "Inter-token time")


@dataclass(frozen=True, slots=True)
class Curve:
    """One thing that grows.

    Attributes:
        over: What, and its values.
        loads: Options of each line of the picture, by its name.
        same: Options of all of them.
    """

    title: str
    over: str
    loads: Mapping[str, Sequence[str]]
    same: Sequence[str]


def plans(names: Sequence[str]) -> dict[str, Curve]:
    """Return the curves over these adapters."""
    bare = ("--tasks", BASE)
    mixed = ("--tasks", ",".join(names), "--popularity", "distinct")
    # Answers of one length would begin and end together, and wait for each other's prompts.
    short = ("--input-tokens", "64", "--output-tokens", "uniform:32-96", "--warmup", "5")
    return {
        "concurrency": Curve(
            "Over clients, 64 prompt and 32 to 96 output tokens",
            f"concurrency={DOUBLING}",
            {"bare base": bare, "a LoRA per client": mixed},
            (*short, "--duration", "15"),
        ),
        "adapters": Curve(
            "Over distinct LoRAs, 64 clients, 64 prompt and 32 to 96 output tokens",
            f"tasks={DOUBLING}",
            {"64 clients": mixed},
            (*short, "--duration", "25", "--concurrency", "64"),
        ),
        "context": Curve(
            "Over the length of prompts, 4 clients, 32 to 96 output tokens",
            "input-tokens=64,128,256,512,1024,2048,4096",
            {"bare base": bare, "a LoRA per client": mixed},
            (
                *("--output-tokens", "uniform:32-96", "--concurrency", "4"),
                *("--duration", "40", "--num-requests", "24"),
            ),
        ),
    }


def quick(plan: Curve) -> Curve:
    """Return the first and the last point of a curve, of a second each."""
    kind, _, values = plan.over.partition("=")
    first, *_, last = values.split(",")
    few = ("--warmup", "0", "--duration", "1", "--output-tokens", "4")
    return Curve(plan.title, f"{kind}={first},{last}", plan.loads, (*plan.same, *few))


def main() -> int:
    """Run the benchmark; return the exit status."""
    args = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args)
    except (ChildFailed, LoadFailed, Mistake) as error:
        print(f"growth: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("growth: interrupted", file=sys.stderr)
        return 130
    return 0


def _options() -> argparse.Namespace:
    names = list(plans(()))
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(prog="growth", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=cores, help="of arithmetic (the cores)")
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--cache", type=Path, help="keep the model and the LoRAs in this folder")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two points a curve")
    parser.add_argument("--curves", default=",".join(names), help="comma-separated (all)")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of growth.json, growth.md and growth.png"
    )
    args = parser.parse_args()
    args.curves = args.curves.split(",")
    if unknown := set(args.curves) - set(names):
        parser.error(f"no curve {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if args.threads < 1:
        parser.error(f"--threads {args.threads} is below 1; give 1 or more")
    if args.quick:
        args.model = "tiny"
    return args


def run(args: argparse.Namespace) -> None:
    """Measure the curves that were asked for, and write down all that are known.

    Raises:
        ChildFailed: The server ended, or did not start.
        Mistake: A load was interrupted.
    """
    names = adapters(ADAPTERS)
    with kept(args.cache) as folder:
        fixtures = folder / f"growth-{args.model}"
        _say(f"building {fixtures}")
        build = [str(fixtures), "--model", args.model, "--adapters", str(ADAPTERS)]
        command = python("oneplusn.loadtest.growth_model", *build)
        run_json(command, threads=args.threads, limit_s=BUILD_LIMIT_S)
        _say("starting the server")
        with serving(_server(fixtures, names), threads=args.threads) as address:
            for name in args.curves:
                plan = plans(names)[name]
                measured = _measure(args, address, quick(plan) if args.quick else plan)
                _keep(args.out, name, measured)


def _server(fixtures: Path, names: Sequence[str]) -> list[str]:
    """Return the options of a server with everything resident."""
    folders = {name: fixtures / name for name in names}
    room = adapter_memory(folders.values())
    return [
        *("--model", str(fixtures / BASE), "--served-model-name", BASE),
        *("--max-model-len", str(POSITIONS), *room, *named(folders, "--adapter")),
    ]


def _measure(args: argparse.Namespace, address: str, plan: Curve) -> dict[str, Any]:
    """Sweep once per line of a curve."""
    parser = argparse.ArgumentParser()
    options.declare(parser)
    words = range(FIRST_WORD, SHAPES[args.model].vocab)
    vocabulary = Vocabulary({f"t{index}": 1 for index in words})
    lines = dict[str, list[dict[str, Any]]]()
    begin = time.perf_counter()
    for label, more in plan.loads.items():
        given = parser.parse_args(["sweep", address, "--over", plan.over, *plan.same, *more])
        check(given)
        target = find(given, vocabulary)
        points = sweep(given, target, label=f"{label}: ")
        _refuse_faults(points)
        lines[label] = [{key: point[key] for key in KEPT} for point in points]
        _say(f"{plan.title}, {label}: done after {time.perf_counter() - begin:.0f} s")
    where = target.environment
    return {
        "title": plan.title,
        "over": plan.over.partition("=")[0],
        "date": time.strftime("%Y-%m-%d"),
        "setting": f"{where['cpu']}, {where['cores']} cores, load average before "
        f"{where['load_before']}; model {args.model} in bf16, {args.threads} threads, "
        f"LoRAs of rank {RANK} on all linears",
        "lines": lines,
    }


def _refuse_faults(points: Sequence[Mapping[str, Any]]) -> None:
    """Let no figure of other work than was asked for into the picture."""
    for point in points:
        if point["interrupted"]:
            raise Mistake("a curve was interrupted; nothing is kept of it")
        if point["errors"]:
            failed = point["errors"][0]
            raise Mistake(
                f"{point['failed']} requests failed at {point['value']:g}, nothing is kept of the "
                f"curve: {failed['examples'][0]}"
            )
        if not point["completed"]:
            raise Mistake(
                f"no request was answered in time at {point['value']:g}, nothing is kept of the "
                "curve; the machine is too slow or too busy for it"
            )


def _keep(folder: Path, name: str, measured: Mapping[str, Any]) -> None:
    """Put a curve beside those that were measured before, and write all of them."""
    from oneplusn.loadtest.picture import draw

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "growth.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    known = {
        key: measured if key == name else known[key] for key in plans(()) if key in {*known, name}
    }
    file.write_text(json.dumps(known, indent=1), encoding="utf-8")
    page = markdown("Growth", list(_blocks(known)))
    (folder / "growth.md").write_text(f"{page}\n", encoding="utf-8")
    rows = [
        [chart for chart in curves(found["over"], found["lines"]) if chart.title in SHOWN]
        for found in known.values()
    ]
    draw(folder / "growth.png", rows)


def _blocks(known: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    yield Text(
        "`python -m oneplusn.loadtest.growth --out docs/benchmarks` wrote this page. Closed loops: "
        "each client sends its next request once it has its answer. Prompts differ from their "
        "first word on. Tokens/s are those that arrived while requests were sent."
    )
    yield Text("![throughput and inter-token time](growth.png)")
    for found in known.values():
        yield Heading(found["title"])
        yield Text(f"{found['date']}. {found['setting']}.")
        for label, points in found["lines"].items():
            yield Text(f"{label[0].upper()}{label[1:]}:")
            yield point_table(found["over"], points)


def _say(line: str) -> None:
    print(f"growth: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
