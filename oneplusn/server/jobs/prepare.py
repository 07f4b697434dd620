"""The job that turns an upload into a blob and a page image, or says why it cannot be served."""

from __future__ import annotations

from pathlib import Path

import msgspec

from oneplusn.adapters.prepared import BaseLayout, Prepared

NEEDS = ("oneplusn.adapters.prepare",)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """An upload and what is to be made of it.

    Attributes:
        source: A folder or an archive, or files by the names that the client gave.
        out: Existing empty folder for what is made.
        dry_run: Leave nothing in it.
        name: Of the adapter, and of the task of a PEFT adapter.
        base: What it is laid out for.
        strict: Refuse modules that the base does not have, and another base's fingerprint.
        assume_converted: As `read_adapter` takes it.
        max_bytes: Most bytes of the upload, expanded.
        max_image_bytes: Most bytes of its pages.
    """

    source: str | dict[str, str]
    out: str
    dry_run: bool
    name: str
    base: BaseLayout
    strict: bool
    assume_converted: bool
    max_bytes: int
    max_image_bytes: int


def run(request: Request) -> Prepared:
    """Read, check, write.

    Raises:
        AdapterError: The upload cannot be served, with a code that says why.
        StorageFull: There is no room for what is made.
    """
    from oneplusn.adapters.prepare import Rules, prepare_adapter

    source = request.source
    rules = Rules(
        dry_run=request.dry_run,
        strict=request.strict,
        assume_converted=request.assume_converted,
        max_bytes=request.max_bytes,
        max_image_bytes=request.max_image_bytes,
    )
    return prepare_adapter(
        Path(source) if isinstance(source, str) else {n: Path(p) for n, p in source.items()},
        Path(request.out),
        name=request.name,
        base=request.base,
        rules=rules,
    )
