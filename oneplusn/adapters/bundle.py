"""Hold one cluster in memory: its experts, its tasks, and the gates between them.

A bundle is what every file format is converted to and what everything behind the files reads. It
is immutable and valid: the constructor refuses what cannot be served by any base model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal

import msgspec
import torch
from torch import Tensor

from oneplusn.adapters.checks import shown
from oneplusn.adapters.validation import validate
from oneplusn.errors import AdapterNotFound

Scalar = bool | int | float | str | list[str]
Kind = Literal["common", "own"]


@dataclass(frozen=True, slots=True)
class Expert:
    """Describe one LoRA pair of the cluster.

    Attributes:
        name: Unique within the bundle.
        kind: `common` belongs to the cluster, `own` to the task that is its `owner`.
        owner: Name of that task; None for a common expert. Other tasks may gate it too.
        rank: Its largest rank over the modules.
    """

    name: str
    kind: Kind
    owner: str | None
    rank: int


@dataclass(frozen=True, eq=False)
class ModuleDelta:
    """Hold what the experts add to one linear.

    Semantics:
        delta[task j] = sum over e of gate[j, e] * scale[e] * B_e (A_e x)

    Attributes:
        a: A of all experts, one below the other, [R, K].
        b: B of all experts, side by side, [N, R]; same dtype as `a`.
        ranks: Rank rows of each expert, summing to R; 0 where an expert is absent.
        gate: [J, E] fp32, any sign and size; rows need not sum to 1.
        scale: [E] fp32, as alpha / r; kept apart from the gate so that gates can be shown.
    """

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]
    gate: Tensor
    scale: Tensor

    @cached_property
    def weights(self) -> Tensor:
        """The factor of every expert in every task, [J, E] fp32; 0 where an expert is absent."""
        present = torch.tensor(self.ranks) > 0
        return (self.gate * self.scale).masked_fill(~present, 0.0)

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """The rank rows of each expert."""
        stops = accumulate(self.ranks)
        return tuple(slice(stop - rank, stop) for rank, stop in zip(self.ranks, stops, strict=True))


@dataclass(frozen=True, slots=True)
class RunLayout:
    """Say which experts are read together.

    Attributes:
        common: Experts that two or more tasks gate non-zero at some module.
        own: The others that a task gates non-zero, per task. Experts that nobody gates are in
            neither.
    """

    common: tuple[int, ...]
    own: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Bundle:
    """Hold one cluster: every expert, every task, and a gate row per task and module.

    Attributes:
        method: How it was trained, as `cgc-lora`, `c-poly`, `lora`; information only.
        tasks: Names, in the order of the gate rows.
        experts: In the order of the gate columns.
        modules: Module path of the base model -> what is added there.
        base: Fingerprint of the base model it was trained on, if known.
        defaults: Per task, default sampling parameters.
        metadata: Free text about the whole.
    """

    method: str
    tasks: tuple[str, ...]
    experts: tuple[Expert, ...]
    modules: Mapping[str, ModuleDelta]
    base: str | None = None
    defaults: Mapping[str, Mapping[str, Scalar]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check that every part fits the others and every number is finite.

        A delta that is zero everywhere passes: whether it changes anything is a question to the
        base model's modules.

        Raises:
            AdapterInvalid: with the bad value, the limit and the way out.
        """
        validate(self)

    @cached_property
    def digest(self) -> str:
        """Content identity, `sha256:<64 hex>`.

        It depends on names, gates and the bytes of the factors, not on the layout of files nor
        on the order of keys.
        """
        return _digest(
            {
                "method": self.method,
                "base": self.base,
                "tasks": self.tasks,
                "experts": [[e.name, e.kind, e.owner, e.rank] for e in self.experts],
                "modules": {
                    path: [delta.ranks, self._leaves[path], _hash(delta.gate), _hash(delta.scale)]
                    for path, delta in self.modules.items()
                },
                "defaults": self.defaults,
                "metadata": self.metadata,
            }
        )

    def task_digest(self, task: str) -> str:
        """Return the identity of what one task computes, `sha256:<64 hex>`.

        It covers the experts that the task gates non-zero and those gates, and nothing else: not
        a name, and not an expert of another task.

        Raises:
            AdapterNotFound: the bundle has no such task.
        """
        row = self.row(task)
        modules = {}
        for path, weights in self._weights.items():
            terms = [
                [leaf, weight.hex()]
                for leaf, weight in zip(self._leaves[path], weights[row], strict=True)
                if weight
            ]
            if terms:
                modules[path] = terms
        return _digest(modules)

    def row(self, task: str) -> int:
        """Return the gate row of a task.

        Raises:
            AdapterNotFound: the bundle has no such task.
        """
        if task not in self.tasks:
            raise AdapterNotFound(
                f"no task {shown(task)} in this adapter; it has {shown(', '.join(self.tasks))}"
            )
        return self.tasks.index(task)

    def runs(self) -> RunLayout:
        """Split the experts into those that several tasks read and those that one task reads."""
        users = self.gated.sum(0).tolist()
        common = tuple(e for e, count in enumerate(users) if count > 1)
        own = {
            task: tuple(e for e, used in enumerate(row) if used and users[e] == 1)
            for task, row in zip(self.tasks, self.gated.tolist(), strict=True)
        }
        return RunLayout(common=common, own=own)

    @cached_property
    def gated(self) -> Tensor:
        """Whether a task gates an expert non-zero at any module, [J, E] bool."""
        gated = torch.zeros(len(self.tasks), len(self.experts), dtype=torch.bool)
        for delta in self.modules.values():
            gated |= delta.weights != 0
        return gated

    @cached_property
    def _weights(self) -> dict[str, list[list[float]]]:
        """Rows of every module's weights; computed once for all tasks."""
        return {path: delta.weights.tolist() for path, delta in self.modules.items()}

    @cached_property
    def _leaves(self) -> dict[str, list[str]]:
        """Hash of every expert's factors at every module; hashed once for all digests."""
        return {
            path: [_hash(delta.a[span], delta.b[:, span]) for span in delta.spans]
            for path, delta in self.modules.items()
        }


def _hash(*tensors: Tensor) -> str:
    """Hash dtype, shape and bytes of tensors."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def _digest(content: object) -> str:
    """Hash a document in its one canonical spelling."""
    spelling = msgspec.json.encode(content, order="deterministic")
    return f"sha256:{hashlib.sha256(spelling).hexdigest()}"
