"""The tables of the registry, how its database is opened, and how an older one is brought forward.

The tables are plain SQL, so that another database than SQLite can hold them; only `connect` knows
which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import DatabaseError, OperationalError

from oneplusn.errors import ConfigError, RegistryBusy, StorageFull

SCHEMA_VERSION = 2
DATABASE = "registry.db"
BUSY_SECONDS = 5.0

schema = MetaData()
about = Table(
    "about",
    schema,
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)
blobs = Table(
    "blobs",
    schema,
    Column("digest", String, primary_key=True),
    Column("files", String, nullable=False),  # JSON of list[FileInfo]
    Column("corrupt", String),  # why, if it was found damaged
)
adapters = Table(
    "adapters",
    schema,
    Column("id", Integer, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("name", String, nullable=False),
    Column("active", Integer),
    Column("latest", Integer, nullable=False),  # numbers are not given out again
    Column("pinned", Boolean, nullable=False),
    Column("generation", Integer, nullable=False),
    UniqueConstraint("tenant", "name"),
)
versions = Table(
    "versions",
    schema,
    Column("id", Integer, primary_key=True),
    Column("adapter", ForeignKey("adapters.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", ForeignKey("blobs.digest"), nullable=False, index=True),
    Column("method", String, nullable=False),
    Column("base", String),
    Column("rank", Integer, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("adapter", "number"),
    UniqueConstraint("adapter", "digest"),
)
tasks = Table(
    "tasks",
    schema,
    Column("version", ForeignKey("versions.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("name", String, nullable=False),
    Column("description", String, nullable=False),
    Column("defaults", String, nullable=False),  # JSON
)
# What was active before, latest last: the way back.
activations = Table(
    "activations",
    schema,
    Column("id", Integer, primary_key=True),
    Column("adapter", ForeignKey("adapters.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Index("activations_by_adapter", "adapter", "id"),
)
blends = Table(
    "blends",
    schema,
    Column("id", Integer, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("name", String, nullable=False),
    Column("weights", String, nullable=False),  # JSON of dict[str, float]
    UniqueConstraint("tenant", "name"),
)
# The primary key is the rule that a task name belongs to one active adapter or one blend.
owners = Table(
    "task_owners",
    schema,
    Column("tenant", String, primary_key=True),
    Column("task", String, primary_key=True),
    Column("adapter", ForeignKey("adapters.id"), index=True),
    Column("blend", ForeignKey("blends.id")),
)

Migration = Callable[[Connection], None]
MIGRATIONS: Mapping[int, Migration] = {}
"""How the tables of a version become those of the next; each runs in one transaction."""


def open_database(folder: Path) -> Engine:
    """Open the database of a data folder, a new one if the folder is new.

    Raises:
        ConfigError: It is damaged or of another release; or there are adapters and no names for
            them, and starting empty would sweep them.
    """
    blobs = folder / "blobs"
    if not (folder / DATABASE).exists() and blobs.is_dir() and any(blobs.iterdir()):
        msg = (
            f"{folder} holds adapters and no {DATABASE}; bring a backup back with `oneplusn data"
            " restore`, or give --data another folder"
        )
        raise ConfigError(msg, param="data")
    engine = connect(folder / DATABASE)
    try:
        _prepare(engine, folder)
    except BaseException:
        engine.dispose()
        raise
    return engine


def connect(path: Path) -> Engine:
    """Open the database so that a committed transaction survives a power cut."""
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:  # noqa: ANN401  (the driver's own)
        connection.isolation_level = None  # the driver would commit before it creates a table
        pragmas = (f"busy_timeout={int(1000 * BUSY_SECONDS)}", "journal_mode=WAL")
        for pragma in (*pragmas, "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer takes its lock at once, so that nothing it has read can change under it.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Run one transaction that writes: all of it is on the disk at the end, or nothing.

    Raises:
        RegistryBusy: Another process has been writing for `BUSY_SECONDS`.
        StorageFull: There is no room.
    """
    try:
        with engine.execution_options(writes=True).begin() as connection:
            yield connection
    except OperationalError as error:
        reason = str(error.orig)
        if "locked" in reason or "busy" in reason:
            msg = f"another process has held the registry for {BUSY_SECONDS:g} s; try again"
            raise RegistryBusy(msg) from error
        if "full" in reason:
            msg = "the disk of the data folder is full; free some space and try again"
            raise StorageFull(msg) from error
        raise


def _prepare(engine: Engine, folder: Path) -> None:
    """Create the tables, or bring older ones forward.

    Raises:
        ConfigError: The database is damaged, or of a version that cannot be read.
    """
    try:
        with engine.connect() as connection:
            verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if verdict != "ok":
            raise damaged(folder, str(verdict))
        with writing(engine) as connection:
            if inspect(connection).has_table("about"):
                _migrate(connection, folder)
                return
            schema.create_all(connection)
            set_about(connection, "schema_version", str(SCHEMA_VERSION))
            set_about(connection, "generation", "0")
    except OperationalError:
        raise
    except DatabaseError as error:
        raise damaged(folder, str(error.orig)) from error


def _migrate(connection: Connection, folder: Path) -> None:
    """Bring the tables to this version, one version at a time.

    Raises:
        ConfigError: There is no way from theirs.
    """
    found = int(get_about(connection, "schema_version") or 0)
    steps = range(found, SCHEMA_VERSION)
    if found > SCHEMA_VERSION or not MIGRATIONS.keys() >= set(steps):
        older = "an older" if found < SCHEMA_VERSION else "a newer"
        msg = (
            f"{folder} has registry schema {found}, of {older} release than this one, which reads"
            f" {SCHEMA_VERSION}; start that release, or give --data another folder"
        )
        raise ConfigError(msg, param="data")
    for version in steps:
        MIGRATIONS[version](connection)
        set_about(connection, "schema_version", str(version + 1))


def get_about(connection: Connection, key: str) -> str | None:
    """Read one fact about the whole registry."""
    found = connection.scalar(select(about.c.value).where(about.c.key == key))
    return None if found is None else str(found)


def set_about(connection: Connection, key: str, value: str) -> None:
    """Write one fact about the whole registry."""
    changed = connection.execute(update(about).where(about.c.key == key).values(value=value))
    if not changed.rowcount:
        connection.execute(insert(about), {"key": key, "value": value})


def damaged(folder: Path, reason: str) -> ConfigError:
    """Say that the database cannot be read, and the way out."""
    return ConfigError(
        f"{folder / DATABASE} is damaged ({reason}); bring a backup back with `oneplusn data"
        " restore`, or give --data another folder",
        param="data",
    )
