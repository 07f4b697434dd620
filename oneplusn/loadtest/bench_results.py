"""What the benchmark found so far, in one file, so that it can be measured in pieces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MACHINE_MAY_DIFFER = ("load_before",)


class OtherSetting(Exception):
    """A file holds results of other work, or of another machine."""


@dataclass(slots=True)
class Results:
    """Everything that was measured with one setting on one machine.

    Attributes:
        setting: What was asked for, the same for all models.
        machine: Where, and with which versions.
        rows: The figures of a case: model -> system -> case.
        servers: What starting and holding a system cost: model -> system.
        missing: Why a system has no figures: model -> system.
        shares: Milliseconds of a part of a step: model -> case -> part.
        file: Where all of this is kept; None for nowhere.
    """

    setting: Mapping[str, Any]
    machine: Mapping[str, Any]
    rows: dict[str, dict[str, dict[str, dict[str, Any]]]] = field(default_factory=dict)
    servers: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)
    shares: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    file: Path | None = None

    @classmethod
    def kept(cls, setting: Mapping[str, Any], machine: Mapping[str, Any], file: Path) -> Results:
        """Go on with what a file holds; begin if there is none.

        Raises:
            OtherSetting: It holds results that cannot stand beside new ones.
        """
        fresh = cls(setting, machine, file=file)
        if not file.exists():
            return fresh
        content = json.loads(file.read_text(encoding="utf-8"))
        found = cls(**{name: content[name] for name in asdict(fresh) if name != "file"}, file=file)
        for old, new in ((found.setting, setting), (found.machine, machine)):
            for name in new:
                if name not in MACHINE_MAY_DIFFER and old.get(name) != new[name]:
                    msg = (
                        f"{file} was measured with {name} {old.get(name)!r}, not {new[name]!r}; "
                        "name another file, or remove it"
                    )
                    raise OtherSetting(msg)
        return found

    def lacks(self, model: str, system: str, case: str) -> bool:
        """Whether a case is still to be measured."""
        return case not in self.rows.get(model, {}).get(system, {})

    def forget(self, model: str, system: str) -> None:
        """Let a system be measured again."""
        for found in (self.rows, self.servers, self.missing):
            found.get(model, {}).pop(system, None)

    def miss(self, model: str, system: str, why: str) -> None:
        """Note why there are no figures, or not all."""
        self.missing.setdefault(model, {})[system] = why
        self.save()

    def save(self) -> None:
        """Write everything, so that nothing is lost if the next part fails."""
        if self.file is None:
            return
        content = {name: value for name, value in asdict(self).items() if name != "file"}
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        partial.replace(self.file)


@dataclass(frozen=True, slots=True)
class Share:
    """The part of the results that one model's systems write."""

    results: Results
    model: str

    def row(self, system: str, case: str, figures: Mapping[str, Any]) -> None:
        """Take the figures of one case."""
        when = datetime.now(UTC).isoformat(timespec="seconds")
        rows = self.results.rows.setdefault(self.model, {}).setdefault(system, {})
        rows[case] = {**figures, "measured_at": when}
        self.results.save()

    def server(self, system: str, figures: Mapping[str, Any]) -> None:
        """Take what starting and holding the system cost."""
        self.results.servers.setdefault(self.model, {})[system] = dict(figures)
        self.results.missing.get(self.model, {}).pop(system, None)
        self.results.save()
