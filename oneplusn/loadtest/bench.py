"""Measure throughput and latency over HTTP, beside PEFT and transformers in the same run.

    python -m oneplusn.loadtest.bench --threads 2

Builds a random model and adapters, serves them, sends concurrent requests, times the peers on the
same work, and prints one table. Every part runs in a process of its own, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
from collections.abc import Sequence

import httpx

from oneplusn.loadtest.client import Ask, Summary, send_all, summarize
from oneplusn.loadtest.fixtures import (
    BASE,
    MIXED,
    ONE_LORA,
    SHAPES,
    TASKS_PER_CLUSTER,
    Fixtures,
    adapter_memory,
    kept,
)
from oneplusn.loadtest.options import benchmark
from oneplusn.loadtest.peers import PEERS
from oneplusn.loadtest.processes import ChildFailed, named, python, run_json, serving
from oneplusn.loadtest.report import Case, Report, machine, render
from oneplusn.loadtest.stream import LoadFailed

BASE_NAME = "base"
FIRST_WORD = 3
"""The lowest token id that is no special token."""

LOAD_LIMIT_S = 300.0
BUILD_LIMIT_S = 300.0
PROFILE_LIMIT_S = 300.0
PEER_LIMIT_S = 1800.0
STEP_METRIC = "oneplusn_engine_step_seconds"


def main() -> int:
    """Run the benchmark; return the exit status."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = run(options)
    except (ChildFailed, LoadFailed, httpx.HTTPError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    print(render(report))
    if options.json:
        options.json.write_text(json.dumps(report.as_json(), indent=1), encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = benchmark("bench", __doc__, tokens=64, quick="a tiny model and no peers")
    parser.add_argument("--requests", type=int, default=16, help="at once (16)")
    parser.add_argument("--repeats", type=int, default=3, help="of each case after a warm-up (3)")
    parser.add_argument("--peers", default=",".join(PEERS), help="comma-separated; '' for none")
    options = parser.parse_args()
    options.peers = [peer for peer in options.peers.split(",") if peer]
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if min(options.threads, options.requests, options.prompt, options.repeats) < 1:
        parser.error("--threads, --requests, --prompt and --repeats are 1 or more")
    if options.output < 2:
        parser.error("--output is 2 or more, as the time between tokens is measured")
    if options.quick:
        quick = {"model": "tiny", "requests": 2, "prompt": 16, "output": 8, "repeats": 1}
        vars(options).update(quick, peers=[])
    return options


def run(options: argparse.Namespace) -> Report:
    """Measure everything that was asked for."""
    names = ("model", "requests", "prompt", "output", "threads", "repeats")
    report = Report({name: getattr(options, name) for name in names}, machine())
    with kept(options.cache) as folder:
        fixtures = Fixtures(folder / f"{options.model}-{options.requests}", options.requests)
        _say(f"building {fixtures.folder}")
        build = [str(fixtures.folder), "--model", options.model, "--requests"]
        command = python("oneplusn.loadtest.fixtures", *build, str(options.requests))
        run_json(command, threads=options.threads, limit_s=BUILD_LIMIT_S)
        _measure_server(report, fixtures, options)
        for peer in options.peers:
            _measure_peer(report, peer, fixtures, options)
        _measure_shares(report, fixtures, options)
    return report


def _cases(fixtures: Fixtures) -> dict[str, list[str]]:
    """Return the model that each request of a case names."""
    count, loras, tasks = fixtures.requests, list(fixtures.loras), fixtures.cluster_tasks
    return {
        "one request, bare base": [BASE_NAME],
        BASE: [BASE_NAME] * count,
        ONE_LORA: loras[:1] * count,
        MIXED.format(count): loras,
        f"{count} tasks in CGC clusters of {TASKS_PER_CLUSTER}": tasks[:count],
    }


def _model(fixtures: Fixtures) -> list[str]:
    """Return the options that name the base and all adapters, and make room for them."""
    adapters = fixtures.loras | fixtures.clusters
    room = adapter_memory(adapters.values())
    return ["--model", str(fixtures.base), *room, *named(adapters, "--adapter")]


def _measure_server(report: Report, fixtures: Fixtures, options: argparse.Namespace) -> None:
    """Serve everything at once and run every case."""
    arguments = [*_model(fixtures), "--served-model-name", BASE_NAME]
    _say("starting the server")
    with serving(arguments, threads=options.threads) as address:
        for name, models in _cases(fixtures).items():
            runs = [
                _load(address, name, models, options, seed=f"{name} {repeat}")
                for repeat in range(options.repeats + 1)
            ][1:]
            case = sorted(runs, key=lambda run: run.summary.tokens_per_s)[(len(runs) - 1) // 2]
            report.cases.append(case)
            _say(f"oneplusn, {name}: {case.summary.tokens_per_s:.1f} tokens/s")


def _load(
    address: str, name: str, models: Sequence[str], options: argparse.Namespace, *, seed: str
) -> Case:
    """Send one load. Its prompts are new, so that no prefix cache shortens the work."""
    draw = random.Random(seed)
    words = range(FIRST_WORD, SHAPES[options.model].vocab)
    asks = [
        Ask(model, tuple(draw.choices(words, k=options.prompt)), options.output) for model in models
    ]
    seconds, steps = _steps(address)
    answers = asyncio.run(send_all(address, asks, limit_s=LOAD_LIMIT_S))
    seconds_after, steps_after = _steps(address)
    found = summarize(answers)
    _check(found, options)
    return Case(name, found, (seconds_after - seconds) / (steps_after - steps) * 1e3)


def _check(found: Summary, options: argparse.Namespace) -> None:
    """Refuse figures of other work than was asked for.

    Raises:
        LoadFailed: Too few tokens came back, or prompts were not computed.
    """
    if found.output_tokens != found.requests * options.output or found.cached_tokens:
        msg = (
            f"{found.requests} requests of {options.output} tokens got {found.output_tokens} "
            f"with {found.cached_tokens} prompt tokens from the cache; all and none were expected"
        )
        raise LoadFailed(msg, group="other work")


def _steps(address: str) -> tuple[float, float]:
    """Return the seconds that the engine's steps took so far, and their number."""
    text = httpx.get(f"{address}/metrics").raise_for_status().text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:1] not in ("#", ""))
    return float(values[f"{STEP_METRIC}_sum"]), float(values[f"{STEP_METRIC}_count"])


def _measure_peer(
    report: Report, peer: str, fixtures: Fixtures, options: argparse.Namespace
) -> None:
    """Time one peer on the same work."""
    _say(f"running {peer}")
    command = python("oneplusn.loadtest.peers", peer, "--model", str(fixtures.base))
    for name in ("threads", "requests", "prompt", "output", "repeats"):
        command += [f"--{name}", str(getattr(options, name))]
    command += named(fixtures.loras, "--lora")
    for figures in run_json(command, threads=options.threads, limit_s=PEER_LIMIT_S):
        report.peers.append(figures)
        _say(f"{figures['name']}: {figures['tokens_per_s']:.1f} tokens/s")


def _measure_shares(report: Report, fixtures: Fixtures, options: argparse.Namespace) -> None:
    """Find out where a decode step spends its time."""
    _say("profiling steps")
    *_, mixed, clustered = _cases(fixtures)
    cases = {BASE: "", mixed: ",".join(fixtures.loras), clustered: ",".join(fixtures.clusters)}
    command = python("oneplusn.server.tools.profile", *_model(fixtures), "--json")
    command += ["--threads", str(options.threads), "--rows", str(options.requests)]
    command += ["--prompt", str(options.prompt), "--steps", str(options.output)]
    command += [word for names in cases.values() for word in ("--case", names)]
    profiles = run_json(command, threads=options.threads, limit_s=PROFILE_LIMIT_S)
    for name, profile in zip(cases, profiles, strict=True):
        report.shares[name] = profile["ms_per_step"]


def _say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
