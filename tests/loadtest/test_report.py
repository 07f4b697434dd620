from __future__ import annotations

import pytest

from oneplusn.loadtest.client import Summary
from oneplusn.loadtest.peers import PeerCase, median_run
from oneplusn.loadtest.report import Case, Report, cpu_model, render

SETTING = {
    "model": "small",
    "requests": 16,
    "prompt": 64,
    "output": 64,
    "threads": 2,
    "repeats": 3,
}
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


def case(name: str, *, tokens: int, seconds: float, decode: float) -> Case:
    return Case(name, Summary(16, tokens, 0, seconds, 300.0, 310.0, 25.0, 34.0, decode), 26.5)


def peer(name: str, *, rate: float, decode: float) -> dict[str, object]:
    return {
        "name": name,
        "tokens_per_s": rate,
        "decode_tokens_per_s": decode,
        "ttft_ms": 1386.0,
        "step_ms": 240.0,
    }


@pytest.fixture
def report() -> Report:
    return Report(
        SETTING,
        MACHINE,
        cases=[
            case("bare base", tokens=1024, seconds=2.0, decode=640.0),
            case("16 different LoRAs", tokens=1024, seconds=4.0, decode=320.0),
        ],
        peers=[
            peer("PEFT, 16 different LoRAs", rate=64.0, decode=80.0),
            peer("transformers, bare base", rate=256.0, decode=320.0),
        ],
        shares={"bare base": {"GEMM": 15.0, "Python": 5.0}},
    )


def test_ratios_compare_equal_work(report: Report) -> None:
    assert report.ratios == [
        ("PEFT, 16 different LoRAs, whole run", 4.0, 3.0),
        ("PEFT, 16 different LoRAs, decode only", 4.0, None),
        ("transformers, bare base, whole run", 2.0, 1.0),
        ("transformers, bare base, decode only", 2.0, None),
    ]


def test_a_peer_that_did_not_run_has_no_ratio(report: Report) -> None:
    del report.peers[0]

    assert [name for name, _, _ in report.ratios] == [
        "transformers, bare base, whole run",
        "transformers, bare base, decode only",
    ]


def test_the_report_names_hardware_threads_and_every_figure(report: Report) -> None:
    lines = render(report).splitlines()

    assert lines[0].startswith("Some CPU (avx512_bf16), 2 cores; load average before the run: 0.1.")
    assert "Threads: server 2 for arithmetic" in lines[2]
    assert (
        "| oneplusn, 16 different LoRAs | 256.0 | 320.0 | 300 / 310 | 25.0 / 34.0 | 26.5 |" in lines
    )
    assert "| PEFT, 16 different LoRAs | 64.0 | 80.0 | 1386 |  | 240.0 (decode) |" in lines
    assert "| PEFT, 16 different LoRAs, whole run | 4.00x | >= 3x |" in lines
    assert "| bare base | 15.00 (75%) | 5.00 (25%) | 20.00 |" in lines


def test_json_has_what_the_table_shows(report: Report) -> None:
    found = report.as_json()

    assert found["cases"][1]["tokens_per_s"] == 256.0
    assert found["ratios"][0] == {
        "against": "PEFT, 16 different LoRAs, whole run",
        "ratio": 4.0,
        "target": 3.0,
    }
    assert found["shares_ms"] == {"bare base": {"GEMM": 15.0, "Python": 5.0}}


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
def test_processor_is_named_from_cpuinfo(tmp_path, text: str, expected: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text, encoding="utf-8")

    assert cpu_model(file) == expected


def test_a_static_batch_in_figures() -> None:
    found = PeerCase("x", rows=4, start=1.0, times=(3.0, 3.5, 4.0, 5.0))

    assert found.figures == {
        "name": "x",
        "tokens_per_s": 4.0,  # 16 tokens from 1.0 to 5.0
        "decode_tokens_per_s": 6.0,  # 12 tokens from 3.0 to 5.0
        "ttft_ms": 2000.0,
        "step_ms": pytest.approx(2000 / 3),
    }


def test_the_median_run_is_shown_whole() -> None:
    runs = [PeerCase("x", 1, 0.0, (end / 2, end)) for end in (3.0, 1.0, 2.0)]

    assert median_run(runs) is runs[2]
