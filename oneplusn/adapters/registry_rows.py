"""Rows of the registry as objects, and the statements that change them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import msgspec
from sqlalchemy import Connection, RowMapping, Table, delete, func, insert, select, update

from oneplusn.adapters.prepared import FileInfo, Prepared, Scalar
from oneplusn.adapters.registry_names import Adapter, Blend, Version
from oneplusn.adapters.registry_schema import (
    activations,
    adapters,
    blends,
    blobs,
    owners,
    tasks,
    versions,
)

MAX_ACTIVATIONS = 64
"""How many steps back an adapter remembers."""

_FILES = msgspec.json.Decoder(list[FileInfo])
_DEFAULTS = msgspec.json.Decoder(dict[str, Scalar])
_WEIGHTS = msgspec.json.Decoder(dict[str, float])


def read_adapters(connection: Connection, tenant: str, name: str | None = None) -> list[Adapter]:
    """Read all adapters by name, or one; those without versions are only numbers to go on from."""
    query = (
        select(
            versions,
            adapters.c.name,
            adapters.c.active,
            adapters.c.pinned,
            adapters.c.generation,
            blobs.c.files,
            blobs.c.corrupt,
        )
        .join(adapters, versions.c.adapter == adapters.c.id)
        .join(blobs, versions.c.digest == blobs.c.digest)
        .where(adapters.c.tenant == tenant)
        .order_by(adapters.c.name, versions.c.number)
    )
    of_version = select(tasks).order_by(tasks.c.version, tasks.c.position)
    if name is not None:
        query = query.where(adapters.c.name == name)
        ids = select(versions.c.id).join(adapters).where(adapters.c.name == name)
        of_version = of_version.where(tasks.c.version.in_(ids))
    by_version = {
        version: list(rows)
        for version, rows in groupby(connection.execute(of_version), key=lambda row: row.version)
    }
    rows = connection.execute(query).mappings().all()
    return [
        _adapter([(row, by_version[row["id"]]) for row in of_adapter])
        for _, of_adapter in groupby(rows, key=lambda row: row["adapter"])
    ]


def read_blends(connection: Connection, tenant: str) -> list[Blend]:
    """Read all saved blends, by name."""
    query = select(blends.c.name, blends.c.weights).where(blends.c.tenant == tenant)
    rows = connection.execute(query.order_by(blends.c.name))
    return [Blend(row.name, _WEIGHTS.decode(row.weights)) for row in rows]


def read_blobs(connection: Connection) -> dict[str, list[FileInfo]]:
    """Read which blobs there have to be, and of what files; the damaged ones are left out."""
    query = select(blobs.c.digest, blobs.c.files).where(blobs.c.corrupt.is_(None))
    return {row.digest: _FILES.decode(row.files) for row in connection.execute(query)}


def read_corrupt(connection: Connection) -> dict[str, str]:
    """Read which blobs are known to be damaged, and why."""
    query = select(blobs.c.digest, blobs.c.corrupt).where(blobs.c.corrupt.is_not(None))
    return {row.digest: row.corrupt for row in connection.execute(query)}


def is_corrupt(connection: Connection, digest: str) -> bool | None:
    """Return whether a blob is known to be damaged; None if no version names it."""
    found = connection.execute(select(blobs.c.corrupt).where(blobs.c.digest == digest)).first()
    return None if found is None else found.corrupt is not None


def adapter_id(connection: Connection, tenant: str, name: str) -> int | None:
    """Return the id of an adapter's row."""
    mine = (adapters.c.tenant == tenant, adapters.c.name == name)
    found = connection.scalar(select(adapters.c.id).where(*mine))
    return None if found is None else int(found)


def add_version(connection: Connection, tenant: str, prepared: Prepared) -> int:
    """Insert a version, its blob and, if it is the first, its adapter; return its number.

    Content that the adapter has already keeps its number.
    """
    adapter = adapter_id(connection, tenant, prepared.name)
    if adapter is None:
        row = {"tenant": tenant, "name": prepared.name, "latest": 0}
        adapter = _inserted(connection, adapters, {**row, "pinned": False, "generation": 0})
    _set_blob(connection, prepared)
    same = (versions.c.adapter == adapter, versions.c.digest == prepared.digest)
    found = connection.scalar(select(versions.c.number).where(*same))
    if found is not None:
        return int(found)
    latest = adapters.c.latest
    number = int(connection.scalar(select(latest).where(adapters.c.id == adapter)) or 0) + 1
    connection.execute(update(adapters).where(adapters.c.id == adapter).values(latest=number))
    row = {
        "adapter": adapter,
        "number": number,
        "digest": prepared.digest,
        "method": prepared.method,
        "base": prepared.report.base_fingerprint,
        "rank": prepared.rank,
        "created": time.time(),
    }
    version = _inserted(connection, versions, row)
    connection.execute(insert(tasks), _task_rows(version, prepared))
    return number


def set_active(connection: Connection, tenant: str, adapter: int, number: int) -> None:
    """Let an adapter's tasks mean a version, and remember it."""
    connection.execute(update(adapters).where(adapters.c.id == adapter).values(active=number))
    connection.execute(delete(owners).where(owners.c.adapter == adapter))
    of_version = (
        select(tasks.c.name)
        .join(versions, tasks.c.version == versions.c.id)
        .where(versions.c.adapter == adapter, versions.c.number == number)
    )
    rows = [
        {"tenant": tenant, "task": task, "adapter": adapter}
        for task in connection.scalars(of_version)
    ]
    connection.execute(insert(owners), rows)
    history = read_history(connection, adapter)
    if history[-1:] == [number]:
        return
    connection.execute(insert(activations), {"adapter": adapter, "number": number})
    if len(history) >= MAX_ACTIVATIONS:
        oldest = select(func.min(activations.c.id)).where(activations.c.adapter == adapter)
        connection.execute(delete(activations).where(activations.c.id == oldest.scalar_subquery()))


def set_inactive(connection: Connection, adapter: int) -> None:
    """Let an adapter's tasks mean nothing."""
    connection.execute(update(adapters).where(adapters.c.id == adapter).values(active=None))
    connection.execute(delete(owners).where(owners.c.adapter == adapter))


def read_history(connection: Connection, adapter: int) -> list[int]:
    """Read the numbers that were active one after the other; the last one is now."""
    query = select(activations.c.number).where(activations.c.adapter == adapter)
    return list(connection.scalars(query.order_by(activations.c.id)))


def step_back(connection: Connection, adapter: int) -> None:
    """Forget the latest activation."""
    newest = select(func.max(activations.c.id)).where(activations.c.adapter == adapter)
    connection.execute(delete(activations).where(activations.c.id == newest.scalar_subquery()))


def remove_version(connection: Connection, adapter: int, number: int) -> None:
    """Delete a version that is not active, its tasks, and its place in the history."""
    mine = (versions.c.adapter == adapter, versions.c.number == number)
    id_ = select(versions.c.id).where(*mine).scalar_subquery()
    connection.execute(delete(tasks).where(tasks.c.version == id_))
    connection.execute(delete(versions).where(*mine))
    past = (activations.c.adapter == adapter, activations.c.number == number)
    connection.execute(delete(activations).where(*past))
    _join_history(connection, adapter)


def remove_adapter(connection: Connection, adapter: int) -> None:
    """Delete all versions of an adapter; its row stays if anyone has been shown its numbers."""
    shown = bool(read_history(connection, adapter))
    ids = select(versions.c.id).where(versions.c.adapter == adapter)
    connection.execute(delete(tasks).where(tasks.c.version.in_(ids)))
    for table in (versions, owners, activations):
        connection.execute(delete(table).where(table.c.adapter == adapter))
    mine = adapters.c.id == adapter
    empty = {"active": None, "pinned": False}
    connection.execute(
        update(adapters).where(mine).values(**empty) if shown else delete(adapters).where(mine)
    )


def drop_unnamed(connection: Connection) -> list[str]:
    """Delete the rows of blobs that no version names; return their digests."""
    unnamed = blobs.c.digest.not_in(select(versions.c.digest))
    digests = list(connection.scalars(select(blobs.c.digest).where(unnamed)))
    connection.execute(delete(blobs).where(unnamed))
    return digests


def add_blend(connection: Connection, tenant: str, name: str, weights: Mapping[str, float]) -> None:
    """Insert a blend, or give the one of this name other weights."""
    spelling = msgspec.json.encode(weights).decode()
    mine = (blends.c.tenant == tenant, blends.c.name == name)
    if connection.execute(update(blends).where(*mine).values(weights=spelling)).rowcount:
        return
    row = {"tenant": tenant, "name": name}
    blend = _inserted(connection, blends, {**row, "weights": spelling})
    connection.execute(insert(owners), {"tenant": tenant, "task": name, "blend": blend})


def remove_blend(connection: Connection, tenant: str, name: str) -> None:
    """Delete a blend."""
    mine = (blends.c.tenant == tenant, blends.c.name == name)
    id_ = select(blends.c.id).where(*mine).scalar_subquery()
    connection.execute(delete(owners).where(owners.c.blend == id_))
    connection.execute(delete(blends).where(*mine))


def mark_corrupt(connection: Connection, digest: str, reason: str) -> None:
    """Note that the files of a blob are damaged."""
    connection.execute(update(blobs).where(blobs.c.digest == digest).values(corrupt=reason))


def _set_blob(connection: Connection, prepared: Prepared) -> None:
    """Insert the row of a blob; one that was damaged is whole again."""
    values = {"files": msgspec.json.encode(prepared.files).decode(), "corrupt": None}
    mine = blobs.c.digest == prepared.digest
    if not connection.execute(update(blobs).where(mine).values(**values)).rowcount:
        connection.execute(insert(blobs), {"digest": prepared.digest, **values})


def _join_history(connection: Connection, adapter: int) -> None:
    """Let no version follow itself, where one between was deleted."""
    query = select(activations).where(activations.c.adapter == adapter).order_by(activations.c.id)
    rows = connection.execute(query).all()
    again = [row.id for before, row in pairwise(rows) if before.number == row.number]
    connection.execute(delete(activations).where(activations.c.id.in_(again)))


def _task_rows(version: int, prepared: Prepared) -> list[dict[str, object]]:
    return [
        {
            "version": version,
            "position": position,
            "name": task,
            "description": prepared.descriptions.get(task, ""),
            "defaults": msgspec.json.encode(prepared.task_defaults.get(task, {})).decode(),
        }
        for position, task in enumerate(prepared.tasks)
    ]


def _inserted(connection: Connection, table: Table, row: Mapping[str, object]) -> int:
    """Insert a row and return its id."""
    key: Sequence[Any] = connection.execute(insert(table), row).inserted_primary_key or ()
    return int(key[0])


def _adapter(rows: Sequence[tuple[RowMapping, Sequence[Any]]]) -> Adapter:
    first, _ = rows[0]
    return Adapter(
        name=first["name"],
        versions=tuple(_version(row, of_version) for row, of_version in rows),
        pinned=first["pinned"],
        generation=first["generation"],
    )


def _version(row: RowMapping, of_version: Sequence[Any]) -> Version:
    defaults = {task.name: _DEFAULTS.decode(task.defaults) for task in of_version}
    return Version(
        adapter=row["name"],
        number=row["number"],
        digest=row["digest"],
        method=row["method"],
        base=row["base"],
        rank=row["rank"],
        files=tuple(_FILES.decode(row["files"])),
        created=row["created"],
        active=row["number"] == row["active"],
        corrupt=row["corrupt"],
        tasks={task.name: task.description for task in of_version},
        defaults={task: values for task, values in defaults.items() if values},
    )
