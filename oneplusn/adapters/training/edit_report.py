"""Say what an edit changed: counts, names, gates, and how far a copy is from its original."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.distil import Distilled


def summary(before: Sequence[Bundle], after: Bundle) -> list[str]:
    """Say what changed: counts, names, and whose cached prefixes stay valid."""
    counts = {
        "tasks": lambda bundle: len(bundle.tasks),
        "experts": lambda bundle: len(bundle.experts),
        "rank columns": lambda bundle: sum(len(delta.a) for delta in bundle.modules.values()),
        "bytes": num_bytes,
    }
    lines = [f"{'':<13} {'before':>14} {'after':>14}"]
    for name, count in counts.items():
        lines.append(f"{name:<13} {sum(map(count, before)):>14,} {count(after):>14,}")
    digests = {task: bundle.task_digest(task) for bundle in before for task in bundle.tasks}
    kept = [task for task in after.tasks if digests.get(task) == after.task_digest(task)]
    groups = {
        "tasks added": [task for task in after.tasks if task not in digests],
        "tasks gone": [task for task in digests if task not in after.tasks],
        "tasks changed": [task for task in after.tasks if task in digests and task not in kept],
        "tasks unchanged": kept,
        "experts added": _experts([after], without=before),
        "experts gone": _experts(before, without=[after]),
    }
    return lines + [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]


def num_bytes(bundle: Bundle) -> int:
    """Count the bytes of all tensors of a bundle."""
    tensors = (t for d in bundle.modules.values() for t in (d.a, d.b, d.gate, d.scale))
    return sum(tensor.nbytes for tensor in tensors)


def _experts(bundles: Iterable[Bundle], *, without: Iterable[Bundle]) -> list[str]:
    there = {expert.name for bundle in without for expert in bundle.experts}
    names = (expert.name for bundle in bundles for expert in bundle.experts)
    return [name for name in dict.fromkeys(names) if name not in there]


def gates_of_last(bundle: Bundle) -> list[str]:
    """Show the mean weight, over the modules, of every expert that the last task gates."""
    weights = torch.stack([delta.weights[-1] for delta in bundle.modules.values()]).mean(0)
    gated = bundle.gated[-1].tolist()
    named = zip(bundle.experts, weights.tolist(), gated, strict=True)
    parts = [f"{expert.name} {weight:.3f}" for expert, weight, used in named if used]
    return [f"mean gate times scale: {', '.join(parts)}"]


def errors_of(distilled: Distilled) -> list[str]:
    """Show how far every module is from the blend's."""
    lines = ["error of each module, relative to the norm of what the blend adds there:"]
    for path, error in distilled.errors.items():
        lines.append(f"  {path} rank {len(distilled.bundle.modules[path].a)}: {error:.2e}")
    return lines
