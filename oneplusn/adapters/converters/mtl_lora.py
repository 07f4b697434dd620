"""Read MTL-LoRA (arXiv 2410.09437) as AdapterHub's `adapters` library saves it, a folder per task.

At every adapted linear, with n up-projections and one A for all tasks that share parameters,

    delta_t = (alpha / r) * sum over i of softmax(w_t / tau)_i B_i Lambda_t A x

Everything but A and B_i is a task's own, and no part depends on x, so a task is one LoRA of rank r:
A_t = Lambda_t A, B_t = the weighted sum of B_i.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import torch

from oneplusn.adapters.bundle import Bundle
from oneplusn.adapters.checks import shown
from oneplusn.adapters.converters.factor_mix import Mixed, one_lora_per_task
from oneplusn.adapters.converters.peft_config import Rank, fields_of
from oneplusn.adapters.converters.refusals import check_options
from oneplusn.adapters.converters.source import Source, by_module, take
from oneplusn.errors import AdapterInvalid

ARCHITECTURE = "mtl_lora"

MAX_PROJECTIONS = 4096

IGNORED_OPTIONS = frozenset(
    {
        *("architecture", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out"),
        *("attn_matrices", "dropout", "init_weights", "init_weights_seed", "dtype"),
    }
)
"""Options of training, or that say which linears have tensors, as the tensors do."""

_Sharpness = Annotated[float, msgspec.Meta(gt=0)]


class _Fields(msgspec.Struct, frozen=True):
    """The options that say what is computed."""

    r: Rank
    alpha: float
    n_up_projection: Annotated[int, msgspec.Meta(ge=1, le=MAX_PROJECTIONS)] = 1
    task_specific_matrix_type: Literal["singular_values", "linear"] = "singular_values"
    weights_sharpness: _Sharpness = 0.05
    composition_mode: Literal["add"] = "add"


def read(source: Source) -> Bundle:
    """Convert what the library saved for one task into a bundle with one plain LoRA.

    Raises:
        AdapterInvalid: with a code that names the reason.
    """
    fields = _fields(source.config)
    task = re.escape(_adapter_name(source.config))
    pattern = re.compile(
        rf"(?P<path>.+?)\.loras\.{task}\.(?P<part>lora_A|lora_B|task_specific\.values|weights)"
    )
    what = "loras.<adapter>.lora_A, lora_B, task_specific.values and weights"
    modules = by_module(source.tensors, pattern, what)
    model = source.config.get("model_name")
    return one_lora_per_task(
        "mtl-lora",
        source.task_names(1),
        {path: _fold(source, path, names, fields) for path, names in modules.items()},
        scale=fields.alpha / fields.r,
        metadata={"base_model": model} if isinstance(model, str) else {},
    )


def _fields(config: Mapping[str, Any]) -> _Fields:
    options = config["config"]
    check_options(options, {*_Fields.__struct_fields__, *IGNORED_OPTIONS})
    return fields_of(options, _Fields)


def _adapter_name(config: Mapping[str, Any]) -> str:
    """Return the name in the tensors' names.

    Raises:
        AdapterInvalid: there is none.
    """
    name = config.get("name")
    if not isinstance(name, str) or not name:
        raise AdapterInvalid(
            f"adapter_config.json: name = {shown(name)}; it is the name that the library gave the"
            " adapter, and part of the names of its tensors",
            code="json_invalid",
        )
    return name


def _fold(source: Source, path: str, names: Mapping[str, str], fields: _Fields) -> Mixed:
    """Fold the task's matrix into A and its weights into B.

    Semantics:
        A_t [1, r, K] = Lambda_t A,  B_t [1, N, r] = sum over i of softmax(w / tau)[i] * B_i
        The library multiplies row vectors, x A^T V B^T, so Lambda_t is V^T for a full matrix V.
    """
    rank, count = fields.r, fields.n_up_projection
    shapes: dict[str, tuple[int | str, ...]] = {
        "lora_A": (rank, "inputs"),
        "lora_B": (count, "outputs", rank),
        "task_specific.values": (rank,) * (1 if _is_diagonal(fields) else 2),
        "weights": (count,),
    }
    a, b, values, weights = (
        take(source.tensors, names.get(part), f"{path}.{part}", shape).float()
        for part, shape in shapes.items()
    )
    shares = torch.softmax(weights / fields.weights_sharpness, dim=0)
    folded = values.unsqueeze(1) * a if _is_diagonal(fields) else values.T @ a
    return Mixed(folded.unsqueeze(0), torch.einsum("i,inr->nr", shares, b).unsqueeze(0))


def _is_diagonal(fields: _Fields) -> bool:
    return fields.task_specific_matrix_type == "singular_values"
