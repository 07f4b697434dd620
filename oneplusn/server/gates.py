"""Read the gates of a task from its adapter's files: how much of each expert it takes, per module.

Only the gate row and the scales are read, straight from the safetensors file, whose form was
checked when the adapter was uploaded. Knows no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from oneplusn.adapters.prepared import BLOB_FILES

_LENGTH_BYTES = 8
_FLOAT_BYTES = 4


class _Expert(msgspec.Struct):
    name: str


class _Site(msgspec.Struct):
    ranks: list[int]


class _Description(msgspec.Struct):
    tasks: list[str]
    experts: list[_Expert]
    sites: dict[str, _Site]


class _Entry(msgspec.Struct):
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Gates:
    """What a task takes of the experts of its cluster.

    Attributes:
        experts: Names of those that it takes anywhere.
        modules: Module path -> gate times scale of each of them, 0 where one is absent.
    """

    experts: tuple[str, ...]
    modules: Mapping[str, tuple[float, ...]]


def read_gates(blob: Path, task: str) -> Gates:
    """Read the gates of one task; `blob` is the folder of its adapter version."""
    description_file, weights_file = (blob / name for name in BLOB_FILES)
    description = msgspec.json.decode(description_file.read_bytes(), type=_Description)
    row, count = description.tasks.index(task), len(description.experts)
    with weights_file.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        starts = {
            name: _LENGTH_BYTES + length + msgspec.json.decode(value, type=_Entry).data_offsets[0]
            for name, value in raw.items()
            if name.endswith((".gate", ".scale"))
        }
        weights = {
            path: _weights(
                _floats(file, starts[f"{path}.gate"] + row * count * _FLOAT_BYTES, count),
                _floats(file, starts[f"{path}.scale"], count),
                site.ranks,
            )
            for path, site in description.sites.items()
        }
    used = [index for index in range(count) if any(row[index] for row in weights.values())]
    return Gates(
        tuple(description.experts[index].name for index in used),
        {path: tuple(row[index] for index in used) for path, row in weights.items()},
    )


def _weights(
    gate: Sequence[float], scale: Sequence[float], ranks: Sequence[int]
) -> tuple[float, ...]:
    """Multiply gates with scales; an expert without rank rows adds nothing."""
    return tuple(g * s if rank else 0.0 for g, s, rank in zip(gate, scale, ranks, strict=True))


def _floats(file: BinaryIO, start: int, count: int) -> tuple[float, ...]:
    file.seek(start)
    return struct.unpack(f"<{count}f", file.read(count * _FLOAT_BYTES))
