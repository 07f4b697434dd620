"""Make a folder that appears under its name whole, or not at all."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from oneplusn.adapters.blobs import sync
from oneplusn.adapters.checks import shown
from oneplusn.errors import AdapterExists


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and move it to its name when the block ends without an error.

    What the block writes is on the disk when the name appears, so a crash leaves all or nothing.

    Raises:
        AdapterExists: the folder exists and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    scratch.mkdir()
    try:
        yield scratch
        for path in (*sorted(scratch.rglob("*")), scratch):
            sync(path)
        _move(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sync(folder.parent)


def _move(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError as error:
        if not folder.exists():
            raise
        raise AdapterExists(
            f"{shown(str(folder))} exists and a version is never overwritten ({error.strerror});"
            " choose another folder or remove that one"
        ) from None
