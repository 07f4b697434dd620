"""Change a data folder step by step, to be killed on the way: `python -P crashing.py DATA WORK`.

Every step that has been acknowledged is printed. `STATES` are what a reader may see after each.
With a third argument, the process kills itself when that function is entered.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import msgspec

from oneplusn.adapters.prepared import Prepared
from oneplusn.adapters.registry import Registry

Step = Callable[[Registry, Path], object]


def _publish(which: str, *, activate: bool = True) -> Step:
    def publish(registry: Registry, work: Path) -> object:
        made = msgspec.json.decode((work / which / "prepared.json").read_bytes(), type=Prepared)
        return registry.publish(made, work / which / "out", activate=activate)

    return publish


STEPS: dict[str, Step] = {
    "publish 1": _publish("one"),
    "publish 2": _publish("two"),
    "rollback": lambda registry, _: registry.rollback("a"),
    "save blend": lambda registry, _: registry.save_blend("mix", {"t": 0.5}),
    "delete 2": lambda registry, _: registry.delete("a", 2),
    "quarantine": lambda registry, _: registry.quarantine(
        registry.version("a", 1).digest, "for the test"
    ),
    "delete": lambda registry, _: registry.delete("a"),
}

State = tuple[list[tuple[int, bool, bool]], list[str]]
STATES: list[State] = [
    ([], []),
    ([(1, True, False)], []),
    ([(1, False, False), (2, True, False)], []),
    ([(1, True, False), (2, False, False)], []),
    ([(1, True, False), (2, False, False)], ["mix"]),
    ([(1, True, False)], ["mix"]),
    ([(1, True, True)], ["mix"]),
    ([], ["mix"]),
]
"""Number, whether it is active and whether it is corrupt, of every version; saved blends."""


def state(registry: Registry) -> State:
    """What a reader sees."""
    versions = [
        (version.number, version.active, version.corrupt is not None)
        for adapter in registry.adapters()
        for version in adapter.versions
    ]
    return versions, [blend.name for blend in registry.blends()]


def main(data: Path, work: Path, point: str | None = None) -> None:
    registry = Registry(data, base_name="base")
    if point is not None:
        _kill_at(point)
    for name, step in STEPS.items():
        step(registry, work)
        os.write(1, f"{name}\n".encode())
    registry.close()


def _kill_at(point: str) -> None:
    """Replace a function, `module:name` or `module:Class.name@2` for its second call."""
    path, _, count = point.partition("@")
    module, _, name = path.partition(":")
    owner = import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, last)
    left = int(count or 1)

    def killed(*args: object, **options: object) -> object:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(owner, last, killed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
