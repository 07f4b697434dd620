"""Blends: several tasks in one request, as one weighted sum of their gates.

A blend over task j with weight w_j computes sum over j of w_j * delta_j. The deltas are linear in
the gates, so its gates are the weighted sum of the tasks' gates, run by run; tasks that share a
run share one gate row for it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from oneplusn.adapters.refs import TaskRef
from oneplusn.adapters.storage import Gates, RunGates
from oneplusn.errors import InvalidRequest
from oneplusn.kernels.plan import MAX_RUNS, RunKey, SlotInfo

# A task has at most two runs, its cluster's common one and its own.
MAX_BLEND_TASKS = MAX_RUNS // 2
BASE_KEY = "base"

Parts = tuple[tuple[str, str, float], ...]
"""A blend in its one form: (digest, task, weight), each task once, sorted; empty is the base."""


def blend_parts(refs: Iterable[TaskRef]) -> Parts:
    """Bring what a request names into its one form; weights of the same task add up.

    Raises:
        InvalidRequest: When a weight is zero or beyond fp32, or the tasks are too many.
    """
    weights = defaultdict[tuple[str, str], list[float]](list)
    for ref in refs:
        weights[ref.digest, ref.task].append(_checked_weight(ref.weight))
    if len(weights) > MAX_BLEND_TASKS:
        msg = f"a blend of {len(weights)} tasks; at most {MAX_BLEND_TASKS} can be blended"
        raise InvalidRequest(msg)
    return tuple(
        (digest, task, _checked_weight(math.fsum(parts)))
        for (digest, task), parts in sorted(weights.items())
    )


def is_one_task(parts: Parts) -> bool:
    """Tell whether this is a task as it was published, rather than a blend."""
    return len(parts) == 1 and parts[0][2] == 1.0


def blend_key(task_keys: Sequence[str], weights: Sequence[float]) -> str:
    """Return the content identity of a blend of tasks with these content identities.

    That of no task is the base's constant, that of one task with weight 1 the task's own.
    """
    if not task_keys:
        return BASE_KEY
    if len(task_keys) == 1 and weights[0] == 1.0:
        return task_keys[0]
    weighted = sorted(zip(task_keys, (float(w).hex() for w in weights), strict=True))
    return f"sha256:{hashlib.sha256(json.dumps(weighted).encode()).hexdigest()}"


def blend_gates(
    tasks: Sequence[tuple[SlotInfo, Gates]], weights: Sequence[float]
) -> tuple[dict[int, RunKey], Gates]:
    """Return the union of the tasks' runs, and the blend's gates in the same order.

    Raises:
        InvalidRequest: When a gate leaves the range of fp32.
    """
    keys: dict[int, RunKey] = {}
    sums: dict[int, RunGates] = {}
    for (info, gates), weight in zip(tasks, weights, strict=True):
        keys.update(zip(info.runs, info.run_keys, strict=True))
        for id_, (rows, values) in zip(info.runs, gates, strict=True):
            before = sums[id_].values if id_ in sums else 0.0
            sums[id_] = RunGates(rows, before + weight * values)
    if not all(part.values.isfinite().all() for part in sums.values()):
        msg = "the blend's weights times the gates leave the range of float32; scale them down"
        raise InvalidRequest(msg)
    return keys, tuple(sums.values())


def blend_info(
    tasks: Sequence[SlotInfo], runs: Mapping[int, RunKey], weights: Sequence[float]
) -> SlotInfo:
    """Return what the slot of a blend stands for, given the union of the tasks' runs."""
    pages = dict[int, int]()
    for task in tasks:
        pages.update(zip(task.runs, task.run_pages, strict=True))
    return SlotInfo(
        key=blend_key([task.key for task in tasks], weights),
        cluster=tuple(sorted({digest for task in tasks for digest in task.cluster})),
        runs=tuple(runs),
        run_keys=tuple(runs.values()),
        run_pages=tuple(pages[run] for run in runs),
    )


def _checked_weight(weight: float) -> float:
    limit = torch.finfo(torch.float32).max
    if weight == 0 or not abs(weight) <= limit:
        msg = (
            f"weight {weight} in a blend: give a number that is not 0 and at most {limit:.3g} in "
            f"size; a task that is to add nothing is left out"
        )
        raise InvalidRequest(msg)
    return weight
