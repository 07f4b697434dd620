"""Make a new bundle from bundles: drop, rename or add a task, merge clusters.

A bundle is never changed. What an edit does not name stays bit for bit: factors are copied, never
recomputed, and experts keep their order, so every other task keeps its digest and with it the
prefixes that a server has cached for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.checks import check_name, shown
from oneplusn.errors import AdapterExists, AdapterIncompatible, InvalidRequest

MERGED = "merged"
"""Method of a bundle whose parts were trained by different ones."""

MAX_NAME_CHARS = 64

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Module path -> A [r, K] and B [N, r] of one expert."""


def drop_task(bundle: Bundle, task: str) -> Bundle:
    """Take a task out, with the experts that then nobody gates.

    An own expert of the task that another task gates stays, as a common one.

    Raises:
        AdapterNotFound: the bundle has no such task.
        InvalidRequest: it is the only task.
    """
    dropped = bundle.row(task)
    if len(bundle.tasks) == 1:
        raise InvalidRequest(f"{task!r} is the only task of the adapter; delete the adapter")
    rows = [row for row in range(len(bundle.tasks)) if row != dropped]
    used = bundle.gated[rows].any(0).tolist()
    lost = [
        not used[e] and (bool(bundle.gated[dropped, e]) or expert.owner == task)
        for e, expert in enumerate(bundle.experts)
    ]
    columns = [e for e, gone in enumerate(lost) if not gone]
    return replace(
        bundle,
        tasks=tuple(bundle.tasks[row] for row in rows),
        experts=tuple(_without_owner(bundle.experts[e], task) for e in columns),
        modules={
            path: _select(delta, rows, columns)
            for path, delta in bundle.modules.items()
            if any(delta.ranks[e] for e in columns)
        },
        defaults={name: values for name, values in bundle.defaults.items() if name != task},
        metadata={
            key: text for key, text in bundle.metadata.items() if key != _description_key(task)
        },
    )


def rename_task(bundle: Bundle, task: str, name: str) -> Bundle:
    """Give a task another name; nothing that is computed changes.

    Raises:
        AdapterNotFound: the bundle has no task of the old name.
        AdapterExists: it has one of the new name.
        AdapterInvalid: the new name cannot be one.
    """
    row = bundle.row(task)
    check_new_task(bundle, name)
    key, new_key = _description_key(task), _description_key(name)
    return replace(
        bundle,
        tasks=(*bundle.tasks[:row], name, *bundle.tasks[row + 1 :]),
        experts=tuple(
            replace(expert, owner=name) if expert.owner == task else expert
            for expert in bundle.experts
        ),
        defaults={name if old == task else old: v for old, v in bundle.defaults.items()},
        metadata={new_key if old == key else old: t for old, t in bundle.metadata.items()},
    )


def merge(bundles: Sequence[Bundle], *, dtype: torch.dtype | None = None) -> Bundle:
    """Put clusters of one base together as one: all their tasks, all their experts.

    Experts whose names are taken get a number behind them. Where only one bundle knows its base,
    the result claims none.

    Args:
        bundles: two or more, with disjoint task names.
        dtype: of all factors; None leaves them as they are, which needs the same dtype wherever
            two bundles adapt the same module.

    Raises:
        InvalidRequest: there are fewer than two.
        AdapterExists: two of them have a task of the same name.
        AdapterIncompatible: they were trained on different bases, or a module differs in shape or
            dtype.
    """
    if len(bundles) < 2:
        raise InvalidRequest(f"{len(bundles)} adapter to merge; give two or more")
    _check_distinct([task for bundle in bundles for task in bundle.tasks])
    base = _common_base(bundles)
    if dtype is not None:
        bundles = [_cast(bundle, dtype) for bundle in bundles]
    methods = {bundle.method for bundle in bundles}
    paths = dict.fromkeys(path for bundle in bundles for path in bundle.modules)
    return Bundle(
        method=methods.pop() if len(methods) == 1 else MERGED,
        tasks=tuple(task for bundle in bundles for task in bundle.tasks),
        experts=_renamed(expert for bundle in bundles for expert in bundle.experts),
        modules={path: _joined(path, bundles) for path in paths},
        base=base,
        defaults=dict(chain.from_iterable(bundle.defaults.items() for bundle in bundles)),
        metadata=_joined_notes(bundle.metadata for bundle in bundles),
    )


def add_task(
    bundle: Bundle, task: str, gates: Mapping[str, Tensor], own: Factors | None = None
) -> Bundle:
    """Add a task: a gate row over the experts that are there, and perhaps an expert of its own.

    Semantics:
        delta[task] = sum over e of gates[e] * scale[e] * B_e (A_e x) + B_own (A_own x)

    Args:
        bundle: of J tasks and E experts.
        task: a name that is free.
        gates: module path -> [E]; zero at a module that is left out.
        own: factors of a new expert, with gate and scale 1, at modules that the bundle adapts;
            rounded to the dtype of the module.

    Raises:
        AdapterExists: the name is taken.
        AdapterInvalid: the name cannot be one, or the task gates nothing.
    """
    check_new_task(bundle, task)
    experts = bundle.experts
    if own is not None:
        rank = max(len(a) for a, _ in own.values())
        name = free_name(task, {expert.name for expert in experts})
        experts = (*experts, Expert(name, "own", task, rank))
    modules = {}
    for path, delta in bundle.modules.items():
        row = gates.get(path, torch.zeros(len(bundle.experts)))
        wide = delta if own is None else _with_expert(delta, own.get(path))
        new_row = torch.cat([row.float(), torch.ones(len(experts) - len(row))])
        modules[path] = replace(wide, gate=torch.cat([wide.gate, new_row.unsqueeze(0)]))
    return replace(bundle, tasks=(*bundle.tasks, task), experts=experts, modules=modules)


def blended_gates(bundle: Bundle, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the gate row of a blend of tasks at every module: the weighted sum of their rows.

    Semantics:
        row[path] = sum over tasks j of weights[j] * gate[path][j, :], fp32 [E]

    Raises:
        AdapterNotFound: the bundle has no such task.
        InvalidRequest: no task, or a weight that is zero or not finite.
    """
    if not weights:
        raise InvalidRequest("a blend of no tasks; name at least one, as sort=1.0")
    for task, weight in weights.items():
        if weight == 0 or not math.isfinite(weight):
            raise InvalidRequest(
                f"weight {weight} of task {shown(task)}: give a finite number that is not 0, and"
                " leave out a task that is to add nothing"
            )
    rows = torch.tensor([bundle.row(task) for task in weights])
    factors = torch.tensor(list(weights.values()), dtype=torch.float64)
    return {
        path: (factors @ delta.gate[rows].double()).float()
        for path, delta in bundle.modules.items()
    }


def check_new_task(bundle: Bundle, name: str) -> None:
    """Refuse a name for a task that cannot be one, or is taken.

    Raises:
        AdapterInvalid: `name_invalid`.
        AdapterExists: the bundle has a task of this name.
    """
    check_name(name, "task name")
    if name in bundle.tasks:
        raise AdapterExists(
            f"the adapter has a task {name!r} already; choose another name, or drop or rename it"
        )


def check_base(bundle: Bundle, fingerprint: str | None) -> None:
    """Refuse a base other than the one that the bundle was trained on, where both are known.

    Raises:
        AdapterIncompatible: `base_mismatch`.
    """
    if None not in (bundle.base, fingerprint) and bundle.base != fingerprint:
        raise AdapterIncompatible(
            f"the adapter was trained on {bundle.base} and this base is {fingerprint}; take the"
            " base that it was trained on",
            code="base_mismatch",
        )


def free_name(wanted: str, taken: Collection[str]) -> str:
    """Return a name that nobody has: the one wanted, or else with the first free number."""
    if wanted not in taken:
        return wanted
    numbered = (_with_suffix(wanted, f".{number}") for number in count(2))
    return next(name for name in numbered if name not in taken)


def _with_suffix(name: str, suffix: str) -> str:
    return name[: MAX_NAME_CHARS - len(suffix)] + suffix


def _description_key(task: str) -> str:
    """The key in the metadata that describes a task."""
    return f"description.{task}"


def _without_owner(expert: Expert, task: str) -> Expert:
    if expert.owner != task:
        return expert
    return Expert(expert.name, "common", None, expert.rank)


def _select(delta: ModuleDelta, rows: Sequence[int], columns: Sequence[int]) -> ModuleDelta:
    """Copy these gate rows and these experts."""
    spans = delta.spans
    every = torch.arange(len(delta.a))
    kept = torch.cat([every[spans[e]] for e in columns])
    return ModuleDelta(
        a=delta.a[kept],
        b=delta.b[:, kept],
        ranks=tuple(delta.ranks[e] for e in columns),
        gate=delta.gate[rows][:, columns],
        scale=delta.scale[columns],
    )


def _with_expert(delta: ModuleDelta, factors: tuple[Tensor, Tensor] | None) -> ModuleDelta:
    """Append an expert that nobody gates yet; of rank 0 without factors."""
    a, b = (delta.a[:0], delta.b[:, :0]) if factors is None else factors
    dtype = delta.a.dtype
    return ModuleDelta(
        a=torch.cat([delta.a, a.detach().to("cpu", dtype)]),
        b=torch.cat([delta.b, b.detach().to("cpu", dtype)], dim=1),
        ranks=(*delta.ranks, len(a)),
        gate=torch.nn.functional.pad(delta.gate, (0, 1)),
        scale=torch.cat([delta.scale, torch.ones(1)]),
    )


def _check_distinct(tasks: Iterable[str]) -> None:
    twice = [task for task, times in Counter(tasks).items() if times > 1]
    if twice:
        raise AdapterExists(
            f"task {twice[0]!r} is in more than one of the adapters; rename or drop it in all but"
            " one of them first"
        )


def _common_base(bundles: Sequence[Bundle]) -> str | None:
    bases = {bundle.base for bundle in bundles}
    known = sorted(base for base in bases if base is not None)
    if len(known) > 1:
        raise AdapterIncompatible(
            f"the adapters were trained on different bases, {shown(known[0])} and"
            f" {shown(known[1])}; only those of one base can share it",
            code="base_mismatch",
        )
    return known[0] if len(bases) == 1 and known else None


def _cast(bundle: Bundle, dtype: torch.dtype) -> Bundle:
    modules = {
        path: replace(delta, a=delta.a.to(dtype), b=delta.b.to(dtype))
        for path, delta in bundle.modules.items()
    }
    return replace(bundle, modules=modules)


def _renamed(experts: Iterable[Expert]) -> tuple[Expert, ...]:
    taken = set[str]()
    renamed = []
    for expert in experts:
        name = free_name(expert.name, taken)
        taken.add(name)
        renamed.append(replace(expert, name=name))
    return tuple(renamed)


def _joined(path: str, bundles: Sequence[Bundle]) -> ModuleDelta:
    """Put the experts of all bundles at one module side by side; gates become block-diagonal."""
    first = next(bundle.modules[path] for bundle in bundles if path in bundle.modules)
    parts = [_part(path, bundle, first) for bundle in bundles]
    return ModuleDelta(
        a=torch.cat([part.a for part in parts]),
        b=torch.cat([part.b for part in parts], dim=1),
        ranks=tuple(rank for part in parts for rank in part.ranks),
        gate=torch.block_diag(*[part.gate for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
    )


def _part(path: str, bundle: Bundle, like: ModuleDelta) -> ModuleDelta:
    """Return what a bundle has at a module: experts of rank 0 where it leaves it alone.

    Raises:
        AdapterIncompatible: it differs in shape or dtype from what another bundle has there.
    """
    if path not in bundle.modules:
        num_tasks, num_experts = len(bundle.tasks), len(bundle.experts)
        return ModuleDelta(
            a=like.a[:0],
            b=like.b[:, :0],
            ranks=(0,) * num_experts,
            gate=torch.zeros(num_tasks, num_experts),
            scale=torch.ones(num_experts),
        )
    part = bundle.modules[path]
    shapes = [(delta.a.shape[1], delta.b.shape[0]) for delta in (like, part)]
    if shapes[0] != shapes[1]:
        raise AdapterIncompatible(
            f"{path} is {shapes[0][0]} -> {shapes[0][1]} in one adapter and {shapes[1][0]} ->"
            f" {shapes[1][1]} in another; they were trained on different bases"
        )
    if part.a.dtype != like.a.dtype:
        raise AdapterIncompatible(
            f"{path} is {like.a.dtype} in one adapter and {part.a.dtype} in another; give the dtype"
            " that all are to have",
            code="dtype_not_supported",
        )
    return part


def _joined_notes(notes: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Join metadata; texts that differ under one key come one after the other."""
    joined = dict[str, str]()
    for key, text in chain.from_iterable(note.items() for note in notes):
        before = joined.get(key)
        joined[key] = text if before in (None, text) else f"{before}; {text}"
    return joined
