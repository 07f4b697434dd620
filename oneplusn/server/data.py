"""`oneplusn data check | backup | restore`: look after a data folder, also while a server uses it.

A backup is a data folder itself: the database as of one moment, and every blob that it names. Its
database comes last, so one that broke off is no data folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.exc import DatabaseError

from oneplusn.adapters import registry_rows as rows
from oneplusn.adapters.blobs import (
    LOCK,
    ORPHAN_SECONDS,
    Blobs,
    check_files,
    disk_errors,
    lock,
    sync,
)
from oneplusn.adapters.prepared import FileInfo
from oneplusn.adapters.registry import Registry
from oneplusn.adapters.registry_schema import (
    DATABASE,
    SCHEMA_VERSION,
    connect,
    damaged,
    get_about,
)
from oneplusn.errors import AdapterCorrupt, ConfigError

EXIT_PROBLEMS = 1
ENV_DATA = "ONEPLUSN_DATA"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a data folder, in one line; `is_problem` if it needs care."""

    text: str
    is_problem: bool = False


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    check = actions.add_parser("check", help="compare the folder with what was written to it")
    check.add_argument(
        "--repair",
        action="store_true",
        help="put damaged adapters aside and remove what nobody names; stop the server before",
    )
    backup = actions.add_parser("backup", help="copy the folder; a server may be using it")
    backup.add_argument("dest", type=Path, metavar="DEST", help="New folder for the copy.")
    restore = actions.add_parser("restore", help="fill an empty data folder from a backup")
    restore.add_argument("source", type=Path, metavar="SRC", help="Folder of the backup.")
    for action in (check, backup, restore):
        action.add_argument(
            "--data",
            type=Path,
            default=os.environ.get(ENV_DATA),
            help=f"The data folder; {ENV_DATA} otherwise.",
        )


def run(args: argparse.Namespace) -> int:
    """Do what was asked and say what came of it; return the exit code.

    Raises:
        ConfigError: A folder is missing, in use, or not empty.
        StorageFull: There is no room for a copy.
    """
    if args.data is None:
        raise ConfigError(f"say which data folder: --data FOLDER, or {ENV_DATA}", param="data")
    folder = Path(args.data)
    if args.action == "check":
        findings = check_data(folder, repair=args.repair)
        _print(f"{'BAD' if found.is_problem else 'ok '} {found.text}" for found in findings)
        return EXIT_PROBLEMS if any(found.is_problem for found in findings) else 0
    source, dest = (folder, args.dest) if args.action == "backup" else (args.source, folder)
    num_blobs = copy_data(source, dest, link=args.action == "backup")
    _print([f"{dest} holds {num_blobs} versions of adapters, as {source} did"])
    return 0


def check_data(folder: Path, *, repair: bool = False) -> list[Finding]:
    """Compare a data folder with what was written to it.

    Args:
        folder: The data folder; unless it is to be repaired, a server may be using it.
        repair: Put damaged content aside, remove damaged images and what nobody has named for a
            day; then look again.

    Raises:
        ConfigError: It is no data folder, or in use and to be repaired.
    """
    if repair:
        _require(folder)
        with closing(Registry(folder, base_name="")) as registry:
            for adapter in registry.adapters():
                for version in adapter.versions:
                    with suppress(AdapterCorrupt):
                        registry.verify(version.digest)
            registry.remove_damaged_images()
    with _reading(folder) as connection:
        findings = [_lock_state(folder), *_database(connection)]
        if findings[-1].is_problem:
            return findings
        return [*findings, *_blobs(folder, connection), *_others(folder, connection)]


def copy_data(source: Path, dest: Path, *, link: bool) -> int:
    """Copy a data folder as it is at one moment; return how many blobs it holds.

    Args:
        source: The data folder; a server may be using it.
        dest: Missing, or empty.
        link: Let both share the blobs on one disk; they never change.

    Raises:
        ConfigError: `source` is no data folder, or `dest` is not empty.
        AdapterCorrupt: A blob of `source` is damaged; `dest` is then no data folder.
        StorageFull: There is no room.
    """
    _require(source)
    with closing(lock(dest)), disk_errors():
        if [path.name for path in dest.iterdir()] != [LOCK]:
            msg = f"{dest} is not empty; give a folder that is, or that does not exist yet"
            raise ConfigError(msg)
        scratch = dest / f".{DATABASE}"
        _copy_database(source / DATABASE, scratch)
        named = _named(scratch)
        for digest, files in named.items():
            _copy_blob(Blobs(source).path(digest), Blobs(dest).path(digest), files, link=link)
        (dest / "blobs").mkdir(exist_ok=True)
        sync(dest / "blobs")
        sync(scratch)
        scratch.rename(dest / DATABASE)
        sync(dest)
    return len(named)


def _lock_state(folder: Path) -> Finding:
    try:
        lock(folder).close()
    except ConfigError:
        return Finding("a server is using the folder")
    return Finding("no server is using the folder")


def _database(connection: Connection) -> Iterator[Finding]:
    verdict = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if verdict != ["ok"] or broken:
        yield Finding(
            f"{DATABASE} is damaged: {verdict[:5]}, {len(broken)} rows lead nowhere", True
        )
        return
    version = int(get_about(connection, "schema_version") or 0)
    base = get_about(connection, "base_fingerprint") or "no base model yet"
    generation = get_about(connection, "generation")
    text = f"{DATABASE} has schema {version}, generation {generation}, for {base}"
    yield Finding(text, is_problem=version != SCHEMA_VERSION)


def _blobs(folder: Path, connection: Connection) -> Iterator[Finding]:
    """Compare every blob that a row names."""
    named, damaged = rows.read_blobs(connection), rows.read_corrupt(connection)
    for digest, reason in damaged.items():
        yield Finding(f"{digest} was put aside: {reason}; upload its content again", True)
    num_bytes = 0
    for digest, files in named.items():
        try:
            check_files(Blobs(folder).path(digest), files)
            num_bytes += sum(file.size for file in files)
        except AdapterCorrupt as error:
            yield Finding(f"{error.message}; --repair puts it aside", True)
    yield Finding(f"{len(named)} versions with {num_bytes / MIB:.1f} MiB were compared")


def _others(folder: Path, connection: Connection) -> Iterator[Finding]:
    """Look at images, and at what nobody names."""
    blobs = Blobs(folder)
    named = {*rows.read_blobs(connection), *rows.read_corrupt(connection)}
    orphans = blobs.orphans(named)
    for path in orphans:
        with suppress(FileNotFoundError):
            hours = (path.stat().st_mtime + ORPHAN_SECONDS - time.time()) / 3600
            when = f"in {hours:.0f} h" if hours > 0 else "when a server starts"
            yield Finding(f"{path.parent.name}/{path.name} is of no version; it goes {when}")
    for path in blobs.damaged_images():
        text = f"images/{path.name} is damaged; it is made again when it is needed"
        yield Finding(text)


@contextmanager
def _reading(folder: Path) -> Iterator[Connection]:
    """Open the database of a folder to read one state of it.

    Raises:
        ConfigError: It is no data folder, or the database cannot be read at all.
    """
    _require(folder)
    engine = connect(folder / DATABASE)
    try:
        with engine.connect() as connection:
            yield connection
    except DatabaseError as error:
        raise damaged(folder, str(error.orig)) from error
    finally:
        engine.dispose()


def _require(folder: Path) -> None:
    if not (folder / DATABASE).is_file():
        raise ConfigError(f"{folder} has no {DATABASE}; give the folder of `oneplusn serve --data`")


def _copy_database(source: Path, dest: Path) -> None:
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(dest)) as copy:
        live.backup(copy)


def _named(database: Path) -> dict[str, list[FileInfo]]:
    engine = connect(database)
    try:
        with engine.connect() as connection:
            return rows.read_blobs(connection)
    finally:
        engine.dispose()


def _copy_blob(source: Path, dest: Path, files: Sequence[FileInfo], *, link: bool) -> None:
    check_files(source, files)
    dest.mkdir(parents=True)
    for file in files:
        _place(source / file.name, dest / file.name, os.link if link else _copy)
        sync(dest / file.name)
    sync(dest)


def _place(source: Path, dest: Path, how: Callable[[Path, Path], object]) -> None:
    try:
        how(source, dest)
    except OSError:
        if how is _copy:
            raise
        _copy(source, dest)


def _copy(source: Path, dest: Path) -> None:
    shutil.copyfile(source, dest)


def _print(lines: Iterator[str] | Sequence[str]) -> None:
    sys.stdout.writelines(f"{line}\n" for line in lines)
