"""The file of a page image: a header that says where every array lies, then the arrays as they are.

    magic | bytes of the header | crc32 of the header | crc32 of the arrays | header | arrays

Every array begins at a multiple of 64 bytes, so it can be used where it lies, mapped into memory.
A file is written under another name and renamed, so it is there whole or not at all; the sums tell
of what a power cut or a disk did to it later. Knows no torch.
"""

from __future__ import annotations

import mmap
import os
import secrets
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from struct import Struct
from typing import NamedTuple

import msgspec

from oneplusn.errors import AdapterCorrupt

FORMAT = 1
ALIGNMENT = 64

_MAGIC = b"1+N image"
_PREFIX = Struct("<9sBxxIII")
_CHUNK_BYTES = 8 << 20


class ArrayEntry(msgspec.Struct, frozen=True):
    """An array: its dtype by torch's name, its shape, and its first byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SiteEntry(msgspec.Struct, frozen=True):
    """A site: pages A and B, rank rows of every run, and the gates of all tasks in one array."""

    name: str
    run_rows: tuple[int, ...]
    a: ArrayEntry
    b: ArrayEntry
    gates: ArrayEntry


class Header(msgspec.Struct, frozen=True):
    """All of an image but its arrays.

    Attributes:
        layout: `BaseLayout.key` of the base that it was made for.
    """

    digest: str
    layout: str
    tasks: tuple[str, ...]
    task_keys: dict[str, str]
    task_runs: dict[str, tuple[int, ...]]
    num_runs: int
    sites: tuple[SiteEntry, ...]

    @property
    def arrays(self) -> list[ArrayEntry]:
        """Every array, in the order in which they lie."""
        return [array for site in self.sites for array in (site.a, site.b, site.gates)]


class Mapped(NamedTuple):
    """An opened file: `memory` holds the arrays from `start` on."""

    header: Header
    memory: mmap.mmap
    start: int


def place(arrays: Iterable[tuple[str, Sequence[int], int]]) -> list[ArrayEntry]:
    """Lay arrays of (dtype, shape, bytes) one behind the other."""
    entries = []
    offset = 0
    for dtype, shape, num_bytes in arrays:
        entries.append(ArrayEntry(dtype, tuple(shape), offset, num_bytes))
        offset += aligned(num_bytes)
    return entries


def aligned(num_bytes: int) -> int:
    """Round up to where the next array may begin."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def write_image(path: Path, header: Header, arrays: Sequence[memoryview]) -> None:
    """Write a file, whole or not at all; it is a cache, so it does not wait for the disk.

    Args:
        path: Where it goes; an older one is replaced.
        header: With one entry per array, as `place` made them.
        arrays: Their bytes.
    """
    data = msgspec.msgpack.encode(header)
    pieces = [piece for array in arrays for piece in (array, bytes(-len(array) % ALIGNMENT))]
    total = 0
    for piece in pieces:
        total = zlib.crc32(piece, total)
    prefix = _PREFIX.pack(_MAGIC, FORMAT, len(data), zlib.crc32(data), total)
    start = bytes(_start(len(data)) - len(data) - len(prefix))
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with scratch.open("xb") as file:
            file.writelines([prefix, data, start, *pieces])
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def map_image(path: Path) -> Mapped:
    """Open a file without reading its arrays; sizes and the header are checked.

    Raises:
        AdapterCorrupt: It is missing, cut off, damaged, or of another format.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _PREFIX.size:
                raise _damaged(path, f"it has {size} bytes")
            # Copy on write: torch wants memory that it may write to, and nobody does.
            memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise _damaged(path, f"it cannot be read ({error.strerror})") from None
    magic, version, length, header_sum, _ = _PREFIX.unpack_from(memory)
    if magic != _MAGIC or version != FORMAT:
        raise _damaged(path, f"it is no page image of format {FORMAT}")
    data = memory[_PREFIX.size : _PREFIX.size + length]
    if zlib.crc32(data) != header_sum:
        raise _damaged(path, "its header is not what was written")
    header = msgspec.msgpack.decode(data, type=Header)
    end = max((array.offset + aligned(array.num_bytes) for array in header.arrays), default=0)
    if _start(length) + end != size:
        raise _damaged(path, f"it has {size} bytes and should have {_start(length) + end}")
    return Mapped(header, memory, _start(length))


def check_image(path: Path, digest: str) -> None:
    """Read a file whole and compare it with its sums; afterwards it is in the page cache.

    Raises:
        AdapterCorrupt: It is missing, damaged, or of another version.
    """
    header, memory, start = map_image(path)
    if header.digest != digest:
        raise _damaged(path, f"it is of {header.digest}")
    *_, expected = _PREFIX.unpack_from(memory)
    total = 0
    with memoryview(memory) as view:
        for first in range(start, len(view), _CHUNK_BYTES):
            total = zlib.crc32(view[first : first + _CHUNK_BYTES], total)
    if total != expected:
        raise _damaged(path, "its arrays are not what was written")


def _start(header_bytes: int) -> int:
    return aligned(_PREFIX.size + header_bytes)


def _damaged(path: Path, reason: str) -> AdapterCorrupt:
    return AdapterCorrupt(f"the page image {path.name} cannot be used: {reason}")
