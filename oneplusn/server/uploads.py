"""Receive a multipart upload onto the disk, counted while it arrives and never whole in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fastapi import Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException

from oneplusn.errors import InvalidRequest

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FILES = 64
MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Upload:
    """What a form held: its short fields, and its files by the names that the client gave."""

    fields: Mapping[str, str]
    files: Mapping[str, Path]


async def receive_upload(request: Request, folder: Path, *, limit: int) -> Upload:
    """Write the files of a form into `folder`, under numbers instead of their names.

    Args:
        request: Its body has not been read.
        folder: Empty, and removed by the caller whatever happens here.
        limit: Most bytes of the whole body.

    Raises:
        HTTPException: 413 beyond the limit, 415 for anything but a form.
        InvalidRequest: The form is malformed, or has too many parts.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        detail = "send multipart/form-data: the field name, and the adapter's files or one archive"
        raise HTTPException(415, detail)
    sink = _Sink(folder)
    received = 0
    try:
        parser = MultipartParser(options[b"boundary"], sink.callbacks())
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise HTTPException(413, f"the upload has more than {limit} bytes, the limit")
            # On a thread, because writing may wait for the disk.
            await asyncio.to_thread(parser.write, chunk)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"the form is malformed: {error}") from None
    finally:
        sink.close()
        request.app.state.server.metrics.count("registry_upload_bytes", received)
    if not sink.complete:
        raise InvalidRequest("the form ends before its closing boundary; send it again")
    return Upload(sink.fields, sink.files)


@dataclass(slots=True)
class _Sink:
    """Takes the parser's events: one part is open at a time, a field in memory or a file."""

    folder: Path
    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    complete: bool = False
    _header: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    _disposition: bytes = b""
    _name: str = ""
    _value: bytearray = field(default_factory=bytearray)
    _file: BinaryIO | None = None

    def callbacks(self) -> MultipartCallbacks:
        """Name the methods as the parser knows its events."""
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._begin_content,
            "on_part_data": self._add_content,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def close(self) -> None:
        """Close the file of a part that was cut off."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin_part(self) -> None:
        self._disposition = b""
        self._value.clear()

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = _text(options.get(b"name", b""))
        filename = options.get(b"filename")
        if filename is None:
            _check_count(len(self.fields), MAX_FIELDS, "fields")
            return
        _check_count(len(self.files), MAX_FILES, "files")
        key = _text(filename)
        if key in self.files:
            raise InvalidRequest(f"the file {key[:100]!r} is sent twice; send it once")
        path = self.folder / str(len(self.files))
        self.files[key] = path
        self._file = path.open("xb")

    def _add_content(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(data[start:end])
            return
        self._value.extend(data[start:end])
        if len(self._value) > MAX_FIELD_BYTES:
            msg = f"the field {self._name[:100]!r} has more than {MAX_FIELD_BYTES} bytes"
            raise InvalidRequest(f"{msg}; send files with a file name")

    def _end_part(self) -> None:
        if self._file is None:
            self.fields[self._name] = _text(bytes(self._value))
        self.close()

    def _end(self) -> None:
        self.complete = True


def _text(data: bytes) -> str:
    """Decode what a client named.

    Raises:
        InvalidRequest: It is not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("a name or field of the form is not UTF-8") from None


def _check_count(count: int, limit: int, what: str) -> None:
    if count >= limit:
        raise InvalidRequest(f"the form has more than {limit} {what}; leave some out")
