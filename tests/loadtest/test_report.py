from __future__ import annotations

from pathlib import Path

import pytest

from oneplusn.loadtest.bench_cases import CASES, Work
from oneplusn.loadtest.bench_results import Results
from oneplusn.loadtest.fixtures import Fixtures
from oneplusn.loadtest.report import cpu_model, render

SETTING = {"streams": 16, "rounds": 2, "prompt": 64, "output": 64, "repeats": 3, "threads": 2}
MACHINE = {
    "cpu": "Some CPU (avx512_bf16)",
    "cores": 2,
    "load_before": 0.1,
    "python": "3.11",
    "oneplusn": "0",
    "torch": "1",
    "transformers": "2",
    "peft": "3",
}


def row(rate: float) -> dict[str, float]:
    times = {"p50_ttft_ms": 300.0, "p99_ttft_ms": 310.0, "p50_itl_ms": 25.0, "p99_itl_ms": 34.0}
    return {"output_throughput": rate, "runs": 3, **times}


@pytest.fixture
def report() -> str:
    work = Work("small", 16, 64, 64, 2, 3, 2, Fixtures(Path("x"), 16))
    titles = {case: work.title(case) for case in CASES}
    memory = {"rss": 1.4e9, "pss": 1.2e9, "weights": 3e8, "cache": 1e8, "adapters": 2e8}
    return render(
        Results(
            {**SETTING, "titles": titles},
            MACHINE,
            rows={
                "small": {
                    "oneplusn": {"base": row(512.0), "loras": row(256.0)},
                    "PEFT, static batch": {"loras": row(64.0)},
                }
            },
            servers={
                "small": {
                    "oneplusn": {"version": "0.1", "ready_s": 3.0, "first_token_s": 3.21, **memory},
                    "PEFT, static batch": memory,
                }
            },
            missing={"small": {"llama.cpp": "exit code 1:\nno such file"}},
            shares={"small": {"base": {"GEMM": 15.0, "Python": 5.0}}},
        )
    )


def test_the_report_names_hardware_threads_and_every_figure(report: str) -> None:
    lines = report.splitlines()

    assert lines[0].startswith("Some CPU (avx512_bf16), 2 cores; load average before the run: 0.1.")
    assert "Threads: servers 2 for arithmetic" in lines[2]
    assert "client 1, in a process of its own" in lines[2]
    assert "| 16 different LoRAs | oneplusn | 256.0 | 300 / 310 | 25.0 / 34.0 | 3 |" in lines
    assert (
        "| 16 different LoRAs | PEFT, static batch | 64.0 | 300 / 310 | 25.0 / 34.0 | 3 |" in lines
    )
    assert "| oneplusn | 0.1 | 3.0 | 3.2 | 1400 | 1200 | 300 | 100 | 200 | 800 | 600 |" in lines
    assert "| PEFT, static batch |  |  |  | 1400 | 1200 | 300 | 100 | 200 | 800 | 600 |" in lines
    assert "| bare base | 15.00 (75%) | 5.00 (25%) | 20.00 |" in lines


def test_a_system_without_figures_is_never_left_out(report: str) -> None:
    assert (
        "**llama.cpp** has no figures, or not all of them:\n\n    exit code 1:\n    no such file"
        in report
    )


def test_floors_stand_beside_what_was_found(report: str) -> None:
    name = "small: 16 different LoRAs, tokens/s over the best peer's"
    memory = "small: oneplusn, RSS beyond weights, KV and adapters"

    assert f"| {name} | PEFT, static batch | 4.00 x | >= 4.5 x | missed |" in report
    assert f"| {memory} |  | 800 MB | <= 600 MB | missed |" in report
    assert "| small: bare base, tokens/s over the best peer's |  | not measured |" in report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
            "flags\t\t: avx2 avx512_bf16\n\nprocessor\t: 1\nmodel name\t: other\n",
            "AMD EPYC (cpu family 25, model 17; avx512_bf16)",
        ),
        ("model name : Old\nflags : avx2\n", "Old (no bf16)"),
        ("model name : New\nflags : amx_bf16 avx512_bf16\n", "New (avx512_bf16 amx_bf16)"),
    ],
)
def test_processor_is_named_from_cpuinfo(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text, encoding="utf-8")

    assert cpu_model(file) == expected
