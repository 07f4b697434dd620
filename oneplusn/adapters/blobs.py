"""The files of a data folder: contents of adapters by digest, their page images, and what goes.

    blobs/<sha256>/                 the content of a version; immutable, complete when it is there
    images/<sha256>.<layout>.img    the same for one base, a cache
    incoming/<random>/              an upload on its way; removed when the folder is opened
    quarantine/<sha256>/            damaged content, for a person to look at
    lock                            held by the process that serves

What arrives is brought to the disk under another name and renamed at the end, so a name stands for
the whole or for nothing, whenever the power goes. Knows no torch and no names of adapters.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from oneplusn.adapters.image_file import check_image
from oneplusn.adapters.prepared import BLOB_FILES, IMAGE_FILE, FileInfo
from oneplusn.errors import AdapterCorrupt, ConfigError, StorageFull

ORPHAN_SECONDS = 24 * 60 * 60.0
"""Age at which what nobody refers to is removed; a backup under way may still be reading it."""

LOCK = "lock"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when there is no room on a disk, or not for this user."""
LIMITS = (errno.ENOMEM, errno.EFBIG)
"""What it says when this process may not have more memory, or a larger file."""


class Blobs:
    """The files of one data folder, which its owner has locked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blobs = folder / "blobs"
        self._images = folder / "images"
        self._incoming = folder / "incoming"
        self._quarantine = folder / "quarantine"

    def create(self) -> None:
        """Make the folders, and clear what uploads left that a crash interrupted."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        for folder in (self._blobs, self._images, self._incoming, self._quarantine):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Return the folder with the content of a digest."""
        return self._blobs / _hex(digest)

    def image(self, digest: str, layout: str) -> Path:
        """Return where the page image for a `BaseLayout.key` lies, or would lie."""
        return self._images / f"{_hex(digest)}.{layout}.img"

    def quarantined(self, digest: str) -> Path:
        """Return where damaged content of a digest is put."""
        return self._quarantine / _hex(digest)

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """Lend a private folder for an upload; whatever is still in it at the end is removed."""
        folder = Path(tempfile.mkdtemp(dir=self._incoming))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep_image(self, staged: Path, digest: str, layout: str) -> None:
        """Take the page image out of a worker's folder, if there is one."""
        with suppress(FileNotFoundError):
            (staged / IMAGE_FILE).rename(self.image(digest, layout))

    def keep(self, staged: Path, digest: str) -> None:
        """Turn a worker's folder into the blob of a digest.

        A blob of this digest that is there already is replaced: the caller knows that nobody
        names it, or that it is damaged.

        Raises:
            StorageFull: The disk has no room.
            OSError: The disk failed.
        """
        with disk_errors():
            for name in BLOB_FILES:
                sync(staged / name)
            sync(staged)
            with self.incoming() as aside:
                _move_away(self.path(digest), aside / "replaced")
                staged.rename(self.path(digest))
            sync(self._blobs)

    def discard(self, digest: str) -> None:
        """Remove a blob that a failed publication left, and its images."""
        shutil.rmtree(self.path(digest), ignore_errors=True)
        for image in self._images.glob(f"{_hex(digest)}.*"):
            image.unlink(missing_ok=True)

    def release(self, digest: str) -> None:
        """Note that nobody names this blob any more: it is swept a day from now."""
        with suppress(FileNotFoundError):
            os.utime(self.path(digest))

    def quarantine(self, digest: str) -> None:
        """Put damaged content aside, with the images made of it removed."""
        target = self.quarantined(digest)
        shutil.rmtree(target, ignore_errors=True)
        _move_away(self.path(digest), target)
        self.discard(digest)
        sync(self._blobs)
        sync(self._quarantine)

    def sweep(self, named: Iterable[str], now: Callable[[], float] = time.time) -> list[str]:
        """Remove blobs and images of digests that nobody has named for a day; return their names.

        Args:
            named: Digests that rows refer to.
            now: The clock, in Unix time.
        """
        limit = now() - ORPHAN_SECONDS
        removed = []
        for path in self.orphans(named):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime > limit:
                    continue
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path.name)
        return removed

    def orphans(self, named: Iterable[str]) -> list[Path]:
        """List the blobs and images that nobody names, whatever their age."""
        kept = {_hex(digest) for digest in named}
        found = [*self._blobs.glob("*"), *self._images.glob("*")]
        return sorted(path for path in found if path.name.partition(".")[0] not in kept)

    def damaged_images(self) -> list[Path]:
        """List the images that are not what was written."""
        return [path for path in sorted(self._images.glob("*.img")) if not _is_whole(path)]

    def check(self, digest: str, files: Sequence[FileInfo]) -> None:
        """Compare a blob with what was written.

        Raises:
            AdapterCorrupt: A file is missing or other than it was.
        """
        check_files(self.path(digest), files)


def lock(folder: Path) -> TextIO:
    """Take a data folder, made if it is not there, until the file returned is closed.

    Raises:
        ConfigError: Another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        msg = f"{folder} is in use by another server; give this one a --data folder of its own"
        raise ConfigError(msg, param="data") from None
    return file


def check_files(folder: Path, files: Sequence[FileInfo]) -> None:
    """Compare the files of a blob with their sizes and hashes.

    Raises:
        AdapterCorrupt: One is missing or other than it was.
    """
    for file in files:
        try:
            found = file_info(folder / file.name)
        except OSError as error:
            msg = f"{file.name} of {folder.name} cannot be read ({error.strerror})"
            raise AdapterCorrupt(msg) from None
        if found != file:
            what = "size" if found.size != file.size else "content"
            msg = f"{file.name} of {folder.name} has another {what} than when it was written"
            raise AdapterCorrupt(msg)


def file_info(path: Path) -> FileInfo:
    """Measure and hash a file."""
    state, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            state.update(chunk)
            size += len(chunk)
    return FileInfo(path.name, size, state.hexdigest())


def tar_stream(folder: Path) -> Iterator[bytes]:
    """Yield a blob as a tar archive that can be uploaded again, a piece at a time.

    Equal blobs give equal bytes: no times, owners or paths are in it.
    """
    for name in BLOB_FILES:
        with (folder / name).open("rb") as file:
            header = tarfile.TarInfo(name)
            header.size = left = os.fstat(file.fileno()).st_size
            yield header.tobuf(tarfile.USTAR_FORMAT if left < 8 << 30 else tarfile.PAX_FORMAT)
            while chunk := file.read(_CHUNK_BYTES):
                left -= len(chunk)
                yield chunk
        assert not left, f"{name} has changed while it was read"
        yield bytes(-header.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)


def tar_bytes(files: Sequence[FileInfo]) -> int:
    """Return the size of what `tar_stream` yields for a blob of these files."""
    block = tarfile.BLOCKSIZE
    return 2 * block + sum(block + -(-file.size // block) * block for file in files)


def sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Tell a full disk from every other fault of it.

    Raises:
        StorageFull: The disk, or the owner's share of it, is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise storage_full(error) from error


def storage_full(error: OSError) -> StorageFull:
    """Say that there is no room."""
    return StorageFull(f"no room on the disk ({error.strerror}); free some space and try again")


def _is_whole(image: Path) -> bool:
    try:
        check_image(image, f"sha256:{image.name.partition('.')[0]}")
    except AdapterCorrupt:
        return False
    return True


def _move_away(path: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        path.rename(target)


def _hex(digest: str) -> str:
    assert _DIGEST.fullmatch(digest), digest
    return digest.removeprefix("sha256:")
