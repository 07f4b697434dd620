from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SWAP = [sys.executable, "-P", "-m", "oneplusn.loadtest.swap"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--flips", "0"], "every number is above 0"),
        (["--swaps-per-s", "-1"], "every number is above 0"),
        (["--adapters", "1"], "--adapters and --output are 2 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], reason: str) -> None:
    done = subprocess.run([*SWAP, *arguments], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert reason in done.stderr


@pytest.mark.e2e
@pytest.mark.slow
def test_quick_run_finds_every_answer_whole(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"

    done = subprocess.run(
        [*SWAP, "--quick", "--threads", "1", "--json", str(figures)],
        capture_output=True,
        text=True,
        check=False,
    )

    found = json.loads(figures.read_text(encoding="utf-8"))
    assert found["faults"] == []
    assert found["requests"] > 20
    assert found["pairs"][0]["flips"] >= 4
    assert found["uploads"]["completed"] >= 2
    assert done.returncode == (1 if found["missed"] else 0)
    assert "answers checked, 0 faults" in done.stdout
