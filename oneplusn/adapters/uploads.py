"""Turn what was sent (a folder, flat files or one archive) into a few regular files of known names.

Nothing is ever extracted: only members with a name on the list are kept, under that name. The
bytes, paths, modes and links of all others have no effect.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO, Literal

from oneplusn.adapters.archives import (
    ARCHIVE_SUFFIXES,
    DAMAGED,
    MAX_MEMBERS,
    MAX_RATIO,
    check_size,
    members,
)
from oneplusn.adapters.checks import shown
from oneplusn.errors import AdapterInvalid, AdapterMediaType

WEIGHTS_FILE = "adapter_model.safetensors"
READ_FILES = ("bundle.json", "adapter_config.json", WEIGHTS_FILE)

IGNORED_FILES = frozenset(
    {
        "router.safetensors",
        *("README.md", "LICENSE", "NOTICE", ".gitattributes", ".gitignore", ".DS_Store"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
        *("config.json", "generation_config.json", "trainer_state.json", "all_results.json"),
        *("train_results.json", "eval_results.json"),
    }
)
"""What trainers leave beside an adapter; never opened."""

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib")

RATIO_FLOOR_BYTES = 1024 * 1024
"""Small archives may expand to this whatever their ratio."""

_CHUNK_BYTES = 1024 * 1024


@dataclass(slots=True)
class Staged:
    """What an upload holds.

    Attributes:
        files: Those that are read, by name.
        leftovers: Pickles that a trainer left beside safetensors weights; never opened.
    """

    files: dict[str, Path] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse pickles where nothing else could be the weights.

        Raises:
            AdapterMediaType: There are some, and no safetensors.
        """
        if self.leftovers and WEIGHTS_FILE not in self.files:
            raise _pickle(self.leftovers[0])


def file_kind(name: str) -> Literal["read", "ignored", "leftover"]:
    """Say what is done with a file; refuse one that has no place beside an adapter.

    Raises:
        AdapterMediaType: The adapter's weights in a format that can run code.
        AdapterInvalid: `file_not_allowed`.
    """
    if name in READ_FILES:
        return "read"
    if name in IGNORED_FILES:
        return "ignored"
    if name.lower().endswith(PICKLE_SUFFIXES):
        if name.lower().startswith(WEIGHTS_FILE.partition(".")[0]):
            raise _pickle(name)
        return "leftover"
    raise AdapterInvalid(
        f"{shown(name)} does not belong to an adapter; send {', '.join(READ_FILES)} (and README.md"
        " or tokenizer files, which are ignored), or one .tar, .tar.gz or .zip of them",
        code="file_not_allowed",
    )


def list_folder(folder: Path) -> Staged:
    """Return the files of a folder.

    Raises:
        AdapterInvalid: `file_not_allowed`.
        AdapterMediaType: Only a pickle could be the weights.
    """
    found = Staged()
    for path in sorted(folder.iterdir()):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise AdapterInvalid(
                f"{shown(path.name)} is a folder, a link or a device; an adapter is regular files"
                " side by side, so copy them with `cp -L` and leave the rest out",
                code="file_not_allowed",
            )
        kind = file_kind(path.name)
        if kind == "read":
            found.files[path.name] = path
        elif kind == "leftover":
            found.leftovers.append(path.name)
    found.check()
    return found


def stage(files: Mapping[str, bytes | Path], scratch: Path, max_bytes: int) -> Staged:
    """Return the files of an upload.

    Args:
        files: either flat files or one archive, by the names that the sender gave.
        scratch: empty private folder for what is in memory or in an archive.
        max_bytes: most bytes of all files together, expanded.

    Raises:
        AdapterInvalid: a name, a kind of member or an archive that is refused.
        AdapterTooLarge: more than `max_bytes`, or an archive that expands too far.
        AdapterMediaType: only a pickle could be the weights.
    """
    sent = sum(_size(content) for content in files.values())
    check_size(sent, max_bytes)
    name = next(iter(files), "").lower()
    if len(files) == 1 and name.endswith(ARCHIVE_SUFFIXES):
        limit = min(max_bytes, max(MAX_RATIO * sent, RATIO_FLOOR_BYTES))
        intake = _Intake(scratch, limit)
        with _open(*files.values()) as raw:
            _stage_archive(name, raw, intake)
    else:
        intake = _Intake(scratch, sent)
        _stage_files(files, intake)
    intake.staged.check()
    return intake.staged


class _Intake:
    """The members seen so far, and the files kept of them."""

    def __init__(self, scratch: Path, limit: int) -> None:
        self.scratch = scratch
        self.limit = limit
        self.num_bytes = 0
        self.num_members = 0
        self.tops = set[str]()
        self.names = set[str]()
        self.staged = Staged()

    def admit(self, path: str, *, is_folder: bool = False) -> str | None:
        """Check a member's path; return its file name if that is one that is read."""
        self.num_members += 1
        if self.num_members > MAX_MEMBERS:
            raise AdapterInvalid(
                f"more than {MAX_MEMBERS} files; of an adapter at most {len(READ_FILES)} are read,"
                " so leave the rest out",
                code="archive_too_many_files",
            )
        top, name = _split(path, is_folder=is_folder)
        if not (top or name):
            return None
        self.tops.add(top)
        if len(self.tops) > 1:
            raise _bad_path(path)
        if is_folder:
            return None
        kind = file_kind(name)
        if name in self.names:
            raise AdapterInvalid(
                f"{shown(path)} occurs twice; keep one of them", code="archive_member_refused"
            )
        self.names.add(name)
        if kind == "leftover":
            self.staged.leftovers.append(name)
        return name if kind == "read" else None

    def keep(self, name: str, content: IO[bytes]) -> None:
        """Copy a member's bytes into the scratch folder."""
        path = self.scratch / name
        with path.open("xb") as file:
            while chunk := content.read(_CHUNK_BYTES):
                self.num_bytes += len(chunk)
                check_size(self.num_bytes, self.limit)
                file.write(chunk)
        self.staged.files[name] = path


def _stage_files(files: Mapping[str, bytes | Path], intake: _Intake) -> None:
    for path, content in files.items():
        kept_as = intake.admit(path)
        if kept_as is None:
            continue
        if isinstance(content, Path):
            intake.staged.files[kept_as] = content
        else:
            intake.keep(kept_as, io.BytesIO(content))


def _stage_archive(archive: str, raw: BinaryIO, intake: _Intake) -> None:
    try:
        for member in members(archive, raw, intake.limit):
            name = intake.admit(member.path, is_folder=member.is_folder)
            if name is not None:
                with member.open() as content:
                    intake.keep(name, content)
    except DAMAGED as error:
        raise AdapterInvalid(
            f"the archive cannot be read ({shown(str(error))}); pack it again as .tar, .tar.gz or"
            " .zip",
            code="archive_damaged",
        ) from None


def _split(path: str, *, is_folder: bool) -> tuple[str, str]:
    """Return the top folder and the file name; both empty for the folder that was packed."""
    parts = path.removeprefix("./").removesuffix("/" if is_folder else "").split("/")
    if is_folder and parts in ([""], ["."]):
        return "", ""
    if is_folder:
        parts.append("")
    if len(parts) > 2 or {"", ".", ".."} & {*(parts[:-1] if is_folder else parts)}:
        raise _bad_path(path)
    return ("", parts[0]) if len(parts) == 1 else (parts[0], parts[1])


def _open(content: bytes | Path) -> BinaryIO:
    return content.open("rb") if isinstance(content, Path) else io.BytesIO(content)


def _size(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _bad_path(path: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"path {shown(path)}: files lie side by side or in one common folder; pack them so",
        code="archive_member_refused",
    )


def _pickle(name: str) -> AdapterMediaType:
    return AdapterMediaType(
        f"{shown(name)} can run code when it is opened, so it was not; only safetensors is read:"
        f" save the weights as {WEIGHTS_FILE} and leave this file out"
    )
