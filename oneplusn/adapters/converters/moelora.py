"""Read MOELoRA (arXiv 2310.18339) as its authors' code saves it.

At every adapted linear, with E experts of rank r / E,

    delta_j = (alpha / r) * sum over e of g[j, e] * B_e (A_e x),  g[j] = softmax(W_gate emb[j])

alpha is divided by the whole rank r, not by an expert's. Tasks count from 1: row 0 of the embedding
is nobody's. `MMOELORA` has an embedding and a gate at every linear; `MMOELORAS` has one of each for
the model, and the ones that its linears carry as well are never read, by the authors' code or here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec
import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.checks import shown
from oneplusn.adapters.converters.patterns import Matcher
from oneplusn.adapters.converters.peft_config import IGNORED_OPTIONS, Rank, fields_of
from oneplusn.adapters.converters.refusals import check_options
from oneplusn.adapters.converters.source import PREFIX, Source, by_module, take
from oneplusn.adapters.converters.targets import TargetFields, mismatch
from oneplusn.adapters.validation import MAX_EXPERTS, MAX_TASKS
from oneplusn.errors import AdapterInvalid

PER_LAYER, SHARED = "MMOELORA", "MMOELORAS"

EMBEDDING, GATE = "lora_task_embedding.weight", "lora_gate.GateL.weight"
MAX_EMBEDDING_DIM = 65_536

_EXPERT = r"lora_(?P<side>[AB])\.lora(?P=side)\.\d+"
_TWIN = re.compile(rf"(?P<stem>.+\.{_EXPERT})\.weight")
_PART = re.compile(
    rf"{PREFIX}(?P<path>.+?)\.(?P<part>{_EXPERT}\.mlp\.weight"
    rf"|{re.escape(EMBEDDING)}|{re.escape(GATE)})"
)


class _Fields(TargetFields, frozen=True, kw_only=True):
    """The options of MOELoRA."""

    r: Rank
    lora_alpha: float
    task_num: Annotated[int, msgspec.Meta(ge=1, le=MAX_TASKS)]
    expert_num: Annotated[int, msgspec.Meta(ge=1, le=MAX_EXPERTS)]
    task_embedding_dim: Annotated[int, msgspec.Meta(ge=1, le=MAX_EMBEDDING_DIM)] = 64
    peft_type: str = SHARED


def read(source: Source) -> Bundle:
    """Convert what the authors' code saved into a bundle of E common experts.

    Raises:
        AdapterInvalid: with a code that names the reason.
    """
    fields = _fields(source)
    tensors = _without_twins(source.tensors)
    of_model = {name: name for name in (EMBEDDING, GATE) if name in tensors}
    linears = {name: tensor for name, tensor in tensors.items() if name not in of_model}
    modules = by_module(linears, _PART, "the experts of MOELoRA, an embedding and a gate")
    _check_targets(fields, modules)
    shared = _gates(tensors, of_model, "", fields) if fields.peft_type == SHARED else None
    rank = fields.r // fields.expert_num
    base = fields.base_model_name_or_path
    return Bundle(
        method="moelora",
        tasks=source.task_names(fields.task_num, first=1),
        experts=tuple(
            Expert(f"expert-{e}", "common", None, rank) for e in range(fields.expert_num)
        ),
        modules={
            path: _delta(
                tensors,
                path,
                names,
                fields,
                gate=_gates(tensors, names, f"{path}.", fields) if shared is None else shared,
            )
            for path, names in modules.items()
        },
        metadata={"base_model": base} if base else {},
    )


def _fields(source: Source) -> _Fields:
    """Judge the configuration.

    Raises:
        AdapterInvalid: an option is missing, refused or unknown, or the rank cannot be shared.
    """
    check_options(source.config, {*_Fields.__struct_fields__, *IGNORED_OPTIONS})
    fields = fields_of(source.config, _Fields)
    if fields.r % fields.expert_num:
        raise AdapterInvalid(
            f"adapter_config.json: r = {fields.r} over expert_num = {fields.expert_num} experts"
            " leaves a remainder; every expert has the same rank, so give those trained with",
            code="rank_mismatch",
        )
    return fields


def _without_twins(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the second name of every factor: `<expert>.weight` is `<expert>.mlp.weight` again.

    Raises:
        AdapterInvalid: the two differ.
    """
    kept = dict(tensors)
    for name in tensors:
        twin = _TWIN.fullmatch(name)
        if twin is None:
            continue
        tensor, other = kept.pop(name), tensors.get(f"{twin['stem']}.mlp.weight")
        if other is None:  # a writer that keeps one name of a shared tensor kept this one
            kept[f"{twin['stem']}.mlp.weight"] = tensor
        elif not torch.equal(tensor.nan_to_num(), other.nan_to_num()):
            raise AdapterInvalid(
                f"{shown(name)} and {shown(twin['stem'] + '.mlp.weight')} are one tensor under two"
                " names, and they differ; save the adapter again from the model",
                code="tensor_unexpected",
            )
    return kept


def _check_targets(fields: _Fields, paths: Iterable[str]) -> None:
    """Check that the configuration adapts the modules, by the rule of PEFT at that time.

    Raises:
        AdapterInvalid: `config_mismatch`.
    """
    names, matcher = fields.target_modules, Matcher()
    for path in paths:
        if isinstance(names, str):
            adapted = matcher.fullmatch(names, path)
        else:
            adapted = names is None or path.endswith(tuple(names))
        if not adapted:
            raise mismatch(f"there are tensors for {path}, which the configuration leaves out")


def _gates(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], prefix: str, fields: _Fields
) -> Tensor:
    """Return the gate rows, [J, E] fp32.

    Semantics:
        softmax over experts of embedding[1:] [J, d] W_gate^T [d, E]
    """
    width = fields.task_embedding_dim
    embedding = take(
        tensors, names.get(EMBEDDING), prefix + EMBEDDING, (fields.task_num + 1, width)
    )
    gate = take(tensors, names.get(GATE), prefix + GATE, (fields.expert_num, width))
    return torch.softmax(embedding[1:].float() @ gate.float().T, dim=-1)


def _delta(
    tensors: Mapping[str, Tensor],
    path: str,
    names: Mapping[str, str],
    fields: _Fields,
    *,
    gate: Tensor,
) -> ModuleDelta:
    experts = range(fields.expert_num)
    rank = fields.r // fields.expert_num
    wanted = {side: [f"lora_{side}.lora{side}.{e}.mlp.weight" for e in experts] for side in "AB"}
    extra = names.keys() - {*wanted["A"], *wanted["B"], EMBEDDING, GATE}
    if extra:
        raise AdapterInvalid(
            f"tensor {shown(names[min(extra)])}: the configuration says expert_num ="
            f" {fields.expert_num}, counted from 0; give the number trained with",
            code="tensor_unexpected",
        )
    a, b = (
        [take(tensors, names.get(part), f"{path}.{part}", shape) for part in wanted[side]]
        for side, shape in (("A", (rank, "inputs")), ("B", ("outputs", rank)))
    )
    _check_alike(path, a, b)
    return ModuleDelta(
        a=torch.cat(a),
        b=torch.cat(b, dim=1),
        ranks=(rank,) * fields.expert_num,
        gate=gate,
        scale=torch.full((fields.expert_num,), fields.lora_alpha / fields.r),
    )


def _check_alike(path: str, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Refuse experts of one linear that read or write different numbers of features.

    Raises:
        AdapterInvalid: `shape_mismatch`.
    """
    inputs, outputs = {t.shape[1] for t in a}, {t.shape[0] for t in b}
    if len(inputs) > 1 or len(outputs) > 1:
        raise AdapterInvalid(
            f"the experts of {path} read {sorted(inputs)} and write {sorted(outputs)} features;"
            " they adapt one linear, so save the adapter again from the model",
            code="shape_mismatch",
        )
