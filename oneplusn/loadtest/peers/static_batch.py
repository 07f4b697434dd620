"""transformers and PEFT in a process without a server: the best case of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from oneplusn.loadtest.bench_cases import BASE, LORA, LORAS, ONE, Held, Work
from oneplusn.loadtest.bench_load import median_run
from oneplusn.loadtest.peers.system import INSIDE, Places, Sink
from oneplusn.loadtest.processes import named, run_json
from oneplusn.loadtest.stats import percentile

LIMIT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Batches:
    """A library that generates for a batch of equal prompts at once."""

    name: str
    cases: tuple[str, ...]
    work: Work
    python: str
    loras: Mapping[str, Path]

    def run(self, cases: Sequence[str], sink: Sink) -> None:
        """Generate in a process of its own.

        Raises:
            ChildFailed: It ended with an error, or took too long.
        """
        work = self.work
        command = [self.python, "-P", "-u", str(INSIDE / "batches.py")]
        command += ["--model", str(work.fixtures.base), *named(self.loras, "--lora")]
        for name in ("threads", "prompt", "output", "repeats"):
            command += [f"--{name}", str(getattr(work, name))]
        for case in cases:
            command += ["--case", f"{case}={','.join(work.asked(case))}"]
        found = run_json(command, threads=work.threads, limit_s=LIMIT_S)
        for case, runs in found["runs"].items():
            rows = len(work.asked(case))
            median = median_run([figures(times, rows) for times in runs])
            sink.row(self.name, case, {**median, "runs": len(runs)})
        held = Held.of(work, list(self.loras.values()), cache=False)
        sink.server(self.name, {**found["memory"], **asdict(held)})


def figures(times: Sequence[float], rows: int) -> dict[str, Any]:
    """Reduce the start of a batch and the ends of its steps, in seconds, to the load's figures."""
    start, first, *_ = times
    ttft = (first - start) * 1e3
    gaps = [(late - early) * 1e3 for early, late in pairwise(times[1:])]
    return {
        "output_throughput": rows * (len(times) - 1) / (times[-1] - start),
        "p50_ttft_ms": ttft,
        "p99_ttft_ms": ttft,
        "p50_itl_ms": percentile(gaps, 50),
        "p99_itl_ms": percentile(gaps, 99),
    }


def transformers(work: Work, places: Places) -> list[Batches]:
    """Return transformers, on the bare base."""
    python = places.python("transformers")
    return [Batches("transformers, static batch", (ONE, BASE), work, python, {})]


def peft(work: Work, places: Places) -> list[Batches]:
    """Return PEFT: one active LoRA on its plain path, and one per row on its mixed path."""
    python = places.python("peft")
    return [Batches("PEFT, static batch", (LORA, LORAS), work, python, work.fixtures.loras)]
