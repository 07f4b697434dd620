"""The rules that every bundle keeps, whichever file or trainer it comes from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from oneplusn.adapters.checks import check_name, shown
from oneplusn.errors import AdapterInvalid

if TYPE_CHECKING:
    from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta

MAX_TASKS = 4096
MAX_EXPERTS = 4096
MAX_MODULES = 16_384
MAX_RANK = 4096
"""Largest rank of one expert; far above use, so that a hostile one cannot fill a pool."""

MAX_VALUE = 65504.0
"""Largest magnitude of any number: that of fp16, so that no cast to a served dtype overflows."""

MAX_NOTES_BYTES = 256 * 1024
"""Defaults and metadata together, as JSON."""

MAX_BASE_CHARS = 256

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
MAX_PATH_CHARS = 256


def validate(bundle: Bundle) -> None:
    """Check a whole bundle; see `Bundle.validate`.

    Raises:
        AdapterInvalid: with the bad value, the limit and the way out.
    """
    check_name(bundle.method, "method")
    if bundle.base is not None and len(bundle.base) > MAX_BASE_CHARS:
        raise AdapterInvalid(
            f"base {shown(bundle.base)}: {len(bundle.base)} characters, the limit is"
            f" {MAX_BASE_CHARS}; give the fingerprint or null"
        )
    _check_names(bundle.tasks, "task", MAX_TASKS)
    _check_names([expert.name for expert in bundle.experts], "expert", MAX_EXPERTS)
    for expert in bundle.experts:
        _check_owner(expert, bundle.tasks)
    _check_count(len(bundle.modules), "module", MAX_MODULES)
    for path, delta in bundle.modules.items():
        check_path(path)
        _check_shapes(path, delta, num_tasks=len(bundle.tasks), num_experts=len(bundle.experts))
        _check_values(path, delta)
    _check_ranks(bundle)
    _check_gated(bundle)
    _check_notes(bundle)


def check_path(path: str) -> None:
    """Refuse what cannot be the path of a module.

    Raises:
        AdapterInvalid: `module_path_invalid`.
    """
    if len(path) > MAX_PATH_CHARS or _PATH.fullmatch(path) is None:
        raise AdapterInvalid(
            f"module path {shown(path)}: expected names joined by dots, at most {MAX_PATH_CHARS}"
            " characters, as 'model.layers.0.self_attn.q_proj'; save it from the model again",
            code="module_path_invalid",
        )


def _check_count(count: int, what: str, limit: int) -> None:
    if not 1 <= count <= limit:
        raise AdapterInvalid(
            f"{count} {what}s: an adapter has 1 to {limit}; split it or fill it",
            code="adapter_limit_exceeded",
        )


def _check_names(names: Iterable[str], what: str, limit: int) -> None:
    seen = set[str]()
    for name in names:
        check_name(name, f"{what} name")
        if name in seen:
            raise AdapterInvalid(f"{what} {name!r} is listed twice; rename one of them")
        seen.add(name)
    _check_count(len(seen), what, limit)


def _check_owner(expert: Expert, tasks: tuple[str, ...]) -> None:
    if expert.kind not in ("common", "own"):
        raise AdapterInvalid(
            f"expert {expert.name!r} has kind {shown(expert.kind)}; it is 'common' or 'own'"
        )
    if expert.kind == "common" and expert.owner is not None:
        raise AdapterInvalid(
            f"common expert {expert.name!r} has owner {shown(expert.owner)}; only own experts"
            " have one, so set kind 'own' or owner null",
            code="expert_owner_invalid",
        )
    if expert.kind == "own" and expert.owner not in tasks:
        raise AdapterInvalid(
            f"own expert {expert.name!r} has owner {shown(expert.owner)}, which is no task of"
            f" this adapter; its owner is one of {shown(', '.join(tasks))}",
            code="expert_owner_invalid",
        )


def _check_shapes(path: str, delta: ModuleDelta, *, num_tasks: int, num_experts: int) -> None:
    if len(delta.ranks) != num_experts or min(delta.ranks) < 0 or sum(delta.ranks) < 1:
        raise AdapterInvalid(
            f"{path}: ranks {shown(list(delta.ranks))}; expected {num_experts}, one per expert,"
            " none negative and not all 0; leave out a module that has no expert",
            code="rank_mismatch",
        )
    rows = sum(delta.ranks)
    a, b = tuple(delta.a.shape), tuple(delta.b.shape)
    if len(a) != 2 or len(b) != 2 or a[0] != rows or b[1] != rows or a[1] < 1 or b[0] < 1:
        raise AdapterInvalid(
            f"{path}: A {shown(a)} and B {shown(b)}; expected [{rows}, inputs] and"
            f" [outputs, {rows}], as the ranks sum to {rows}; save it again from the weights",
            code="shape_mismatch",
        )
    if delta.a.dtype != delta.b.dtype or delta.a.dtype not in DTYPES:
        raise AdapterInvalid(
            f"{path}: A is {delta.a.dtype} and B is {delta.b.dtype}; both are one of"
            f" {', '.join(map(str, DTYPES))}; cast them before saving",
            code="dtype_not_supported",
        )
    expected = {"gate": (num_tasks, num_experts), "scale": (num_experts,)}
    for name, tensor in (("gate", delta.gate), ("scale", delta.scale)):
        if tuple(tensor.shape) != expected[name] or tensor.dtype != torch.float32:
            raise AdapterInvalid(
                f"{path}.{name}: {shown(tuple(tensor.shape))} {tensor.dtype}; expected"
                f" {expected[name]} torch.float32, for {num_tasks} tasks and {num_experts} experts",
                code="shape_mismatch",
            )


def _check_values(path: str, delta: ModuleDelta) -> None:
    named = {"A": delta.a, "B": delta.b, "gate": delta.gate, "scale": delta.scale}
    for name, tensor in named.items():
        _check_finite(f"{path}.{name}", tensor)
    _check_finite(f"{path}.gate times scale", delta.gate * delta.scale)


def _check_finite(name: str, tensor: Tensor) -> None:
    low, high = (value.item() for value in torch.aminmax(tensor.detach()))
    # A NaN anywhere makes both NaN, and every comparison with it false.
    if not (low >= -MAX_VALUE and high <= MAX_VALUE):
        worst = low if math.isnan(low) or -low > high else high
        raise AdapterInvalid(
            f"{name} holds {worst}; every number is finite and within {MAX_VALUE:g}, the largest"
            " of fp16; this is what a diverged training leaves, so use an earlier checkpoint",
            code="value_not_finite",
        )


def _check_ranks(bundle: Bundle) -> None:
    for index, expert in enumerate(bundle.experts):
        largest = max(delta.ranks[index] for delta in bundle.modules.values())
        if largest > MAX_RANK:
            raise AdapterInvalid(
                f"expert {expert.name!r} has rank {largest}, the limit is {MAX_RANK}; compress it",
                code="adapter_rank_exceeded",
            )
        if largest < 1 or expert.rank != largest:
            raise AdapterInvalid(
                f"expert {expert.name!r} is declared with rank {expert.rank}, and its largest over"
                f" the modules is {largest}; they are equal and at least 1",
                code="rank_mismatch",
            )


def _check_gated(bundle: Bundle) -> None:
    for task, row in zip(bundle.tasks, bundle.gated, strict=True):
        if not row.any():
            raise AdapterInvalid(
                f"task {task!r} gates no expert at any module, so it would be the base model; give"
                " it a gate that is not 0, or leave it out",
                code="task_without_expert",
            )


def _check_notes(bundle: Bundle) -> None:
    unknown = bundle.defaults.keys() - set(bundle.tasks)
    if unknown:
        raise AdapterInvalid(
            f"defaults for {shown(min(unknown))}, which is no task of this adapter; it has"
            f" {shown(', '.join(bundle.tasks))}"
        )
    for task, values in bundle.defaults.items():
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise AdapterInvalid(
                    f"default {shown(key)} of task {task!r} is {value}; give a finite number",
                    code="value_not_finite",
                )
    size = len(msgspec.json.encode([bundle.defaults, bundle.metadata]))
    if size > MAX_NOTES_BYTES:
        raise AdapterInvalid(
            f"defaults and metadata take {size} bytes, the limit is {MAX_NOTES_BYTES}; cut them",
            code="adapter_limit_exceeded",
        )
