"""What the benchmark has to reach, beside the best peer of the same run and in itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneplusn.loadtest.bench_cases import BASE, CASES, CGC, LORA, LORAS, ONE
from oneplusn.loadtest.bench_results import Results
from oneplusn.loadtest.bench_server import BARE, OURS

SETTING = {"streams": 16, "prompt": 64, "output": 64}
"""The work for which floors were set; other work is compared without them."""

BEST_PEER = {
    ("small", ONE): 1.05,
    ("small", BASE): 1.15,
    ("small", LORAS): 4.5,
    ("mid", BASE): 1.2,
    ("mid", LORAS): 4.5,
}
ONE_STREAM = {"mid": 36.0}
"""Tokens/s of a single request."""
CLUSTERS_TO_BARE = {"small": 0.85}
SUPPORT_TO_NONE = 0.95
"""Adapter support must not slow the bare base; two runs of the same differ by as much."""
FIRST_TOKEN_MS = {"small": 1000.0}
OWN_MEMORY_MB = 600.0
START_S = {"small": 8.0}

DECISIONS = Path(__file__).parents[2] / "docs" / "decisions"
EXCUSED: dict[str, str] = {
    "small: 16 tasks in 4 CGC clusters over bare base": "0009-one-call.md",
}
"""A floor that is missed, by its name -> the file in docs/decisions that names it and says why."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A figure beside its floor.

    Attributes:
        name: What is compared, the same in every run.
        value: What was found; None if nobody ran what it takes.
        against: What it is compared with; empty for a figure of its own.
        floor: What it has to reach; None if it is only shown.
        most: `floor` is the most that it may be, not the least.
    """

    name: str
    value: float | None
    unit: str
    floor: float | None = None
    against: str = ""
    most: bool = False

    @property
    def is_met(self) -> bool:
        """Whether it reaches its floor."""
        if self.floor is None or self.value is None:
            return True
        return self.value <= self.floor if self.most else self.value >= self.floor


def verdicts(results: Results) -> list[Verdict]:
    """Compare everything that was measured."""
    found = [v for model in results.rows for v in _of_model(results, model)]
    if all(results.setting[name] == value for name, value in SETTING.items()):
        return found
    return [Verdict(v.name, v.value, v.unit, None, v.against) for v in found]


def unexcused(
    found: list[Verdict], excused: Mapping[str, str] = EXCUSED, decisions: Path = DECISIONS
) -> list[str]:
    """Return the floors that are missed without a decision record that names them."""
    lines = list[str]()
    for verdict in found:
        if verdict.is_met:
            continue
        record = excused.get(verdict.name)
        if record is None:
            lines.append(f"{verdict.name}: no decision record says why")
        elif not (decisions / record).is_file():
            lines.append(f"{verdict.name}: there is no {decisions / record}")
        elif verdict.name not in (decisions / record).read_text(encoding="utf-8"):
            lines.append(f"{verdict.name}: {record} does not name it")
    return lines


def best_peer(systems: Mapping[str, Mapping[str, Any]], case: str) -> tuple[str, float] | None:
    """Return the fastest peer of a case with its tokens/s; None if none ran it."""
    rates = {
        name: cases[case]["output_throughput"]
        for name, cases in systems.items()
        if name not in (OURS, BARE) and case in cases
    }
    return max(rates.items(), key=lambda item: item[1], default=None)


def _of_model(results: Results, model: str) -> Iterator[Verdict]:
    systems = results.rows[model]
    ours = systems.get(OURS, {})
    titles = results.setting["titles"]
    for case in CASES:
        name = f"{model}: {titles[case]}, tokens/s over the best peer's"
        floor = BEST_PEER.get((model, case))
        if case in ours and (peer := best_peer(systems, case)):
            yield Verdict(name, ours[case]["output_throughput"] / peer[1], "x", floor, peer[0])
        elif floor is not None:
            yield Verdict(name, None, "x", floor)
    yield from _of_ours(model, ours, systems.get(BARE, {}), titles)
    yield from _of_servers(model, results.servers.get(model, {}))


def _of_ours(
    model: str,
    ours: Mapping[str, Any],
    bare: Mapping[str, Any],
    titles: Mapping[str, str],
) -> Iterator[Verdict]:
    rates = {case: row["output_throughput"] for case, row in ours.items()}
    if CGC in rates and BASE in rates:
        name = f"{model}: {titles[CGC]} over bare base"
        floor = CLUSTERS_TO_BARE.get(model)
        yield Verdict(name, rates[CGC] / rates[BASE], "x", floor, OURS)
    for case in (ONE, BASE):
        if case in rates and case in bare:
            name = f"{model}: {titles[case]} with adapters over without"
            ratio = rates[case] / bare[case]["output_throughput"]
            yield Verdict(name, ratio, "x", SUPPORT_TO_NONE, BARE)
    if ONE in rates and model in ONE_STREAM:
        yield Verdict(f"{model}: {titles[ONE]}", rates[ONE], "tokens/s", ONE_STREAM[model])
    for case in (BASE, LORA, LORAS, CGC):
        if case in ours and model in FIRST_TOKEN_MS:
            name, value = f"{model}: {titles[case]}, TTFT p99", ours[case]["p99_ttft_ms"]
            yield Verdict(name, value, "ms", FIRST_TOKEN_MS[model], most=True)


def _of_servers(model: str, servers: Mapping[str, Mapping[str, Any]]) -> Iterator[Verdict]:
    for system in (OURS, BARE):
        if system in servers:
            name = f"{model}: {system}, RSS beyond weights, KV and adapters"
            value = own_memory(servers[system], "rss") / 1e6
            yield Verdict(name, value, "MB", OWN_MEMORY_MB, most=True)
    if BARE in servers and model in START_S:
        name, value = f"{model}: start to first token", servers[BARE]["first_token_s"]
        yield Verdict(name, value, "s", START_S[model], most=True)


def own_memory(server: Mapping[str, Any], kind: str) -> float:
    """Return the bytes that a server holds beyond weights, cache and adapters."""
    known = server["weights"] + server["cache"] + server["adapters"]
    return float(server[kind] - known)
