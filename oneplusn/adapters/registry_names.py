"""What the names of tasks, adapters and blends stand for, from memory, and what may be named how.

A `Snapshot` is replaced whole when the tables change, so a reader on any thread sees one state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from oneplusn.adapters.prepared import FileInfo, Scalar
from oneplusn.adapters.refs import TaskRef
from oneplusn.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    GenerationMismatch,
    UnknownTask,
)


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version of an adapter.

    Attributes:
        number: 1, 2, 3 … within the adapter.
        digest: Content identity, `sha256:<64 hex>`.
        rank: Largest rank of an expert.
        files: Of the blob.
        created: Unix time, in seconds.
        active: Whether the adapter's tasks mean this version.
        corrupt: What is wrong with its files; None when nothing is known to be.
        tasks: Name -> description, in the order of the upload.
        defaults: Sampling parameters of the tasks that bring some.
    """

    adapter: str
    number: int
    digest: str
    method: str
    base: str | None
    rank: int
    files: tuple[FileInfo, ...]
    created: float
    active: bool
    corrupt: str | None
    tasks: Mapping[str, str]
    defaults: Mapping[str, Mapping[str, Scalar]]

    @property
    def label(self) -> str:
        """How answers name it: `adapter@number`."""
        return f"{self.adapter}@{self.number}"

    @property
    def num_bytes(self) -> int:
        """Size of the blob."""
        return sum(file.size for file in self.files)

    def ref(self, task: str, weight: float = 1.0) -> TaskRef:
        """Name one of its tasks to the engine."""
        return TaskRef(self.digest, task, weight)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name and its versions, oldest first.

    Attributes:
        pinned: Whether it stays resident and cannot be deleted.
        generation: Grows with every change; what `If-Match` compares.
    """

    name: str
    versions: tuple[Version, ...]
    pinned: bool
    generation: int

    @property
    def active(self) -> Version | None:
        """The version that its tasks mean, if any."""
        return next((version for version in self.versions if version.active), None)


@dataclass(frozen=True, slots=True)
class Blend:
    """A weighted sum of tasks that has a name and is asked for like a task."""

    name: str
    weights: Mapping[str, float]


class Part(NamedTuple):
    """One task of what a name stands for, with the version that it means now."""

    version: Version
    ref: TaskRef


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the tables say. Replaced whole, so readers need no lock."""

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    tasks: Mapping[str, Version] = field(default_factory=dict)
    blends: Mapping[str, Blend] = field(default_factory=dict)
    generation: int = 0

    @classmethod
    def of(cls, adapters: Iterable[Adapter], blends: Iterable[Blend], generation: int) -> Snapshot:
        """Index what the tables hold."""
        by_name = {adapter.name: adapter for adapter in adapters}
        active = (adapter.active for adapter in by_name.values())
        return cls(
            adapters=by_name,
            tasks={task: version for version in active if version for task in version.tasks},
            blends={blend.name: blend for blend in blends},
            generation=generation,
        )


class Names:
    """Answers questions about names.

    Args:
        base_name: Name of the base in requests; no adapter and no task may take it.
    """

    def __init__(self, base_name: str) -> None:
        self._base_name = base_name
        self._snapshot = Snapshot()

    @property
    def generation(self) -> int:
        """How often anything has been changed."""
        return self._snapshot.generation

    def resolve(self, task: str) -> Version:
        """Return the active version that has this task.

        Raises:
            UnknownTask: There is none.
            AdapterCorrupt: Its files are damaged.
        """
        version = self._snapshot.tasks.get(task)
        if version is None:
            msg = f"no task or model is called {task[:100]!r}; GET /v1/models lists them"
            raise UnknownTask(msg)
        check_whole(version)
        return version

    def parts(self, name: str, weight: float = 1.0) -> list[Part]:
        """Return the tasks that a task's or a saved blend's name stands for now.

        Raises:
            UnknownTask: There is no such name, or a task of the blend is gone.
            AdapterCorrupt: The files of one are damaged.
        """
        blend = self._snapshot.blends.get(name)
        weights = {name: 1.0} if blend is None else blend.weights
        versions = {task: self.resolve(task) for task in weights}
        return [
            Part(version, version.ref(task, weight * weights[task]))
            for task, version in versions.items()
        ]

    def find(self, name: str) -> Version | Blend | None:
        """Return what a task's or a blend's name stands for, damaged or not; None if nothing."""
        return self._snapshot.tasks.get(name) or self._snapshot.blends.get(name)

    def tasks(self) -> list[tuple[str, Version]]:
        """List the tasks that can be asked for, with the versions that they mean."""
        return [(task, version) for version in self.active() for task in version.tasks]

    def blends(self) -> list[Blend]:
        """List the saved blends, by name."""
        return [blend for _, blend in sorted(self._snapshot.blends.items())]

    def adapters(self) -> list[Adapter]:
        """List all adapters, by name."""
        return [adapter for _, adapter in sorted(self._snapshot.adapters.items())]

    def active(self) -> list[Version]:
        """List the active version of every adapter that has one, by name."""
        active = (adapter.active for adapter in self.adapters())
        return [version for version in active if version is not None]

    def adapter(self, name: str) -> Adapter:
        """Return an adapter.

        Raises:
            AdapterNotFound: No adapter has this name.
        """
        found = self._snapshot.adapters.get(name)
        if found is None:
            msg = f"no adapter is called {name[:100]!r}; GET /v1/adapters lists them"
            raise AdapterNotFound(msg)
        return found

    def versions(self, name: str) -> list[Version]:
        """List the versions of one adapter, oldest first.

        Raises:
            AdapterNotFound: No adapter has this name.
        """
        return list(self.adapter(name).versions)

    def version(self, name: str, number: int) -> Version:
        """Return one version of an adapter.

        Raises:
            AdapterNotFound: There is none.
        """
        versions = self.adapter(name).versions
        for version in versions:
            if version.number == number:
                return version
        numbers = ", ".join(str(version.number) for version in versions)
        msg = f"{name!r} has no version {number}; it has {numbers}"
        raise AdapterNotFound(msg)

    def check(self, name: str, tasks: Sequence[str]) -> None:
        """Refuse an adapter whose names are taken.

        Raises:
            AdapterInvalid: It or one of its tasks has the name of the base.
            AdapterExists: A task belongs to another active adapter, or is a saved blend.
        """
        if self._base_name in (name, *tasks):
            msg = f"{self._base_name!r} is the base model; give the adapter or task another name"
            raise AdapterInvalid(msg, code="name_reserved", param="name")
        for task in tasks:
            if task in self._snapshot.blends:
                msg = f"{task!r} is a saved blend; rename the task, or delete the blend first"
                raise AdapterExists(msg, param="name")
            owner = self._snapshot.tasks.get(task)
            if owner is not None and owner.adapter != name:
                msg = (
                    f"the task {task!r} belongs to the adapter {owner.adapter!r}; rename the task, "
                    f"or upload it as a new version of {owner.adapter!r}"
                )
                raise AdapterExists(msg, param="name")

    def _match(self, name: str, generation: int | None) -> None:
        """Refuse a change that was decided upon without knowing the latest one.

        Raises:
            GenerationMismatch: The adapter is of another generation.
        """
        found = self._snapshot.adapters.get(name)
        current = 0 if found is None else found.generation
        if generation is not None and generation != current:
            msg = f"{name!r} is at generation {current}, not {generation}; look at it again"
            raise GenerationMismatch(msg)

    def _usable(self, name: str, number: int) -> Version:
        """Return a version that may become the active one.

        Raises:
            AdapterNotFound, AdapterCorrupt, AdapterExists, AdapterInvalid: It may not.
        """
        version = self.version(name, number)
        check_whole(version)
        self.check(name, list(version.tasks))
        return version


def check_whole(version: Version) -> None:
    """Refuse a version whose files are damaged.

    Raises:
        AdapterCorrupt: They are.
    """
    if version.corrupt is not None:
        msg = f"{version.label} cannot be served: {version.corrupt}; upload its content again"
        raise AdapterCorrupt(msg)
