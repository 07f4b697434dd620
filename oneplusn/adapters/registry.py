"""Names and versions of adapters, durable: which upload a task name stands for.

An adapter has a name and immutable versions, numbered from 1; one of them is active. A task name
belongs to one active adapter. Rows live in SQLite, contents in `blobs/<sha256>/`; a blob is on the
disk before its row is committed, so *row exists => blob exists*. What was interrupted before the
commit is swept when the folder is opened again.

    open -> publish (blob, then one transaction) -> resolve, from memory

The process that serves owns the folder: a second one is refused.
"""

from __future__ import annotations

import fcntl
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    RowMapping,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)

from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import AdapterExists, AdapterInvalid, AdapterNotFound, ConfigError, UnknownTask

if TYPE_CHECKING:
    from oneplusn.adapters.bundle import Bundle

SCHEMA_VERSION = 1
DEFAULT_TENANT = "default"

_schema = MetaData()
_about = Table(
    "about",
    _schema,
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)
_adapters = Table(
    "adapters",
    _schema,
    Column("id", Integer, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("name", String, nullable=False),
    Column("active", Integer, nullable=False),
    UniqueConstraint("tenant", "name"),
)
_versions = Table(
    "versions",
    _schema,
    Column("id", Integer, primary_key=True),
    Column("adapter", ForeignKey("adapters.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String, nullable=False),
    Column("method", String, nullable=False),
    Column("base", String),
    Column("rank", Integer, nullable=False),
    Column("num_bytes", Integer, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("adapter", "number"),
    UniqueConstraint("adapter", "digest"),
)
_tasks = Table(
    "tasks",
    _schema,
    Column("version", ForeignKey("versions.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("name", String, nullable=False),
    Column("description", String, nullable=False),
)
# The primary key is the rule that a task name belongs to one active adapter.
_owners = Table(
    "task_owners",
    _schema,
    Column("tenant", String, primary_key=True),
    Column("task", String, primary_key=True),
    Column("adapter", ForeignKey("adapters.id"), nullable=False),
)


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version of an adapter.

    Attributes:
        number: 1, 2, 3 … within the adapter.
        digest: Content identity, `sha256:<64 hex>`.
        rank: Largest rank of an expert.
        num_bytes: Size of the blob.
        created: Unix time, in seconds.
        active: Whether the adapter's tasks mean this version.
        tasks: Name -> description, in the order of the upload.
    """

    adapter: str
    number: int
    digest: str
    method: str
    base: str | None
    rank: int
    num_bytes: int
    created: float
    active: bool
    tasks: Mapping[str, str]

    @property
    def label(self) -> str:
        """How answers name it: `adapter@number`."""
        return f"{self.adapter}@{self.number}"

    def ref(self, task: str, weight: float = 1.0) -> TaskRef:
        """Name one of its tasks to the engine."""
        return TaskRef(self.digest, task, weight)


class Registry:
    """Owns a data folder. Reads are from memory, on any thread; writes are one at a time.

    Args:
        folder: The data folder; made if it is not there.
        base_name: Name of the base in requests; no adapter and no task may take it.
    """

    def __init__(self, folder: Path, *, base_name: str, tenant: str = DEFAULT_TENANT) -> None:
        """Open the folder.

        Raises:
            ConfigError: Another process has it, or it is of another schema version.
        """
        self._base_name = base_name
        self._tenant = tenant
        self._blobs = folder / "blobs"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._lock_file = (folder / "lock").open("w")
        self._write = threading.Lock()
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            msg = f"{folder} is in use by another server; give this one a --data folder of its own"
            raise ConfigError(msg, param="data") from None
        self._engine = _connect(folder / "registry.db")
        self._prepare(folder)
        self._versions: tuple[Version, ...]
        self._active: Mapping[str, Version]
        self._refresh()
        self._sweep()

    def resolve(self, task: str) -> Version:
        """Return the active version that has this task.

        Raises:
            UnknownTask: There is none.
        """
        version = self._active.get(task)
        if version is None:
            msg = f"no task or model is called {task[:100]!r}; GET /v1/models lists them"
            raise UnknownTask(msg)
        return version

    def tasks(self) -> list[tuple[str, Version]]:
        """List the tasks that can be asked for, with the versions that they mean."""
        return [(task, version) for version in self.active() for task in version.tasks]

    def active(self) -> list[Version]:
        """List the active version of every adapter, by name."""
        return [version for version in self._versions if version.active]

    def versions(self, adapter: str) -> list[Version]:
        """List the versions of one adapter, oldest first.

        Raises:
            AdapterNotFound: No adapter has this name.
        """
        found = [version for version in self._versions if version.adapter == adapter]
        if not found:
            msg = f"no adapter is called {adapter[:100]!r}; GET /v1/adapters lists them"
            raise AdapterNotFound(msg)
        return found

    def blob(self, digest: str) -> Path:
        """Return the folder with the content of a version."""
        return self._blobs / digest.removeprefix("sha256:")

    def check(self, bundle: Bundle, name: str) -> None:
        """Refuse an adapter whose names are taken.

        Raises:
            AdapterInvalid: It or one of its tasks has the name of the base.
            AdapterExists: A task belongs to another active adapter.
        """
        if self._base_name in (name, *bundle.tasks):
            msg = f"{self._base_name!r} is the base model; give the adapter or task another name"
            raise AdapterInvalid(msg, code="name_reserved", param="name")
        for task in bundle.tasks:
            owner = self._active.get(task)
            if owner is not None and owner.adapter != name:
                msg = (
                    f"the task {task!r} belongs to the adapter {owner.adapter!r}; rename the task, "
                    f"or upload it as a new version of {owner.adapter!r}"
                )
                raise AdapterExists(msg, param="name")

    def publish(self, bundle: Bundle, name: str) -> tuple[Version, bool]:
        """Keep a version and make it the active one; say whether it is new.

        The same content again changes nothing but which version is active. When this returns, the
        version survives a crash; when it raises, nothing of it is left.

        Raises:
            AdapterInvalid: As `check`.
            AdapterExists: As `check`.
        """
        with self._write:
            self.check(bundle, name)
            known = any((v.adapter, v.digest) == (name, bundle.digest) for v in self._versions)
            blob = self.blob(bundle.digest)
            made = not blob.exists()
            try:
                if made:
                    _write_blob(bundle, blob)
                with self._engine.begin() as connection:
                    self._commit(connection, bundle, name)
            except BaseException:
                if made:
                    shutil.rmtree(blob, ignore_errors=True)
                raise
            self._refresh()
            return self._current(name), not known

    def close(self) -> None:
        """Release the folder."""
        self._engine.dispose()
        self._lock_file.close()

    def _current(self, name: str) -> Version:
        return next(version for version in self.active() if version.adapter == name)

    def _commit(self, connection: Connection, bundle: Bundle, name: str) -> None:
        adapter = self._adapter_row(connection, name)
        number = self._version_row(connection, bundle, adapter)
        connection.execute(update(_adapters).where(_adapters.c.id == adapter).values(active=number))
        connection.execute(delete(_owners).where(_owners.c.adapter == adapter))
        owners = [{"tenant": self._tenant, "task": t, "adapter": adapter} for t in bundle.tasks]
        connection.execute(insert(_owners), owners)

    def _adapter_row(self, connection: Connection, name: str) -> int:
        """Return the id of an adapter, made if it is new."""
        mine = (_adapters.c.tenant == self._tenant, _adapters.c.name == name)
        found = connection.scalar(select(_adapters.c.id).where(*mine))
        if found is not None:
            return int(found)
        row = {"tenant": self._tenant, "name": name, "active": 1}
        return _inserted(connection, _adapters, row)

    def _version_row(self, connection: Connection, bundle: Bundle, adapter: int) -> int:
        """Return the number of a version, made if its content is new to the adapter."""
        of_adapter = _versions.c.adapter == adapter
        same = select(_versions.c.number).where(of_adapter, _versions.c.digest == bundle.digest)
        found = connection.scalar(same)
        if found is not None:
            return int(found)
        latest = connection.scalar(select(func.max(_versions.c.number)).where(of_adapter))
        number = (latest or 0) + 1
        blob = self.blob(bundle.digest)
        row = {
            "adapter": adapter,
            "number": number,
            "digest": bundle.digest,
            "method": bundle.method,
            "base": bundle.base,
            "rank": max(expert.rank for expert in bundle.experts),
            "num_bytes": sum(path.stat().st_size for path in blob.iterdir()),
            "created": time.time(),
        }
        version = _inserted(connection, _versions, row)
        tasks = [
            {
                "version": version,
                "position": i,
                "name": task,
                "description": _describe(bundle, task),
            }
            for i, task in enumerate(bundle.tasks)
        ]
        connection.execute(insert(_tasks), tasks)
        return number

    def _prepare(self, folder: Path) -> None:
        """Create the tables, or refuse those of another version."""
        _schema.create_all(self._engine)
        with self._engine.begin() as connection:
            key = _about.c.key == "schema_version"
            found = connection.scalar(select(_about.c.value).where(key))
            if found is None:
                row = {"key": "schema_version", "value": str(SCHEMA_VERSION)}
                connection.execute(insert(_about), row)
                return
        if found != str(SCHEMA_VERSION):
            self.close()
            msg = f"{folder} has registry schema {found}, this version reads {SCHEMA_VERSION}"
            raise ConfigError(msg, param="data")

    def _refresh(self) -> None:
        """Read the tables into memory; each mapping is replaced whole, so readers need no lock."""
        query = (
            select(_versions, _adapters.c.name, _adapters.c.active)
            .join(_adapters, _versions.c.adapter == _adapters.c.id)
            .where(_adapters.c.tenant == self._tenant)
            .order_by(_adapters.c.name, _versions.c.number)
        )
        with self._engine.connect() as connection:
            tasks: dict[int, dict[str, str]] = {}
            for row in connection.execute(select(_tasks).order_by(_tasks.c.position)):
                tasks.setdefault(row.version, {})[row.name] = row.description
            rows = connection.execute(query).mappings().all()
        self._versions = tuple(_version(row, tasks[row["id"]]) for row in rows)
        self._active = dict(self.tasks())

    def _sweep(self) -> None:
        """Remove what a crash left: blobs, whole or in the making, that no row names."""
        named = {self.blob(version.digest).name for version in self._versions}
        for folder in self._blobs.iterdir():
            if folder.name not in named:
                shutil.rmtree(folder)


def _connect(path: Path) -> Engine:
    """Open the database so that a committed transaction survives a power cut."""
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:  # noqa: ANN401  (the driver's own)
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    return engine


def _inserted(connection: Connection, table: Table, row: Mapping[str, object]) -> int:
    """Insert a row and return its id."""
    key: Sequence[Any] = connection.execute(insert(table), row).inserted_primary_key or ()
    return int(key[0])


def _write_blob(bundle: Bundle, folder: Path) -> None:
    # Tensors are written here and nowhere else in this module, so that it loads without torch.
    from oneplusn.adapters.files import write_bundle

    with suppress(AdapterExists):
        write_bundle(bundle, folder)


def _describe(bundle: Bundle, task: str) -> str:
    """Take a task's description from the metadata: its own, else the adapter's."""
    whole = bundle.metadata.get("description", "")
    return bundle.metadata.get(f"description.{task}", whole)


def _version(row: RowMapping, tasks: Mapping[str, str]) -> Version:
    return Version(
        adapter=row["name"],
        number=row["number"],
        digest=row["digest"],
        method=row["method"],
        base=row["base"],
        rank=row["rank"],
        num_bytes=row["num_bytes"],
        created=row["created"],
        active=row["number"] == row["active"],
        tasks=tasks,
    )
