"""Say what the Triton kernels become on each GPU, under each Triton, and whether that is right.

    python -m oneplusn.server.tools.kernel_report

Needs no GPU: kernels are compiled ahead of time, under every Triton in a process of its own. Exits
with 1 when a kernel does not hold what `oneplusn/kernels/aot_forms.py` asks of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from oneplusn.errors import ConfigError, OneplusnError
from oneplusn.kernels.aot_forms import num_forms

INSTALLED = "installed"
OTHER = Path(sys.prefix, "triton-3.6")
"""Where `make` puts the oldest Triton that is served with, beside the installed one."""

Row = dict[str, Any]
COLUMNS = {
    "form": "kernel",
    "capability": "sm",
    "triton": "Triton",
    "registers": "registers",
    "spill_bytes": "spilled bytes",
    "shared_bytes": "shared bytes",
    "num_warps": "warps",
    "num_stages": "stages",
    "matrix_units": "multiplies by",
    "async_copies": "async copies",
    "blocks_per_multiprocessor": "blocks per SM",
    "handover": "H handed over by",
    "order": "in order",
}


def report(tritons: Sequence[str]) -> list[Row]:
    """Compile every form under every Triton, two of them at a time.

    Args:
        tritons: Folders that hold a Triton, or "installed".

    Raises:
        ConfigError: A folder holds no Triton, or a compilation failed.
    """
    for folder in tritons:
        if folder != INSTALLED and not Path(folder, "triton").is_dir():
            msg = f"{folder} holds no Triton: run `make other-triton`, or give --triton {INSTALLED}"
            raise ConfigError(msg)
    total = num_forms() * len(tritons)
    with tqdm(total=total, unit="kernel", file=sys.stderr) as bar, ThreadPoolExecutor(2) as pool:

        def rows_of(triton: str) -> list[Row]:
            rows = list[Row]()
            for row in _compiled(triton):
                rows.append(row)
                bar.update()
            return rows

        return [row for rows in pool.map(rows_of, tritons) for row in rows]


def _compiled(triton: str) -> Iterator[Row]:
    """Yield the rows of one Triton, as a process of its own finds them.

    Raises:
        ConfigError: The process failed.
    """
    # Interpreted kernels cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton != INSTALLED:
        environment["PYTHONPATH"] = str(Path(triton).resolve())
    command = [sys.executable, "-P", "-m", "oneplusn.kernels.aot_forms"]
    with subprocess.Popen(  # noqa: S603 - this interpreter, with a module of ours
        command, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        msg = f"Triton ({triton}) failed with status {process.returncode}; see the trace above"
        raise ConfigError(msg)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        [*COLUMNS.values(), "verdict"],
        ["---"] * (len(COLUMNS) + 1),
        *([*(str(row[name]) for name in COLUMNS), _verdict(row)] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _verdict(row: Row) -> str:
    return "; ".join(row["faults"]) or "holds"


def main() -> int:
    """Report on the Tritons that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(prog="kernel_report", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--triton",
        action="append",
        metavar="FOLDER",
        help=f"a folder that holds a Triton, or {INSTALLED!r}; repeatable "
        f"({INSTALLED}, and {OTHER.name} of the virtual environment)",
    )
    parser.add_argument("--json", action="store_true", help="rows as JSON, not as a table")
    args = parser.parse_args()
    try:
        rows = report(args.triton or [INSTALLED, str(OTHER)])
    except OneplusnError as error:
        sys.stderr.write(f"kernel_report: {error}\n")
        return 2
    sys.stdout.write(f"{json.dumps(rows) if args.json else table(rows)}\n")
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
