"""Show what the benchmark measured: cases, ratios, servers, and where a step's time goes."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from oneplusn.loadtest.bench_cases import CASES
from oneplusn.loadtest.bench_floors import Verdict, own_memory, verdicts
from oneplusn.loadtest.bench_results import Results

PACKAGES = ("oneplusn", "torch", "transformers", "peft")


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


def render(results: Results) -> str:
    """Return the whole report as Markdown."""
    setting, where = results.setting, results.machine
    versions = ", ".join(f"{name} {where[name]}" for name in ("python", *PACKAGES))
    parts = [
        f"{where['cpu']}, {where['cores']} cores; load average before the run: "
        f"{where['load_before']}. {versions}.",
        f"Closed loop of {setting['streams']} streams, {setting['rounds']} requests each, "
        f"{setting['prompt']} prompt and {setting['output']} output tokens, greedy, end of text "
        f"ignored, bf16. Threads: servers {setting['threads']} for arithmetic, and those of their "
        f"HTTP; client 1, in a process of its own; static batches {setting['threads']}, in "
        f"process, without HTTP. Up to {setting['repeats']} runs a row after a warm-up, the "
        "median by tokens/s is shown.",
    ]
    for model in dict.fromkeys((*results.rows, *results.missing)):
        parts += [f"## {model}", *_of_model(results, model)]
    if found := verdicts(results):
        parts += ["## Floors", _verdict_table(found)]
    return "\n\n".join(parts)


def _of_model(results: Results, model: str) -> Iterator[str]:
    if rows := results.rows.get(model):
        yield f"{_case_table(rows, results.setting['titles'])}\n\nTimes in ms."
    if servers := results.servers.get(model):
        yield f"{_server_table(servers)}\n\nMemory in MB, of all processes of a system."
    for system, why in results.missing.get(model, {}).items():
        yield f"**{system}** has no figures, or not all of them:\n\n{_quoted(why)}"
    if shares := results.shares.get(model):
        yield _share_table(shares, results.setting["titles"])


def _case_table(
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]], titles: Mapping[str, str]
) -> str:
    head = ["", "system", "tokens/s", "TTFT p50 / p99", "inter-token p50 / p99", "runs"]
    lines = [
        [
            titles[case],
            system,
            f"{row['output_throughput']:.1f}",
            f"{row['p50_ttft_ms']:.0f} / {row['p99_ttft_ms']:.0f}",
            f"{row['p50_itl_ms']:.1f} / {row['p99_itl_ms']:.1f}",
            str(row["runs"]),
        ]
        for case in CASES
        for system, cases in rows.items()
        if (row := cases.get(case))
    ]
    return table(head, lines)


def _server_table(servers: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["", "version", "ready after, s", "first token after, s", "RSS", "PSS"]
    head += ["weights", "KV", "adapters", "RSS beyond", "PSS beyond"]
    lines = list[list[str]]()
    for system, found in servers.items():
        starts = [
            f"{found[name]:.1f}" if name in found else "" for name in ("ready_s", "first_token_s")
        ]
        sizes = [found[name] for name in ("rss", "pss", "weights", "cache", "adapters")]
        sizes += [own_memory(found, kind) for kind in ("rss", "pss")]
        lines.append(
            [system, found.get("version", ""), *starts, *(f"{size / 1e6:.0f}" for size in sizes)]
        )
    return table(head, lines)


def _verdict_table(found: Sequence[Verdict]) -> str:
    lines = [[v.name, v.against, _value(v), _floor(v), "" if v.is_met else "missed"] for v in found]
    return table(["", "against", "found", "floor", ""], lines)


def _floor(verdict: Verdict) -> str:
    if verdict.floor is None:
        return ""
    return f"{'<=' if verdict.most else '>='} {verdict.floor:g} {verdict.unit}"


def _value(verdict: Verdict) -> str:
    if verdict.value is None:
        return "not measured"
    shown = f"{verdict.value:.2f}" if abs(verdict.value) < 100 else f"{verdict.value:.0f}"
    return f"{shown} {verdict.unit}"


def _share_table(shares: Mapping[str, Mapping[str, float]], titles: Mapping[str, str]) -> str:
    lines = list[list[str]]()
    for case, parts in shares.items():
        total = sum(parts.values())
        cells = [f"{ms:.2f} ({ms / total:.0%})" for ms in parts.values()]
        lines.append([titles[case], *cells, f"{total:.2f}"])
    parts = next(iter(shares.values()))
    return f"ms per decode step, and share:\n\n{table(['', *parts, 'step'], lines)}"


def _quoted(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
