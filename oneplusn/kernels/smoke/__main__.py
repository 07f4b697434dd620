"""Prove the Triton kernels right on a GPU, and time them beside what was predicted.

Without a GPU, or with TRITON_INTERPRET=1, it is a dry run: the same code at tiny shapes in
Triton's interpreter, and the predictions alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import torch

from oneplusn.kernels.smoke.report import report
from oneplusn.kernels.smoke.supervisor import Command, Orders, Row, Supervisor

COMPILE, TUNE = "compile", "tune"
PARTS = ("correctness", "replays", "timing", "sharing")
DUE = {COMPILE: 0.35, "correctness": 0.6, "replays": 0.7, "timing": 0.93}
"""The share of the time at which the rest of a part is left out, if others follow."""
GRACE_S = 10.0
"""What a process may take longer to finish an item."""
MAX_COMPILERS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit status."""
    options = _parser().parse_args(argv)
    if options.orders is not None:
        return _work(Orders(**json.loads(options.orders)))
    started_at = time.time()
    rows, facts = _supervise(_orders(options, started_at), started_at + options.budget + GRACE_S)
    date, seconds = datetime.now(UTC).date().isoformat(), time.time() - started_at
    text = report(rows, facts, date=date, seconds=seconds)
    sys.stdout.write(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    if options.json is not None:
        found = {"facts": facts, "rows": [_plain(row) for row in rows]}
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return int(any(row.outcome.fault for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m oneplusn.kernels.smoke",
        description=f"{__doc__} Exits with 1 when anything is wrong.",
    )
    parser.add_argument(
        "--only",
        type=_parts,
        default=PARTS,
        metavar="PART,PART",
        help=f"parts to run, of {', '.join(PARTS)} (all)",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="look for better block shapes instead; takes about 9 minutes: --budget 540",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=170.0,
        metavar="SECONDS",
        help="what is not done by then is left out, and named (%(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here as JSON")
    # What this process tells those that it starts.
    parser.add_argument("--orders", help=argparse.SUPPRESS)
    return parser


def _parts(text: str) -> tuple[str, ...]:
    """Parse names of parts.

    Raises:
        ArgumentTypeError: One is unknown.
    """
    named = text.split(",")
    if unknown := set(named) - set(PARTS):
        msg = f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}"
        raise argparse.ArgumentTypeError(msg)
    return tuple(part for part in PARTS if part in named)


def _orders(options: argparse.Namespace, started_at: float) -> Orders:
    """Return what is to be done, all of it."""
    parts = (COMPILE, *((TUNE,) if options.tune else options.only))
    due = DUE | {parts[-1]: 1.0}
    until = {part: started_at + options.budget * due.get(part, 1.0) for part in parts}
    dry = not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return Orders(parts=parts, listed=parts, first=0, stride=1, avoid=(), until=until, dry=dry)


def _supervise(orders: Orders, deadline: float) -> tuple[list[Row], dict[str, str]]:
    """Have everything done by processes; return their rows, and what they say of the device."""

    def show(row: Row) -> None:
        left = deadline - GRACE_S - time.time()
        sys.stderr.write(f"[{left:4.0f} s left] {row}\n")

    supervisors = list[Supervisor]()
    if not orders.dry:
        number = min(MAX_COMPILERS, os.cpu_count() or 1)
        compiling = orders._replace(listed=(COMPILE,), stride=number)
        supervisors += [
            Supervisor(_command(compiling), show, deadline, stride=number, first=first)
            for first in range(number)
        ]
        with ThreadPoolExecutor(number) as pool:
            list(pool.map(Supervisor.run, supervisors))
        orders = orders._replace(listed=orders.parts[1:])
    last = Supervisor(_command(orders), show, deadline)
    last.run()
    rows = [row for supervisor in (*supervisors, last) for row in supervisor.rows]
    return rows, last.facts


def _command(orders: Orders) -> Command:
    """Return how a process is started that follows these orders."""

    def command(first: int, avoid: Sequence[str]) -> list[str]:
        text = json.dumps(orders._replace(first=first, avoid=avoid)._asdict())
        return [sys.executable, "-m", "oneplusn.kernels.smoke", "--orders", text]

    return command


def _work(orders: Orders) -> int:
    """Do items in this process; return the exit status."""
    if orders.dry:
        # Read when Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    from oneplusn.kernels.smoke.worker import follow

    # Only events belong to the standard output; what libraries print goes beside it.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as out:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return follow(orders, out)


def _plain(row: Row) -> dict[str, object]:
    """Return a row with names for all its fields."""
    return {**row._asdict(), "outcome": row.outcome._asdict()}


if __name__ == "__main__":
    sys.exit(main())
