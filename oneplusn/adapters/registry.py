"""Names and versions of adapters, durable: which upload a task name stands for.

An adapter has a name and immutable versions, numbered from 1; one of them may be active. A task
name belongs to one active adapter, or to one saved blend. Rows live in SQLite, contents beside it
(`blobs.py`); a blob is on the disk before its row is committed, so *row exists => blob exists*.

    open -> bind -> publish (blob, then one transaction) -> activate ... rollback -> delete
                 -> resolve, from memory

The process that serves owns the folder: a second one is refused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import Connection, update

from oneplusn.adapters import registry_rows as rows
from oneplusn.adapters.blobs import Blobs, lock
from oneplusn.adapters.prepared import Prepared
from oneplusn.adapters.registry_names import Adapter, Blend, Names, Part, Snapshot, Version
from oneplusn.adapters.registry_schema import (
    adapters,
    get_about,
    open_database,
    set_about,
    writing,
)
from oneplusn.errors import (
    AdapterConflict,
    AdapterCorrupt,
    AdapterExists,
    AdapterNotFound,
    ConfigError,
    OneplusnError,
)

__all__ = ["Adapter", "Blend", "Part", "Registry", "Version"]

DEFAULT_TENANT = "default"


class Registry(Names):
    """Owns a data folder. Reads are from memory, on any thread; writes are one at a time.

    Args:
        folder: The data folder; made if it is not there.
        base_name: Name of the base in requests; no adapter and no task may take it.

    Attributes:
        num_swept: Files removed so far that no version needed any more.
        num_quarantined: Contents put aside so far because they were damaged.
    """

    def __init__(self, folder: Path, *, base_name: str, tenant: str = DEFAULT_TENANT) -> None:
        """Open the folder.

        Raises:
            ConfigError: Another process has it, or its database is damaged or of another release.
        """
        super().__init__(base_name)
        self.num_swept = 0
        self.num_quarantined = 0
        self._folder = folder
        self._tenant = tenant
        self._write = threading.Lock()
        self._files = Blobs(folder)
        with ExitStack() as opened:
            opened.enter_context(lock(folder))
            self._engine = open_database(folder)
            opened.callback(self._engine.dispose)
            self._files.create()
            self._read()
            self._find_missing()
            self.sweep()
            self._opened = opened.pop_all()

    def bind(self, fingerprint: str) -> None:
        """Keep this folder to one base model: the first that it was opened for.

        Raises:
            ConfigError: It belongs to another.
        """
        with self._write, writing(self._engine) as connection:
            found = get_about(connection, "base_fingerprint")
            if found is None:
                set_about(connection, "base_fingerprint", fingerprint)
                return
        if found != fingerprint:
            msg = (
                f"the adapters in {self._folder} belong to the base model {found}, and this one is"
                f" {fingerprint}; serve that model, or give --data another folder"
            )
            raise ConfigError(msg, param="data")

    def blob(self, digest: str) -> Path:
        """Return the folder with the content of a version."""
        return self._files.path(digest)

    def image(self, digest: str, layout: str) -> Path:
        """Return where the page image of a version lies for a `BaseLayout.key`, if it was made."""
        return self._files.image(digest, layout)

    def incoming(self) -> AbstractContextManager[Path]:
        """Lend a private folder for an upload, removed at the end with whatever is left in it."""
        return self._files.incoming()

    def publish(
        self,
        prepared: Prepared,
        folder: Path,
        *,
        activate: bool = True,
        if_match: int | None = None,
    ) -> tuple[Version, bool]:
        """Keep a version, taking its files out of `folder`; say whether it is new to the adapter.

        The same content again changes nothing but, perhaps, which version is active. When this
        returns, the version survives a crash; when it refuses, nothing of it is left.

        Args:
            prepared: What a worker made.
            folder: Where it put it, on the disk of the data folder.
            activate: Make it the active version, in the same transaction.
            if_match: Generation that the adapter must have.

        Raises:
            AdapterInvalid: As `check`.
            AdapterExists: As `check`, if it is to be activated.
            GenerationMismatch: The adapter is of another generation.
            StorageFull: There is no room for it.
        """
        name, digest = prepared.name, prepared.digest
        with self._write:
            self.check(name, prepared.tasks if activate else ())
            self._match(name, if_match)
            before = self._snapshot.adapters.get(name)
            known = before is not None and any(v.digest == digest for v in before.versions)
            with self._engine.connect() as connection:
                is_corrupt = rows.is_corrupt(connection, digest)
            is_kept = is_corrupt is False and self.blob(digest).is_dir()
            try:
                self._files.keep_image(folder, digest, prepared.layout)
                if not is_kept:
                    self._files.keep(folder, digest)
                with self._changing(name, reread=bool(is_corrupt)) as connection:
                    number = rows.add_version(connection, self._tenant, prepared)
                    id_ = self._id(connection, name)
                    if activate:
                        rows.set_active(connection, self._tenant, id_, number)
            except OneplusnError:
                if not is_kept:
                    self._files.discard(digest)
                raise
            return self.version(name, number), not known

    def activate(self, name: str, number: int, *, if_match: int | None = None) -> Version:
        """Let the adapter's tasks mean this version, from the next request on.

        Raises:
            AdapterNotFound: There is no such version.
            AdapterCorrupt: Its files are damaged.
            AdapterExists: One of its tasks belongs to another active adapter by now.
            GenerationMismatch: The adapter is of another generation.
        """
        with self._write:
            version = self._usable(name, number)
            self._match(name, if_match)
            with self._changing(name) as connection:
                rows.set_active(connection, self._tenant, self._id(connection, name), number)
            return self.version(name, version.number)

    def previous(self, name: str) -> Version:
        """Return the version that `rollback` would go back to.

        Raises:
            AdapterNotFound: No adapter has this name.
            AdapterConflict: Nothing was active before.
        """
        is_active = self.adapter(name).active is not None
        with self._engine.connect() as connection:
            history = rows.read_history(connection, self._id(connection, name))
        if len(history) <= is_active:
            msg = f"{name!r} has had no other active version; activate one by its number"
            raise AdapterConflict(msg, code="no_previous_version")
        return self.version(name, history[-2 if is_active else -1])

    def rollback(self, name: str, *, if_match: int | None = None) -> Version:
        """Go back to the version that was active before; again, to the one before that.

        Raises:
            AdapterNotFound, AdapterConflict: As `previous`.
            AdapterCorrupt, AdapterExists, GenerationMismatch: As `activate`.
        """
        with self._write:
            number = self._usable(name, self.previous(name).number).number
            was_active = self.adapter(name).active is not None
            self._match(name, if_match)
            with self._changing(name) as connection:
                id_ = self._id(connection, name)
                if was_active:
                    rows.step_back(connection, id_)
                rows.set_active(connection, self._tenant, id_, number)
            return self.version(name, number)

    def deactivate(self, name: str, *, if_match: int | None = None) -> Adapter:
        """Let the adapter's tasks mean nothing, until a version is activated again.

        Raises:
            AdapterNotFound: No adapter has this name.
            AdapterConflict: It is pinned.
            GenerationMismatch: It is of another generation.
        """
        with self._write:
            if self.adapter(name).pinned:
                raise _pinned(name)
            self._match(name, if_match)
            with self._changing(name) as connection:
                rows.set_inactive(connection, self._id(connection, name))
            return self.adapter(name)

    def delete(
        self, name: str, number: int | None = None, *, if_match: int | None = None
    ) -> list[Version]:
        """Forget one version that is not active, or the adapter with all of its versions.

        Their files go a day later, and numbers are not given out again.

        Returns:
            What was deleted.

        Raises:
            AdapterNotFound: There is no such adapter or version.
            AdapterConflict: The adapter is pinned, or the version is active.
            GenerationMismatch: The adapter is of another generation.
        """
        with self._write:
            adapter = self.adapter(name)
            self._match(name, if_match)
            gone = list(adapter.versions) if number is None else [self.version(name, number)]
            if number is None and adapter.pinned:
                raise _pinned(name)
            if number is not None and gone[0].active:
                msg = f"{gone[0].label} is active; activate another version, or delete the adapter"
                raise AdapterConflict(msg, code="adapter_active")
            with self._changing(name) as connection:
                id_ = self._id(connection, name)
                if number is None:
                    rows.remove_adapter(connection, id_)
                else:
                    rows.remove_version(connection, id_, number)
                unnamed = rows.drop_unnamed(connection)
            for digest in unnamed:
                self._files.release(digest)
            return gone

    def pin(self, name: str, pinned: bool) -> Adapter:
        """Keep an adapter resident and undeleted, or no longer.

        Raises:
            AdapterNotFound: No adapter has this name.
        """
        with self._write:
            self.adapter(name)
            with self._changing(name) as connection:
                mine = adapters.c.id == self._id(connection, name)
                connection.execute(update(adapters).where(mine).values(pinned=pinned))
            return self.adapter(name)

    def save_blend(self, name: str, weights: Mapping[str, float]) -> Blend:
        """Give a weighted sum of tasks a name; the same name again gives it other weights.

        Whether the weights can be served is the caller's question to the engine's rules.

        Raises:
            AdapterInvalid: It has the name of the base.
            AdapterExists: A task has the name.
            UnknownTask: A part is no task.
        """
        with self._write:
            if name == self._base_name:
                self.check(name, ())
            owner = self._snapshot.tasks.get(name)
            if owner is not None:
                msg = f"the task {name!r} belongs to the adapter {owner.adapter!r}; choose another"
                raise AdapterExists(msg, param="name")
            for task in weights:
                self.resolve(task)
            with self._changing() as connection:
                rows.add_blend(connection, self._tenant, name, weights)
            return self._snapshot.blends[name]

    def delete_blend(self, name: str) -> None:
        """Forget a saved blend.

        Raises:
            AdapterNotFound: There is none of this name.
        """
        with self._write:
            if name not in self._snapshot.blends:
                msg = f"no saved blend is called {name[:100]!r}"
                raise AdapterNotFound(msg)
            with self._changing() as connection:
                rows.remove_blend(connection, self._tenant, name)

    def verify(self, digest: str) -> None:
        """Compare the files of a version with what was written; put damaged ones aside.

        Raises:
            AdapterCorrupt: They are damaged; from now on its tasks are answered with this.
        """
        named = (v for adapter in self.adapters() for v in adapter.versions if v.digest == digest)
        version = next(named, None)
        if version is None:
            msg = f"no version has the content {digest}"
            raise AdapterNotFound(msg)
        try:
            self._files.check(digest, version.files)
        except AdapterCorrupt as error:
            self.quarantine(digest, error.message)
            raise

    def quarantine(self, digest: str, reason: str) -> None:
        """Put damaged files aside; tasks that need them are refused, all others go on.

        An upload of the same content makes the version whole again.
        """
        with self._write:
            with self._changing() as connection:
                rows.mark_corrupt(connection, digest, reason)
            self.num_quarantined += 1
            self._files.quarantine(digest)

    def sweep(self, now: Callable[[], float] = time.time) -> list[str]:
        """Remove files that nobody has named for a day; return their names."""
        with self._write:
            removed = self._files.sweep(self._digests(), now)
            self.num_swept += len(removed)
            return removed

    def remove_damaged_images(self) -> None:
        """Remove page images that are not what was written; they are made again when needed."""
        with self._write:
            for path in self._files.damaged_images():
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the folder."""
        self._opened.close()

    @contextmanager
    def _changing(self, name: str | None = None, *, reread: bool = False) -> Iterator[Connection]:
        """Run one transaction, count it, and read back what it changed."""
        generation = self._snapshot.generation + 1
        with writing(self._engine) as connection:
            yield connection
            set_about(connection, "generation", str(generation))
            if name is not None:
                mine = (adapters.c.tenant == self._tenant, adapters.c.name == name)
                connection.execute(update(adapters).where(*mine).values(generation=generation))
        self._read(None if reread else name)

    def _read(self, name: str | None = None) -> None:
        """Read the tables into memory: all of them, or only the adapter that changed."""
        with self._engine.connect() as connection:
            found = rows.read_adapters(connection, self._tenant, name)
            blends = rows.read_blends(connection, self._tenant)
            generation = int(get_about(connection, "generation") or 0)
        known = self._snapshot.adapters.values()
        others = [] if name is None else [a for a in known if a.name != name]
        self._snapshot = Snapshot.of([*others, *found], blends, generation)

    def _id(self, connection: Connection, name: str) -> int:
        """Return the id of an adapter that is known to be there."""
        found = rows.adapter_id(connection, self._tenant, name)
        assert found is not None, name
        return found

    def _digests(self) -> set[str]:
        """Return every digest that a row names, of any tenant."""
        with self._engine.connect() as connection:
            return {*rows.read_blobs(connection), *rows.read_corrupt(connection)}

    def _find_missing(self) -> None:
        """Note blobs that are gone, so that their tasks are refused instead of failing later."""
        with self._engine.connect() as connection:
            named = rows.read_blobs(connection)
        for digest in named:
            if not self.blob(digest).is_dir():
                self.quarantine(digest, f"the files of {digest} are missing")


def _pinned(name: str) -> AdapterConflict:
    return AdapterConflict(f"{name!r} is pinned; unpin it first", code="adapter_pinned")
