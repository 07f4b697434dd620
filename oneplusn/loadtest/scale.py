"""Measure what many registered tasks cost: throughput, memory, loads, the host's share of a step.

    python -m oneplusn.loadtest.scale --threads 2 --out docs/benchmarks

Serves a random model over data folders with 16, 256 and 4,096 registered LoRAs. Every part keeps
what it finds in a file as it finds it; rounds of another run are added, and a part that is named
with --again begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from oneplusn.loadtest.document import markdown
from oneplusn.loadtest.fixtures import SHAPES, kept
from oneplusn.loadtest.processes import ChildFailed, python, run_json
from oneplusn.loadtest.report import machine
from oneplusn.loadtest.scale_parts import PARTS, Plan
from oneplusn.loadtest.scale_report import blocks, unreached
from oneplusn.loadtest.stream import LoadFailed
from oneplusn.loadtest.transport import raise_open_files

BUILD_LIMIT_S = 600.0
QUICK: dict[str, Any] = {
    "model": "tiny",
    "sizes": (4, 8, 16),
    "resident": 6,
    "streams": 4,
    "many": 8,
    "requests": 2,
    "prompt": 8,
    "output": 8,
    "rounds": 1,
}


def main() -> int:
    """Run the benchmark; return the exit status: 1 if a target is missed."""
    args = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        known = run(args)
    except (ChildFailed, LoadFailed) as error:
        print(f"scale: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("scale: interrupted", file=sys.stderr)
        return 130
    print(markdown("Scale", list(blocks(known))))
    missed = [] if args.quick else unreached(known)
    for line in missed:
        print(f"scale: missed: {line}", file=sys.stderr)
    return 1 if missed else 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts that were asked for; return all that is known.

    Raises:
        ChildFailed: A server ended, or did not start.
        LoadFailed: A request failed.
    """
    raise_open_files()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scale.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    with kept(args.cache) as folder:
        plan = _plan(args, folder / f"scale-{args.model}")
        _say(f"building {plan.base}")
        build = [str(plan.folder), "--model", args.model, "--adapters", "0"]
        command = python("oneplusn.loadtest.growth_model", *build)
        run_json(command, threads=1, limit_s=BUILD_LIMIT_S)
        for name in args.parts:
            found = known.setdefault(name, {})
            if name in args.again or not found:
                found = known[name] = {"setting": _setting(plan), "machine": machine(), "runs": []}
            found["date"] = time.strftime("%Y-%m-%d")
            for run_ in tqdm(PARTS[name](plan), desc=name, unit=" results", disable=None):
                found["runs"].append(run_)
                _keep(args.out, known)
                _say(f"{name}: {_shown(run_)}")
    return known


def _plan(args: argparse.Namespace, folder: Path) -> Plan:
    names = (
        *("model", "sizes", "resident", "streams", "many", "requests"),
        *("prompt", "output", "threads", "rounds"),
    )
    return Plan(folder=folder, **{name: getattr(args, name) for name in names})


def _setting(plan: Plan) -> dict[str, Any]:
    names = ("model", "sizes", "resident", "streams", "many", "requests", "prompt", "output")
    return {name: getattr(plan, name) for name in (*names, "threads")}


def _keep(folder: Path, known: dict[str, Any]) -> None:
    """Write all that is known, and the page that shows it."""
    ordered = {name: known[name] for name in PARTS if name in known}
    partial = folder / "scale.json.partial"
    partial.write_text(json.dumps(ordered, indent=1), encoding="utf-8")
    partial.replace(folder / "scale.json")
    page = markdown("Many tasks", list(blocks(ordered)))
    (folder / "scale.md").write_text(f"{page}\n", encoding="utf-8")


def _shown(found: dict[str, Any]) -> str:
    """Return the values of a result that fit into a line."""
    names = ("form", "registered", "server", "asked", "room", "round", "seconds")
    parts = [f"{name} {found[name]}" for name in names if name in found]
    if "output_throughput" in found:
        parts.append(f"{found['output_throughput']:.0f} tokens/s")
    return ", ".join(parts) or "done"


def _options() -> argparse.Namespace:
    cores, parts = len(os.sched_getaffinity(0)), list(PARTS)
    parser = argparse.ArgumentParser(prog="scale", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=SHAPES, default="small", help="shape of the base (small)")
    add("--threads", type=int, default=cores, help="of arithmetic (the cores)")
    add("--parts", default=",".join(parts), help="comma-separated (all, in this order)")
    add("--again", default="", help="parts of which nothing older is kept, comma-separated")
    add("--rounds", type=int, default=3, help="of the parts that compare servers (3)")
    add("--requests", type=int, default=3, help="of a stream in one load (3)")
    add("--cache", type=Path, help="keep the model and the data folders here (20 GB)")
    add("--quick", action="store_true", help="a tiny model and few tasks")
    add("--out", type=Path, required=True, help="folder of scale.json and scale.md")
    args = parser.parse_args()
    vars(args).update(sizes=(16, 256, 4096), resident=64, streams=16, many=64)
    vars(args).update(prompt=64, output=64)
    if args.quick:
        vars(args).update(QUICK)
    for name in ("parts", "again"):
        setattr(args, name, [part for part in getattr(args, name).split(",") if part])
    if unknown := {*args.parts, *args.again} - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    if min(args.threads, args.rounds, args.requests) < 1:
        parser.error("--threads, --rounds and --requests are 1 or more")
    return args


def _say(line: str) -> None:
    print(f"scale: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
