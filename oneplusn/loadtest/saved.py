"""Read back what a load has written, to compare it with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from oneplusn.loadtest import rows
from oneplusn.loadtest.drive import Record
from oneplusn.loadtest.mistake import Mistake


@dataclass(frozen=True, slots=True)
class Run:
    """A load that was measured before.

    Attributes:
        records: All requests, in the order planned; None if they were not kept.
    """

    name: str
    report: Mapping[str, Any]
    records: Sequence[Record] | None

    @property
    def counted(self) -> list[Record]:
        """Requests after the warm-up."""
        return [record for record in self.records or () if record.counts]

    @property
    def answered(self) -> set[int]:
        """Indexes of those of them that were answered."""
        return {r.planned.index for r in self.counted if r.answer is not None}


def read_run(path: Path) -> Run:
    """Read what `--out` wrote: a folder, or the report in it.

    Raises:
        Mistake: It is no report of a load.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        report = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise Mistake(f"{file} cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise Mistake(f"{file} is no JSON: {error}; give a report.json") from None
    if not isinstance(report, dict) or "workload" not in report:
        raise Mistake(f"{file} is no report of a load; give what --out of a load wrote")
    return Run(str(path), report, _records(file.parent / rows.FILE, report))


def _records(path: Path, report: Mapping[str, Any]) -> Sequence[Record] | None:
    """Return the requests beside a report, if they are there and are its own."""
    if not path.exists():
        return None
    records = sorted(rows.read(path), key=lambda record: record.planned.index)
    counted = [record for record in records if record.counts]
    tokens = sum(record.answer.tokens for record in counted if record.answer is not None)
    own = (len(counted), tokens) == (report["num_prompts"], report["total_output_tokens"])
    return records if own else None


def differences(first: Run, second: Run) -> list[str]:
    """Return in what two loads were not the same."""
    mine, other = first.report["workload"], second.report["workload"]
    return [
        f"{name} {mine.get(name)} and {other.get(name)}"
        for name in sorted({*mine, *other})
        if mine.get(name) != other.get(name)
    ]


def common(first: Run, second: Run, *, share: float) -> set[int] | None:
    """Return the requests that both answered, if both sent the same; None if they did not.

    Args:
        first: A load.
        second: Another.
        share: Of the larger load, that must be common.
    """
    if first.report["seed"] != second.report["seed"] or differences(first, second):
        return None
    both = first.answered & second.answered
    most = max(len(first.answered), len(second.answered))
    return both if both and len(both) >= share * most else None
