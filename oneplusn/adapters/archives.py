"""Read the members of a .tar, .tar.gz or .zip as streams, without extracting and within bounds.

What a header may cost is bounded before a library parses it: a tar's by a meter on the stream, a
zip's by a look at its end record.
"""

from __future__ import annotations

import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import IO, BinaryIO, NamedTuple, cast

from oneplusn.adapters.checks import shown
from oneplusn.errors import AdapterInvalid, AdapterTooLarge

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
ARCHIVE_SUFFIXES = (*TAR_SUFFIXES, ".zip")

MAX_MEMBERS = 64
MAX_RATIO = 100
"""An archive may expand to this many times its size; weights are noise and hardly shrink."""

DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,  # a zip that ends within a record
    EOFError,
    gzip.BadGzipFile,
    ValueError,  # numbers and text in headers
    NotImplementedError,  # a form of zip that zipfile does not know
)
"""What the libraries raise on archives that are cut off or malformed."""

_HEADER_BYTES = 64 * 1024
"""Most bytes between two members of a tar, and in the directory of a zip."""

_ZIP_END = b"PK\x05\x06"
_ZIP_END_BYTES = 22
_ZIP64_LOCATOR = b"PK\x06\x07"
_ZIP64_LOCATOR_BYTES = 20


class Member(NamedTuple):
    """One entry of an archive: its path as written there, and a way to its bytes."""

    path: str
    is_folder: bool
    open: Callable[[], IO[bytes]]


def members(name: str, raw: BinaryIO, limit: int) -> Iterator[Member]:
    """Yield the regular files and folders of an archive; a member is read before the next one.

    Args:
        name: file name; its suffix says which kind of archive it is.
        raw: the archive, seekable.
        limit: most bytes that a tar may expand to; of a zip, the reader counts what it opens.

    Raises:
        AdapterInvalid: a member of another kind, or too large a header.
        AdapterTooLarge: too large an archive.
        Exception: those in `DAMAGED`, also while a member is read.
    """
    if name.endswith(".zip"):
        return _zip_members(raw)
    stream = raw if name.endswith(".tar") else cast("BinaryIO", gzip.GzipFile(fileobj=raw))
    return _tar_members(_Meter(stream, limit))


def check_size(size: int, limit: int) -> None:
    """Refuse more bytes than an upload may have.

    Raises:
        AdapterTooLarge: It has more.
    """
    if size > limit:
        raise AdapterTooLarge(
            f"{size} bytes or more, and the limit for this upload is {limit} (an archive may expand"
            f" to {MAX_RATIO} times its size at most); send a smaller adapter"
        )


class _Meter:
    """A stream that fails when more is read from it than was allowed."""

    def __init__(self, raw: BinaryIO, limit: int) -> None:
        self.raw = raw
        self.limit = limit
        self.total = 0
        self.allowed = 0

    def allow(self, count: int) -> None:
        """Let `count` more bytes pass, from here on."""
        self.allowed = self.total + count

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes."""
        data = self.raw.read(size)
        self.total += len(data)
        check_size(self.total, self.limit)
        if self.total > self.allowed:
            raise AdapterInvalid(
                f"more than {_HEADER_BYTES} bytes of the archive belong to no file; pack the files"
                " again with plain `tar`",
                code="archive_damaged",
            )
        return data


def _tar_members(meter: _Meter) -> Iterator[Member]:
    meter.allow(_HEADER_BYTES)
    with tarfile.open(fileobj=cast("BinaryIO", meter), mode="r|") as archive:
        while (member := archive.next()) is not None:
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            if not (plain or member.isdir()) or member.size < 0:
                raise _refused(member.name)
            # Its bytes and the next header may follow, whoever reads them.
            meter.allow(_HEADER_BYTES + (member.size if plain else 0))
            content = cast("Callable[[], IO[bytes]]", partial(archive.extractfile, member))
            yield Member(member.name, member.isdir(), content)
        while meter.read(_HEADER_BYTES):
            pass  # to the end, where gzip keeps its checksum


def _zip_members(raw: BinaryIO) -> Iterator[Member]:
    _check_zip_end(raw)
    with zipfile.ZipFile(raw) as archive:
        for member in archive.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            common = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            encrypted = member.flag_bits & 0x1
            if not common or encrypted or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _refused(member.filename)
            path = member.orig_filename  # as written, NUL and all
            yield Member(path, path.endswith("/"), partial(archive.open, member))


def _check_zip_end(raw: BinaryIO) -> None:
    """Check the end record, because zipfile makes an object of every entry that it announces.

    Only its plainest form is taken, in which no second record can disagree with it.
    """
    size = raw.seek(0, io.SEEK_END)
    raw.seek(max(0, size - _ZIP_END_BYTES - _ZIP64_LOCATOR_BYTES))
    tail = raw.read()
    end, locator = tail[-_ZIP_END_BYTES:], tail[:-_ZIP_END_BYTES]
    if not end.startswith(_ZIP_END) or end[-2:] != b"\0\0" or locator.startswith(_ZIP64_LOCATOR):
        raise AdapterInvalid(
            "the zip does not end in a plain end record: it is cut off, has a comment or is"
            " zip64; pack it again, or as .tar.gz",
            code="archive_damaged",
        )
    directory_bytes = int.from_bytes(end[12:16], "little")
    if directory_bytes > _HEADER_BYTES:
        raise AdapterInvalid(
            f"the directory of the zip takes {directory_bytes} bytes, the limit is {_HEADER_BYTES};"
            f" send at most {MAX_MEMBERS} files",
            code="archive_too_many_files",
        )


def _refused(path: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{shown(path)} is a link, a device, sparse, encrypted or compressed in a rare way; only"
        " regular files are read, so pack the archive without it",
        code="archive_member_refused",
    )
