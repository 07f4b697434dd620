"""Edits that learn from examples: a new task in a cluster, a blend copied into one LoRA.

All that was there before is frozen: the base, every expert, every other task's gate row. What
learns is one gate row, or one LoRA, or both. The result is a new bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.bundle import Bundle, ModuleDelta
from oneplusn.adapters.checks import shown
from oneplusn.adapters.distil import Distilled, LowRank, blend_factors, one_lora, relative_errors
from oneplusn.adapters.edits import add_task, blended_gates, check_base, check_new_task
from oneplusn.adapters.training.data import TaskDataset
from oneplusn.adapters.training.rows import (
    Batch,
    Deltas,
    FitSettings,
    Fitting,
    LowRankDelta,
    RowDelta,
    added,
    completion_mask,
)
from oneplusn.errors import AdapterIncompatible, InvalidRequest
from oneplusn.kernels.plan import SiteSpec


@dataclass(frozen=True, slots=True)
class NewTask:
    """What a new task may use.

    Args:
        name: of the task.
        rank: rows of an expert of its own; None for none, so that only a gate row is learned.
        experts: names of those that it may gate. None means the common ones where it has an own
            expert, and all where it has none; in either case also those that `start` gates.
        max_experts: gate at most so many of them: those that add most when all are learned, and
            then learn again with only these. None for all.
        start: blend of tasks whose gates it starts from; None for the mean of all tasks.
        gate_scope: learn one change of the gates for every site, or one for the whole model.

    Raises:
        InvalidRequest: a number is below 1, or the scope is unknown.
    """

    name: str
    rank: int | None = 4
    experts: Sequence[str] | None = None
    max_experts: int | None = None
    start: Mapping[str, float] | None = None
    gate_scope: Literal["site", "model"] = "site"

    def __post_init__(self) -> None:
        for name in ("rank", "max_experts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} {value}: give at least 1", param=name)
        if self.gate_scope not in ("site", "model"):
            raise InvalidRequest(f"gate_scope {shown(self.gate_scope)}: it is 'site' or 'model'")


class Learned(NamedTuple):
    """A new version, and what the examples say of it.

    Attributes:
        bundle: the new version.
        before: mean loss per completion token with what the learning started from.
        after: the same with what was learned.
    """

    bundle: Bundle
    before: float
    after: float


class Refined(NamedTuple):
    """A blend copied into one LoRA with the help of examples.

    Attributes:
        distilled: the LoRA; its errors are those of the weights, which the steps may raise. What
            was given, where the steps have not brought it closer on the examples.
        before: mean KL divergence from the blend per completion token, before the steps.
        after: the same for what is returned.
    """

    distilled: Distilled
    before: float
    after: float


def learn_task(
    base: PreTrainedModel,
    bundle: Bundle,
    task: NewTask,
    dataset: TaskDataset,
    settings: FitSettings,
    *,
    pad_token_id: int,
    base_fingerprint: str | None = None,
) -> Learned:
    """Add a task to a cluster: learn its gate row and its own expert, and nothing else.

    Args:
        base: the base that the bundle was trained on; left frozen and in eval mode.
        bundle: the cluster.
        task: what is to be added.
        dataset: encoded examples of that task.
        settings: steps, rates, seed.
        pad_token_id: fills up shorter sequences of a batch.
        base_fingerprint: of the base; checked against the bundle's where both are known.

    Raises:
        AdapterExists: the bundle has a task of this name.
        AdapterNotFound: the task starts from one that the bundle does not have.
        AdapterIncompatible: the base is another one.
        InvalidRequest: no examples, nothing that could learn, an unknown expert, or a loss that
            is not finite.
    """
    check_new_task(bundle, task.name)
    check_base(bundle, base_fingerprint)
    start = blended_gates(bundle, task.start or _mean_of_all(bundle))
    columns = _columns(bundle, task)
    fitting = Fitting(base, dataset, settings, pad_token_id)
    rows = _rows(bundle, _sites(base, bundle), task, columns, start, settings.seed)
    nn.ModuleList(rows.values()).to(base.device)

    def loss(batch: Batch) -> Tensor:
        return _completion_loss(base, rows, batch)

    before = fitting.mean(loss)
    fitting.fit(loss, _groups(rows, settings))
    own = {
        path: (row.own.a, row.own.b) for path, row in rows.items() if row.own is not None
    } or None
    gates = {path: row.row(len(bundle.experts)) for path, row in rows.items()}
    learned = Learned(add_task(bundle, task.name, gates, own), before, fitting.mean(loss))
    if task.max_experts is None or task.max_experts >= len(columns):
        return learned
    narrowed = replace(
        task, experts=_strongest(learned.bundle, columns)[: task.max_experts], max_experts=None
    )
    return learn_task(base, bundle, narrowed, dataset, settings, pad_token_id=pad_token_id)


def refine(
    base: PreTrainedModel,
    bundle: Bundle,
    weights: Mapping[str, float],
    distilled: Distilled,
    dataset: TaskDataset,
    settings: FitSettings,
    *,
    pad_token_id: int,
    base_fingerprint: str | None = None,
) -> Refined:
    """Bring a LoRA that was cut from a blend closer to what the blend predicts on examples.

    Semantics:
        minimise over A, B: mean over completion positions of KL(p_blend || p_LoRA)

    Args:
        base: the base that the bundle was trained on; left frozen and in eval mode.
        bundle: where the blend's tasks are.
        weights: task -> its weight.
        distilled: what `distil` made of that blend.
        dataset: encoded examples; their completions say where to compare, not what is right.
        settings: steps, rate, seed.
        pad_token_id: fills up shorter sequences of a batch.
        base_fingerprint: of the base; checked against the bundle's where both are known.

    Raises:
        AdapterNotFound: the bundle has no such task.
        AdapterIncompatible: the base is another one.
        InvalidRequest: no examples, or a loss that is not finite.
    """
    check_base(bundle, base_fingerprint)
    _sites(base, bundle)
    fitting = Fitting(base, dataset, settings, pad_token_id)
    blend = blend_factors(bundle, weights)
    teacher = {path: LowRankDelta(pair.a, pair.b) for path, pair in blend.items()}
    student = {
        path: LowRankDelta(delta.a, delta.b) for path, delta in distilled.bundle.modules.items()
    }
    nn.ModuleList([*teacher.values(), *student.values()]).to(base.device)

    def loss(batch: Batch) -> Tensor:
        return _divergence(base, teacher, student, batch)

    before = fitting.mean(loss)
    parameters = [parameter for delta in student.values() for parameter in delta.parameters()]
    fitting.fit(loss, [{"params": parameters, "lr": settings.learning_rate}])
    stored = {
        path: LowRank(
            b=delta.b.detach().to("cpu", distilled.bundle.modules[path].b.dtype),
            a=delta.a.detach().to("cpu", distilled.bundle.modules[path].a.dtype),
        )
        for path, delta in student.items()
    }
    after = fitting.mean(loss)
    if after >= before:
        return Refined(distilled, before, before)
    made = one_lora(bundle, distilled.bundle.tasks[0], stored)
    return Refined(Distilled(made, relative_errors(blend, stored)), before, after)


def _completion_loss(base: PreTrainedModel, deltas: Deltas, batch: Batch) -> Tensor:
    with added(base, deltas):
        output = base(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
        )
    loss: Tensor = output.loss
    return loss


def _divergence(base: PreTrainedModel, teacher: Deltas, student: Deltas, batch: Batch) -> Tensor:
    with torch.no_grad():
        wanted = _predictions(base, teacher, batch)
    given = _predictions(base, student, batch)
    return kl_div(given, wanted, log_target=True, reduction="batchmean")


def _predictions(base: PreTrainedModel, deltas: Deltas, batch: Batch) -> Tensor:
    """Return log-probabilities [positions, V] where the next token belongs to a completion."""
    with added(base, deltas):
        output = base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits: Tensor = output.logits[:, :-1][completion_mask(batch)]
    return log_softmax(logits.float(), dim=-1)


def _mean_of_all(bundle: Bundle) -> dict[str, float]:
    return dict.fromkeys(bundle.tasks, 1 / len(bundle.tasks))


def _columns(bundle: Bundle, task: NewTask) -> list[int]:
    """Return the gate columns that the task may use.

    Raises:
        InvalidRequest: an expert is unknown, or nothing could learn.
    """
    names = [expert.name for expert in bundle.experts]
    if task.experts is None:
        started = bundle.gated[[bundle.row(name) for name in task.start or ()]].any(0).tolist()
        columns = [
            column
            for column, expert in enumerate(bundle.experts)
            if task.rank is None or expert.kind == "common" or started[column]
        ]
    else:
        unknown = set(task.experts) - set(names)
        if unknown:
            raise InvalidRequest(
                f"no expert {shown(min(unknown))} in this adapter; it has"
                f" {shown(', '.join(names))}",
                param="experts",
            )
        columns = sorted(names.index(name) for name in set(task.experts))
    if not columns and task.rank is None:
        raise InvalidRequest(
            f"task {task.name!r} has no expert of its own and none that it may gate; name some"
        )
    return columns


def _sites(base: PreTrainedModel, bundle: Bundle) -> list[SiteSpec]:
    """Return the sites of the base.

    Raises:
        AdapterIncompatible: a module of the bundle is none of its linears, or has another shape.
    """
    sites = find_sites(base)
    shapes = {
        path: (site.in_features, width)
        for site in sites
        for path, width in zip(site.modules, site.slices, strict=True)
    }
    for path, delta in bundle.modules.items():
        shape = (delta.a.shape[1], delta.b.shape[0])
        if shapes.get(path) != shape:
            there = f"{shapes[path][0]} -> {shapes[path][1]}" if path in shapes else "no linear"
            raise AdapterIncompatible(
                f"{path} is {shape[0]} -> {shape[1]} in the adapter and {there} in this base; take"
                " the base that it was trained on",
                code="module_unmatched",
            )
    return sites


def _rows(
    bundle: Bundle,
    sites: Sequence[SiteSpec],
    task: NewTask,
    columns: Sequence[int],
    start: Mapping[str, Tensor],
    seed: int,
) -> dict[str, RowDelta]:
    """Make the task's delta at every module of the bundle."""
    draw = torch.Generator().manual_seed(seed)
    shift = nn.Parameter(torch.zeros(len(columns)))
    rows = {}
    for site in sites:
        if task.gate_scope == "site":
            shift = nn.Parameter(torch.zeros(len(columns)))
        for path in (path for path in site.modules if path in bundle.modules):
            delta = bundle.modules[path]
            own = None if task.rank is None else _untrained(delta, task.rank, draw)
            rows[path] = RowDelta(delta, columns, start[path], shift, own)
    return rows


def _untrained(delta: ModuleDelta, rank: int, draw: torch.Generator) -> LowRankDelta:
    """Make an own expert that adds nothing yet: A Kaiming-uniform (a = sqrt 5), B zero."""
    bound = delta.a.shape[1] ** -0.5
    a = torch.empty(rank, delta.a.shape[1]).uniform_(-bound, bound, generator=draw)
    return LowRankDelta(a, torch.zeros(delta.b.shape[0], rank))


def _groups(rows: Mapping[str, RowDelta], settings: FitSettings) -> list[dict[str, Any]]:
    """Return the parameters by the rate at which they learn."""
    shifts = {id(row.shift): row.shift for row in rows.values() if row.columns}
    own = [parameter for row in rows.values() if row.own for parameter in row.own.parameters()]
    groups = [
        {"params": own, "lr": settings.learning_rate},
        {"params": list(shifts.values()), "lr": settings.gate_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def _strongest(bundle: Bundle, columns: Sequence[int]) -> list[str]:
    """Return the names of experts by how much they add in the last task, most first.

    Semantics:
        strength[e] = sum over modules of || gate[e] * scale[e] * B_e A_e ||_F^2
    """
    strength = torch.zeros(len(bundle.experts), dtype=torch.float64)
    for delta in bundle.modules.values():
        weights = delta.weights[-1].double()
        for column in columns:
            span = delta.spans[column]
            a, b = delta.a[span].double(), delta.b[:, span].double()
            strength[column] += weights[column] ** 2 * ((a @ a.T) * (b.T @ b)).sum()
    ordered = sorted(columns, key=lambda column: -strength[column].item())
    return [bundle.experts[column].name for column in ordered]
