"""Read PEFT's Poly and MHR (`peft_type: POLY`): skills that every task mixes by weights of its own.

At every adapted linear, with q splits (1 = Poly, more = MHR) and S skills,

    w[j, q, :] = sigmoid(logits[j, q, :]) / sum over skills      (inference; training adds noise)
    delta_j = (1 / r) * (x A_j) B_j,  A_j and B_j mixed block by block (`factor_mix.mix_splits`)

PEFT stores no names of tasks, only their number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.converters.factor_mix import check_size, mix_splits, one_lora_per_task
from oneplusn.adapters.converters.patterns import Matcher
from oneplusn.adapters.converters.peft_config import IGNORED_OPTIONS, Rank, fields_of
from oneplusn.adapters.converters.refusals import check_options
from oneplusn.adapters.converters.source import PREFIX, Source, by_module, take
from oneplusn.adapters.converters.targets import TargetFields, Targets
from oneplusn.adapters.validation import MAX_EXPERTS, MAX_TASKS

EPSILON = 1e-12
MAX_SPLITS = 4096

A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"


class PolyFields(TargetFields, frozen=True, kw_only=True):
    """The options of Poly, MHR and C-Poly."""

    r: Rank
    n_tasks: Annotated[int, msgspec.Meta(ge=1, le=MAX_TASKS)]
    n_skills: Annotated[int, msgspec.Meta(ge=1, le=MAX_EXPERTS)]
    n_splits: Annotated[int, msgspec.Meta(ge=1, le=MAX_SPLITS)] = 1
    poly_type: str | None = None


Take = Callable[[str, tuple[int | str, ...]], Tensor]
"""Return one part of a module, checked against a shape."""


def read(source: Source) -> Bundle:
    """Convert what PEFT saved into a bundle with one plain LoRA per task.

    Raises:
        AdapterInvalid: with a code that names the reason.
    """
    fields = poly_fields(source)

    def weights(take_part: Take) -> Tensor:
        return common_weights(fields, take_part)

    method = "poly" if fields.n_splits == 1 else "mhr"
    return mixed(source, fields, weights, num_skills=fields.n_skills, method=method)


def poly_fields(source: Source) -> PolyFields:
    """Judge the configuration.

    Raises:
        AdapterInvalid: an option is missing, refused or unknown.
    """
    check_options(source.config, {*PolyFields.__struct_fields__, *IGNORED_OPTIONS, "init_weights"})
    return fields_of(source.config, PolyFields)


def common_weights(fields: PolyFields, take_part: Take) -> Tensor:
    """Return the weights of the skills that all tasks share, [J, q, S] fp32.

    Semantics:
        sigmoid(logits) / (sum over skills + 1e-12)
    """
    logits = take_part(LOGITS, (fields.n_tasks, fields.n_splits * fields.n_skills))
    weights = torch.sigmoid(logits.float().view(-1, fields.n_splits, fields.n_skills))
    return weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)


def mixed(
    source: Source,
    fields: PolyFields,
    weights: Callable[[Take], Tensor],
    *,
    num_skills: int,
    method: str,
    more_parts: tuple[str, ...] = (),
) -> Bundle:
    """Mix the skills of every module for every task.

    Args:
        source: what was read.
        fields: its configuration.
        weights: makes the weights of one module, [J, q, S] fp32, from its router.
        num_skills: S.
        method: what the bundle is called after.
        more_parts: tensors of the router beside its logits.

    Raises:
        AdapterInvalid: tensors are missing, too many, or do not fit.
    """
    parts = (A, B, LOGITS, *more_parts)
    known = "|".join(map(re.escape, parts))
    pattern = re.compile(rf"{PREFIX}(?P<path>.+?)\.(?P<part>{known})")
    modules = by_module(source.tensors, pattern, ", ".join(parts))
    Targets(fields, Matcher()).check(modules)
    factors = {path: _factors(source, path, n, fields, num_skills) for path, n in modules.items()}
    widths = {p: fields.n_splits * (a.shape[2] + b.shape[3]) for p, (a, b) in factors.items()}
    check_size(fields.n_tasks, fields.r, widths)
    base = fields.base_model_name_or_path
    return one_lora_per_task(
        method,
        source.task_names(fields.n_tasks),
        {
            path: mix_splits(a, b, weights(_taker(source, path, modules[path])))
            for path, (a, b) in factors.items()
        },
        scale=1 / fields.r,
        metadata={"base_model": base} if base else {},
    )


def _factors(
    source: Source, path: str, names: Mapping[str, str], fields: PolyFields, num_skills: int
) -> tuple[Tensor, Tensor]:
    take_part = _taker(source, path, names)
    return (
        take_part(A, (fields.n_splits, num_skills, "inputs / n_splits", fields.r)),
        take_part(B, (fields.n_splits, num_skills, fields.r, "outputs / n_splits")),
    )


def _taker(source: Source, path: str, names: Mapping[str, str]) -> Take:
    def take_part(part: str, shape: tuple[int | str, ...]) -> Tensor:
        return take(source.tensors, names.get(part), f"{path}.{part}", shape)

    return take_part
