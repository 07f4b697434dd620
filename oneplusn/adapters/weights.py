"""Read and write tensors in the safetensors format, and check a file before any library reads it.

A file is 8 bytes with the length of the header, the header (JSON: name -> dtype, shape and byte
range), and the bytes of the tensors. The library also takes 600,000 empty tensors and the same key
twice; a file from outside may have neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from oneplusn.adapters.checks import decode_json, shown
from oneplusn.errors import AdapterInvalid, AdapterMediaType

MAX_HEADER_BYTES = 8 * 1024 * 1024
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 4
MAX_DIMENSION = 2**31 - 1

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_LENGTH_BYTES = 8
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}")
_FOREIGN_MAGIC = {b"PK\x03\x04": "a zip archive", b"\x80": "a pickle"}

_Dimension = Annotated[int, msgspec.Meta(ge=0, le=MAX_DIMENSION)]
_Offset = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the header says of one tensor; offsets count from the end of the header, in bytes."""

    dtype: str
    shape: Annotated[tuple[_Dimension, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    data_offsets: tuple[_Offset, _Offset]

    @property
    def num_bytes(self) -> int:
        """Bytes that dtype and shape ask for; exact, Python integers do not overflow."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def check_safetensors_header(path: Path) -> Mapping[str, TensorEntry]:
    """Check everything about a safetensors file that can be known without reading its tensors.

    Raises:
        AdapterInvalid: `safetensors_invalid`, `dtype_not_supported` or a code of `decode_json`.
        AdapterMediaType: it is a pickle or an archive under this name.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _read_header(file, size, path.name)
    what = f"header of {path.name}"
    raw = decode_json(header, dict[str, msgspec.Raw], what=what, max_bytes=MAX_HEADER_BYTES)
    if len(raw) > MAX_TENSORS:
        raise _invalid(path.name, f"{len(raw)} tensors, the limit is {MAX_TENSORS}")
    notes = raw.pop("__metadata__", None)
    if notes is not None:
        decode_json(
            bytes(notes), dict[str, str], what=f"__metadata__ in {what}", max_bytes=len(header)
        )
    entries = {name: _entry(name, value, path.name) for name, value in raw.items()}
    _check_layout(entries, size - _LENGTH_BYTES - len(header), path.name)
    return entries


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Check a file, then read all its tensors into memory of their own.

    Raises:
        AdapterInvalid, AdapterMediaType: as `check_safetensors_header`.
    """
    names = check_safetensors_header(path)
    try:
        with safe_open(path, "pt") as file:
            # A copy, because the library's tensors are windows into the file.
            return {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise _invalid(path.name, shown(str(error))) from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file, one tensor at a time; equal tensors give equal bytes."""
    # The widest first, so that every tensor begins at a multiple of its items' size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    stops = list(accumulate(tensor.nbytes for _, tensor in ordered))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for (name, tensor), stop in zip(ordered, stops, strict=True):
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [stop - tensor.nbytes, stop],
        }
    data = msgspec.json.encode(header)
    data += b" " * (-len(data) % _LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        for _, tensor in ordered:
            flat = tensor.detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)


def _read_header(file: BinaryIO, size: int, name: str) -> bytes:
    length_bytes = file.read(_LENGTH_BYTES)
    length = int.from_bytes(length_bytes, "little")
    if length > MAX_HEADER_BYTES:
        _refuse_foreign(length_bytes, name)
    if len(length_bytes) < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
        raise _invalid(
            name,
            f"header of {length} bytes in a file of {size}; the limit is the file and"
            f" {MAX_HEADER_BYTES} bytes",
        )
    return file.read(length)


def _refuse_foreign(start: bytes, name: str) -> None:
    """Say so when the file is of a kind that can run code."""
    for magic, kind in _FOREIGN_MAGIC.items():
        if start.startswith(magic):
            raise AdapterMediaType(
                f"{name} is {kind}, not safetensors; only safetensors is read, so save the weights"
                " with safetensors.torch.save_file"
            )


def _entry(name: str, value: msgspec.Raw, file_name: str) -> TensorEntry:
    if _TENSOR_NAME.fullmatch(name) is None:
        raise _invalid(
            file_name,
            f"tensor name {shown(name)}; expected at most 512 of letters, digits, '.', '_', '-'",
        )
    try:
        entry = msgspec.json.decode(value, type=TensorEntry)
    except msgspec.ValidationError as error:
        raise _invalid(file_name, f"tensor {shown(name)}: {error}") from None
    if entry.dtype not in ITEM_BYTES:
        raise AdapterInvalid(
            f"{file_name}: tensor {shown(name)} is {shown(entry.dtype)}; expected one of"
            f" {', '.join(ITEM_BYTES)}; cast it before saving",
            code="dtype_not_supported",
        )
    start, stop = entry.data_offsets
    if stop - start != entry.num_bytes:
        raise _invalid(
            file_name,
            f"tensor {shown(name)}: shape {list(entry.shape)} of {entry.dtype} takes"
            f" {entry.num_bytes} bytes and its offsets {start} to {stop} span {stop - start}",
        )
    return entry


def _check_layout(entries: Mapping[str, TensorEntry], data_bytes: int, file_name: str) -> None:
    """Check that the tensors follow each other without gap or overlap up to the end of the file."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end:
            fault = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise _invalid(
                file_name, f"tensor {shown(name)} {fault}: it starts at {start}, expected {end}"
            )
        end = stop
    if end != data_bytes:
        raise _invalid(
            file_name,
            f"tensors take {end} bytes and the file holds {data_bytes} after its header; it is cut"
            " off or has something appended",
        )


def _invalid(file_name: str, reason: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{file_name}: {reason}; write it again with safetensors.torch.save_file",
        code="safetensors_invalid",
    )
