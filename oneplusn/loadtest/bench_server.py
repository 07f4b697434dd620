"""Our own server as the benchmark runs it: with every adapter, and with none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneplusn.loadtest.bench_cases import BASE, BASE_NAME, CASES, CGC, LORAS, ONE, Held, Work
from oneplusn.loadtest.dialects import DIALECTS
from oneplusn.loadtest.fixtures import adapter_memory
from oneplusn.loadtest.peers.system import Served
from oneplusn.loadtest.processes import named, python, run_json

OURS, BARE = "oneplusn", "oneplusn, no adapters"
PROFILE_LIMIT_S = 300.0


def systems(work: Work) -> list[Served]:
    """Return the server with all adapters resident, and one that was given none."""
    adapters = work.fixtures.loras | work.fixtures.clusters
    return [_server(OURS, CASES, work, adapters), _server(BARE, (ONE, BASE), work, {})]


def _server(name: str, cases: tuple[str, ...], work: Work, adapters: Mapping[str, Path]) -> Served:
    folders = list(adapters.values())
    held = Held.of(work, folders)
    options = [
        *("--model", str(work.fixtures.base), "--served-model-name", BASE_NAME),
        *("--max-model-len", str(work.context), "--kv-memory", str(held.cache)),
        *(*(adapter_memory(folders) if adapters else ()), *named(adapters, "--adapter")),
    ]
    serve = python("oneplusn.cli", "serve", "--host", "127.0.0.1", "--log-level", "warning")
    serve += ["--threads", str(work.threads)]
    return Served(
        name=name,
        cases=cases,
        work=work,
        route=DIALECTS["completions"],
        command=lambda port: [*serve, "--port", str(port), *options],
        held=held,
        ready="/health/ready",
    )


def shares(work: Work) -> dict[str, dict[str, float]]:
    """Find out where a decode step spends its time: case -> part -> milliseconds.

    Raises:
        ChildFailed: The profile ended with an error, or took too long.
    """
    loras, clusters = work.fixtures.loras, work.fixtures.clusters
    adapters = loras | clusters
    cases = {BASE: "", LORAS: ",".join(loras), CGC: ",".join(clusters)}
    command = python("oneplusn.server.tools.profile", "--model", str(work.fixtures.base), "--json")
    command += [*adapter_memory(adapters.values()), *named(adapters, "--adapter")]
    command += ["--threads", str(work.threads), "--rows", str(work.streams)]
    command += ["--prompt", str(work.prompt), "--steps", str(work.output)]
    command += [word for names in cases.values() for word in ("--case", names)]
    profiles: list[dict[str, Any]] = run_json(
        command, threads=work.threads, limit_s=PROFILE_LIMIT_S
    )
    return {case: found["ms_per_step"] for case, found in zip(cases, profiles, strict=True)}
