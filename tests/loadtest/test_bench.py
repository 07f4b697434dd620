from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = [sys.executable, "-P", "-m", "oneplusn.loadtest.bench"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--peers", "vllm"], "no peer vllm; there are peft, transformers"),
        (["--requests", "0"], "are 1 or more"),
        (["--output", "1"], "--output is 2 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], reason: str) -> None:
    done = subprocess.run([*BENCH, *arguments], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert reason in done.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_quick_run_measures_every_case(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"

    done = subprocess.run(
        [*BENCH, "--quick", "--threads", "1", "--json", str(figures)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert [case["name"] for case in found["cases"]] == [
        "one request, bare base",
        "bare base",
        "one LoRA",
        "2 different LoRAs",
        "2 tasks in CGC clusters of 4",
    ]
    assert [case["output_tokens"] for case in found["cases"]] == [8, 16, 16, 16, 16]
    assert all(case["step_ms"] > 0 for case in found["cases"])
    assert list(found["shares_ms"]) == [
        "bare base",
        "2 different LoRAs",
        "2 tasks in CGC clusters of 4",
    ]
    for name, parts in found["shares_ms"].items():
        assert (parts["delta"] > 0) == (name != "bare base")
        assert min(parts.values()) >= 0
    assert "| oneplusn, 2 different LoRAs |" in done.stdout
