"""Show what a benchmark measured: one table of cases, ratios, where a step's time goes."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from oneplusn.loadtest.client import Summary
from oneplusn.loadtest.fixtures import BASE, MIXED

PACKAGES = ("oneplusn", "torch", "transformers", "peft")
MIXED_TARGET = 3.0
BASE_TARGET = 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """What the server did under one load; `step_ms` is the mean over all steps, by its metrics."""

    name: str
    summary: Summary
    step_ms: float

    @property
    def figures(self) -> dict[str, Any]:
        """Everything, for JSON."""
        rate = {"tokens_per_s": self.summary.tokens_per_s}
        return {"name": self.name, **rate, **asdict(self.summary), "step_ms": self.step_ms}


@dataclass(slots=True)
class Report:
    """One run of the benchmark.

    Attributes:
        setting: What was asked for, by name.
        machine: Where, and with which versions.
        cases: Our server's, in the order measured.
        peers: The figures of each peer's cases.
        shares: Case -> part of a step -> milliseconds.
    """

    setting: Mapping[str, Any]
    machine: Mapping[str, Any]
    cases: list[Case] = field(default_factory=list)
    peers: list[Mapping[str, Any]] = field(default_factory=list)
    shares: dict[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def ratios(self) -> list[tuple[str, float, float | None]]:
        """What is compared, our figure over the peer's, and the target if there is one."""
        rates = {case.name: case.summary for case in self.cases}
        peers = {peer["name"]: peer for peer in self.peers}
        mixed = MIXED.format(self.setting["requests"])
        pairs = [
            (mixed, f"PEFT, {mixed}", MIXED_TARGET),
            (BASE, f"transformers, {BASE}", BASE_TARGET),
        ]
        rows = list[tuple[str, float, float | None]]()
        for ours, theirs, target in pairs:
            if ours in rates and theirs in peers:
                mine, peer = rates[ours], peers[theirs]
                whole = mine.tokens_per_s / peer["tokens_per_s"]
                decode = mine.decode_tokens_per_s / peer["decode_tokens_per_s"]
                rows += [(f"{theirs}, whole run", whole, target)]
                rows += [(f"{theirs}, decode only", decode, None)]
        return rows

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {
            "setting": self.setting,
            "machine": self.machine,
            "cases": [case.figures for case in self.cases],
            "peers": self.peers,
            "ratios": [
                {"against": name, "ratio": ratio, "target": target}
                for name, ratio, target in self.ratios
            ],
            "shares_ms": self.shares,
        }


def machine() -> dict[str, Any]:
    """Describe the hardware and the versions of this run."""
    return {
        "cpu": cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def cpu_model(cpuinfo: Path) -> str:
    """Name the processor and those of its extensions that decide the speed of bf16."""
    fields = dict[str, str]()
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    known = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    name = fields.get("model name", platform.machine())
    return f"{name} ({'; '.join(filter(None, [family, ' '.join(known) or 'no bf16']))})"


def render(report: Report) -> str:
    """Return the whole report as Markdown."""
    setting, where = report.setting, report.machine
    versions = ", ".join(f"{name} {where[name]}" for name in ("python", *PACKAGES))
    head = [
        f"{where['cpu']}, {where['cores']} cores; load average before the run: "
        f"{where['load_before']}. {versions}.",
        f"Model {setting['model']}; {setting['requests']} requests at once, "
        f"{setting['prompt']} prompt and {setting['output']} output tokens, greedy, bf16. "
        f"Threads: server {setting['threads']} for arithmetic, and its event loop; client 1, in a "
        f"process of its own; peers {setting['threads']}, in process, without HTTP. "
        f"Runs per row after a warm-up: {setting['repeats']}, the median by tokens/s is shown.",
    ]
    parts = ["\n\n".join(head), _case_table(report)]
    if report.ratios:
        parts.append(_ratio_table(report))
    if report.shares:
        parts.append(_share_table(report))
    return "\n\n".join(parts)


def _case_table(report: Report) -> str:
    head = ["", "tokens/s", "decode only", "TTFT p50 / p99", "inter-token p50 / p99", "step, mean"]
    rows = [_own_row(case) for case in report.cases]
    rows += [
        [
            str(peer["name"]),
            f"{peer['tokens_per_s']:.1f}",
            f"{peer['decode_tokens_per_s']:.1f}",
            f"{peer['ttft_ms']:.0f}",
            "",
            f"{peer['step_ms']:.1f} (decode)",
        ]
        for peer in report.peers
    ]
    return f"{table(head, rows)}\n\nTimes in ms."


def _own_row(case: Case) -> list[str]:
    found = case.summary
    return [
        f"oneplusn, {case.name}",
        f"{found.tokens_per_s:.1f}",
        f"{found.decode_tokens_per_s:.1f}",
        f"{found.ttft_p50_ms:.0f} / {found.ttft_p99_ms:.0f}",
        f"{found.gap_p50_ms:.1f} / {found.gap_p99_ms:.1f}",
        f"{case.step_ms:.1f}",
    ]


def _ratio_table(report: Report) -> str:
    rows = [
        [name, f"{ratio:.2f}x", "" if target is None else f">= {target:g}x"]
        for name, ratio, target in report.ratios
    ]
    return table(["oneplusn against", "ratio", "target"], rows)


def _share_table(report: Report) -> str:
    rows = list[list[str]]()
    for case, parts in report.shares.items():
        total = sum(parts.values())
        cells = [f"{ms:.2f} ({ms / total:.0%})" for ms in parts.values()]
        rows.append([case, *cells, f"{total:.2f}"])
    parts = next(iter(report.shares.values()))
    return f"ms per decode step, and share:\n\n{table(['', *parts, 'step'], rows)}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
