"""How much memory a process and all that it started hold."""

from __future__ import annotations

import re
from pathlib import Path

PROC = Path("/proc")


def resident(pid: int, proc: Path = PROC) -> dict[str, int]:
    """Return `rss` and `pss` of a process and its descendants, in bytes."""
    total = {"rss": 0, "pss": 0}
    for member in family(pid, proc):
        try:
            text = (proc / str(member) / "smaps_rollup").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        for name, kib in re.findall(r"^(Rss|Pss): +(\d+) kB", text, re.MULTILINE):
            total[name.lower()] += int(kib) * 1024
    return total


def family(pid: int, proc: Path = PROC) -> list[int]:
    """Return a process and its descendants."""
    children = dict[int, list[int]]()
    for stat in proc.glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold spaces, so fields count from the last bracket.
            parent = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found
