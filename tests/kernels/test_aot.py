"""Kernels compiled for GPUs that are not there: what is asked of them, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from oneplusn.errors import ConfigError
from oneplusn.kernels.aot import Facts
from oneplusn.kernels.aot_forms import Form, Limit, forms, num_forms
from oneplusn.kernels.ptx import Program
from oneplusn.server.tools import kernel_report

ROOT = Path(__file__).resolve().parents[2]

FACTS = Facts(
    triton="3.7.1",
    capability=90,
    registers=168,
    stack_bytes=0,
    spill_bytes=0,
    shared_bytes=40 * 1024,
    num_warps=4,
    num_stages=3,
    instructions=Counter(HMMA=8, LDGSTS=4),
    program=Program(".visible .entry empty() { ret; }", {}),
)


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ({}, 3),  # registers
        ({"registers": 161}, 3),  # handed out in eights
        ({"registers": 160}, 3),
        ({"registers": 128}, 4),
        ({"registers": 96}, 5),
        ({"registers": 32}, 5),  # shared memory
        ({"registers": 32, "capability": 80}, 4),
        ({"registers": 32, "shared_bytes": 0}, 16),  # warps
        ({"registers": 32, "shared_bytes": 0, "num_warps": 1}, 32),  # blocks
        ({"shared_bytes": 228 * 1024}, 0),
    ],
)
def test_blocks_of_a_multiprocessor(change, blocks) -> None:
    assert replace(FACTS, **change).blocks_per_multiprocessor == blocks


@pytest.mark.parametrize(
    ("rows", "change", "faults"),
    [
        (16, {}, []),
        (16, {"stack_bytes": 8, "spill_bytes": 12}, ["12 bytes spilled to a stack of 8"]),
        (16, {"registers": 176}, ["176 registers, limit 168", "2 blocks fit, 3 are launched"]),
        (16, {"shared_bytes": 80_000}, ["2 blocks fit, 3 are launched"]),
        (16, {"instructions": Counter(LDGSTS=4)}, ["multiplies by none, not HMMA"]),
        (16, {"instructions": Counter(HMMA=8)}, ["no asynchronous copies"]),
        (64, {}, ["multiplies by HMMA, not HGMMA"]),
        (64, {"capability": 80}, []),
        (64, {"instructions": Counter(HGMMA=8, LDGSTS=4)}, []),
    ],
)
def test_what_a_form_is_asked(rows, change, faults) -> None:
    form = Form("decode", None, {"BM": rows}, Limit(168, "three blocks"), programs=3)
    form = form._replace(kernel=forms(90)[0].kernel)
    assert form.faults(replace(FACTS, **change)) == faults


def test_planted_faults_are_found_in_what_triton_makes() -> None:
    command = [sys.executable, "-P", str(ROOT / "tests/aot_samples.py")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    faults = json.loads(result.stdout)

    spilled, registers = faults.pop("spills"), faults.pop("greedy")
    assert [fault.partition(" ")[2] for fault in registers] == ["registers, limit 32"]
    assert ["spilled to a stack" in fault for fault in spilled] == [True]
    assert faults == {
        "waits": [],
        "reads early": ["H is read without a wait for its flag", "H is read within the wait"],
        "fits": [],
    }


@pytest.fixture(scope="module")
def report() -> list[kernel_report.Row]:
    """Every form for every target, under every Triton that is here."""
    tritons = [kernel_report.INSTALLED]
    if kernel_report.OTHER.is_dir():
        tritons.append(str(kernel_report.OTHER))
    return kernel_report.report(tritons)


@pytest.mark.timeout(600)  # two minutes of two cores when Triton's cache is empty
@pytest.mark.parametrize("version", [None, "3.6"], ids=["the installed Triton", "Triton 3.6"])
def test_every_form_holds(report: list[kernel_report.Row], version: str | None) -> None:
    if version and not kernel_report.OTHER.is_dir():
        pytest.skip(f"needs {kernel_report.OTHER}: run `make other-triton`")
    rows = [row for row in report if row["triton"].startswith("3.6") == (version is not None)]

    assert len(rows) == num_forms()
    assert {(row["form"], row["capability"]): row["faults"] for row in rows if row["faults"]} == {}


def test_a_triton_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `make other-triton`"):
        kernel_report.report([str(tmp_path)])


ROW = {
    "form": "decode q+k+v",
    "triton": "3.7.1",
    "capability": 90,
    "registers": 168,
    "spill_bytes": 0,
    "shared_bytes": 40960,
    "num_warps": 4,
    "num_stages": 3,
    "matrix_units": "HMMA",
    "async_copies": 90,
    "blocks_per_multiprocessor": 3,
    "handover": "counter",
    "order": "holds",
    "faults": [],
}


@pytest.mark.parametrize(
    ("faults", "status", "verdict"),
    [
        ([], 0, "holds"),
        (["176 registers, limit 168", "spills"], 1, "176 registers, limit 168; spills"),
    ],
)
def test_the_report_prints_a_table_and_fails_on_a_fault(
    monkeypatch, capsys, faults, status, verdict
) -> None:
    monkeypatch.setattr(kernel_report, "report", lambda tritons: [{**ROW, "faults": faults}])
    monkeypatch.setattr(sys, "argv", ["kernel_report"])

    assert kernel_report.main() == status
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.startswith("| kernel | sm | Triton | registers |")
    assert row == (
        "| decode q+k+v | 90 | 3.7.1 | 168 | 0 | 40960 | 4 | 3 | HMMA | 90 | 3 | counter | holds "
        f"| {verdict} |"
    )
