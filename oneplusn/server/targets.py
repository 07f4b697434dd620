"""From the names in a request to what serves it, at the moment when it arrives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from oneplusn.adapters.refs import TaskRef
from oneplusn.adapters.registry import Part, Registry, Version
from oneplusn.errors import AdapterNotFound, InvalidRequest, UnknownTask
from oneplusn.server.errors import explain
from oneplusn.server.schemas import MAX_BLEND, MAX_DEFAULT_TOKENS, TaskDefaults

Asked = str | Mapping[str, float] | None
_BLEND = "blend"
# What clients of text-generation-inference call whatever base is served.
_ANY_BASE = "tgi"


@dataclass(frozen=True, slots=True)
class Target:
    """What a request asked for, resolved to content when it arrived.

    Attributes:
        asked: The task, the blend, or None for the base, as the answer repeats it.
        label: Value of the metrics' task label.
        parts: The tasks that serve it, with their versions; none for the base.
        defaults: Sampling that the task brings, for what the request does not say.
    """

    asked: str | dict[str, float] | None
    label: str
    parts: tuple[Part, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def refs(self) -> tuple[TaskRef, ...]:
        """What the engine serves it with."""
        return tuple(part.ref for part in self.parts)

    @property
    def versions(self) -> dict[str, Version]:
        """Every adapter version in it by `name@version`, each once."""
        return {part.version.label: part.version for part in self.parts}

    @property
    def adapter(self) -> str | None:
        """The versions as answers show them: joined by commas, None for the base."""
        return ",".join(self.versions) or None


class Targets:
    """Resolves names against the registry.

    Args:
        registry: Names and versions of the adapters.
        base_name: Name of the base in requests.
        label: Turns a task's name into a label value of the metrics.
    """

    def __init__(self, registry: Registry, base_name: str, label: Callable[[str], str]) -> None:
        self.base_name = base_name
        self._registry = registry
        self._label = label

    def resolve(self, task: Asked) -> Target:
        """Find what a task, a blend or the base's name stands for at this moment.

        Raises:
            UnknownTask: No active adapter has the task.
            AdapterCorrupt: The adapter's files are damaged.
            InvalidRequest: A blend names the base, or too many tasks.
        """
        if task is None or task == self.base_name:
            return Target(None, self._label(self.base_name))
        if isinstance(task, str):
            parts = self._registry.parts(task)
            return Target(task, self._label(task), tuple(parts), _defaults(task, parts))
        if self.base_name in task:
            msg = f"a blend adds to the base {self.base_name!r} anyway; leave it out"
            raise InvalidRequest(msg)
        parts = [
            part for name, weight in task.items() for part in self._registry.parts(name, weight)
        ]
        if len({(part.ref.digest, part.ref.task) for part in parts}) > MAX_BLEND:
            msg = f"the blend comes to {len(parts)} tasks; at most {MAX_BLEND} can be blended"
            raise InvalidRequest(msg)
        return Target(dict(task), self._label(_BLEND), tuple(parts))

    def resolve_alias(self, name: str) -> Target:
        """Find what stands behind another server's way of naming: `base:task`, or an adapter.

        Raises:
            UnknownTask: Nothing is called so.
            AdapterCorrupt: The adapter's files are damaged.
            InvalidRequest: It is an adapter of several tasks.
        """
        name = name.removeprefix(f"{self.base_name}:")
        try:
            return self.resolve(name)
        except UnknownTask:
            if name == _ANY_BASE:
                return self.resolve(None)
            tasks = self._tasks_of(name)
            if not tasks:
                raise
        if len(tasks) > 1:
            listed = ", ".join(tasks[:MAX_BLEND])
            msg = f"{name!r} is an adapter of {len(tasks)} tasks; name one of them: {listed}"
            raise InvalidRequest(msg)
        return self.resolve(tasks[0])

    def _tasks_of(self, adapter: str) -> list[str]:
        """List the tasks of an adapter's active version; none if there is no such adapter."""
        try:
            active = self._registry.adapter(adapter).active
        except AdapterNotFound:
            return []
        return [] if active is None else list(active.tasks)


def check_defaults(defaults: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse sampling of tasks that no request could ask for.

    Raises:
        InvalidRequest: A value is out of range, or of another type.
    """
    for task, values in defaults.items():
        try:
            _read_defaults(values)
        except InvalidRequest as error:
            way_out = "correct it in bundle.json, or leave it out"
            msg = f"the defaults of task {task!r}: {error.message}; {way_out}"
            raise InvalidRequest(msg, param=f"defaults.{task}.{error.param}") from None


def sampling_defaults(version: Version, task: str) -> Mapping[str, Any]:
    """Return the sampling that a version brings for a task; nothing if it is out of range.

    Such a version was kept by a release that did not look.
    """
    found = version.defaults.get(task)
    if not found:
        return {}
    try:
        checked = _read_defaults(found)
    except InvalidRequest:
        return {}
    return checked.model_dump(include=checked.model_fields_set)


def _read_defaults(values: Mapping[str, Any]) -> TaskDefaults:
    """Read the sampling of a task as a request's own would be read.

    Raises:
        InvalidRequest: A value is out of range, or of another type.
    """
    try:
        checked = TaskDefaults.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise explain([{**each, "loc": ("defaults", *each["loc"])} for each in problems]) from None
    # What one value says of another.
    checked.sampling(max_tokens=checked.max_tokens or MAX_DEFAULT_TOKENS, seed=0, logprobs=None)
    return checked


def _defaults(task: str, parts: Sequence[Part]) -> Mapping[str, Any]:
    """A task's own; a saved blend has none."""
    if len(parts) == 1 and parts[0].ref.task == task:
        return sampling_defaults(parts[0].version, task)
    return {}
