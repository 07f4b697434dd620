"""The job that makes the page image of a version again, from its blob."""

from __future__ import annotations

from pathlib import Path

import msgspec

from oneplusn.adapters.prepared import BaseLayout

NEEDS = ("oneplusn.adapters.prepare",)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A blob and where its image goes.

    Attributes:
        digest: What the blob has to hold.
        blob: Its folder.
        image: The file to make.
        base: What it is laid out for.
    """

    digest: str
    blob: str
    image: str
    base: BaseLayout


class Rebuilt(msgspec.Struct, frozen=True):
    """The image is there; it has so many bytes of pages."""

    num_bytes: int


def run(request: Request) -> Rebuilt:
    """Read, compare the digest, write.

    Raises:
        AdapterCorrupt: The blob does not hold what it is named for.
        AdapterIncompatible: The base is another by now.
        StorageFull: There is no room for the image.
    """
    from oneplusn.adapters.prepare import rebuild_image

    num_bytes = rebuild_image(
        Path(request.blob), Path(request.image), digest=request.digest, base=request.base
    )
    return Rebuilt(num_bytes)
