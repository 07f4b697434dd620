"""Write a base model with one task of an adapter added to its weights.

    W' = W + sum over e of G[task, e] * s_e * B_e A_e      at every module that the task adapts

The sum is taken in fp32 and rounded once to the dtype that the base is stored in. What comes out is
an ordinary model for any library; what the tasks of the adapter shared is lost.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oneplusn.adapters.attach import find_sites
from oneplusn.adapters.bundle import Bundle, ModuleDelta
from oneplusn.adapters.checks import shown
from oneplusn.adapters.converters.export import Export
from oneplusn.adapters.edits import check_base
from oneplusn.adapters.fingerprint import base_fingerprint
from oneplusn.adapters.folders import new_folder
from oneplusn.errors import AdapterIncompatible, ConfigError, InvalidRequest

TOKENIZER_FILES = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.tiktoken"
    r"|chat_template.*|spiece\.model|sentencepiece.*\.model"
)
"""Files beside the weights of a base that a user of the merged model needs as well."""

SHARD_SIZE = re.compile(r"\d+([KMGT]I?B)?", re.IGNORECASE)


def write(export: Export) -> list[str]:
    """Write the merged model as a folder: configuration, sharded safetensors, tokenizer.

    Returns:
        Lines that say what was written.

    Raises:
        AdapterExists: the folder exists and is not empty.
        AdapterIncompatible: the adapter was made for another base.
        AdapterNotFound: the bundle has no such task.
        ConfigError: there is no model in the folder.
        InvalidRequest: no base is given, or something that only another format takes.
    """
    export.refuse("svd", format_name="base")
    bundle, folder = export.bundle, export.model
    bundle.row(export.task)
    if folder is None:
        raise InvalidRequest(
            "merging needs the model that the task is added to; give its folder", param="model"
        )
    if SHARD_SIZE.fullmatch(export.shard_size) is None:
        raise InvalidRequest(
            f"shard size {shown(export.shard_size)}: give a number and a unit, as 5GB",
            param="shard_size",
        )
    fingerprint = base_fingerprint(folder)
    if not export.lax:
        check_base(bundle, fingerprint)
    model = _load(folder)
    changed = add_task(model, bundle, export.task, strict=not export.lax)
    tqdm.write(f"writing {model.num_parameters():,} parameters to {export.out}", file=sys.stderr)
    with new_folder(export.out) as scratch:
        model.save_pretrained(scratch, max_shard_size=export.shard_size)
        for path in sorted(folder.iterdir()):
            if path.is_file() and TOKENIZER_FILES.fullmatch(path.name):
                shutil.copyfile(path, scratch / path.name)
    shards = len(list(export.out.glob("*.safetensors")))
    return [
        f"modules  {changed} of the base changed",
        f"weights  {model.dtype}, {shards} file{'s' if shards > 1 else ''}",
    ]


@torch.no_grad()
def add_task(model: PreTrainedModel, bundle: Bundle, task: str, *, strict: bool = True) -> int:
    """Add what a task computes to the weights of a model; return how many modules changed.

    Args:
        model: changed in place.
        bundle: where the task is.
        task: its name.
        strict: refuse modules that the model does not have; otherwise they are left out.

    Raises:
        AdapterIncompatible: the model has none of the modules, or of other shapes.
        AdapterNotFound: the bundle has no such task.
    """
    row = bundle.row(task)
    there = {path for site in find_sites(model) for path in site.modules}
    used = {p: delta for p, delta in bundle.modules.items() if delta.weights[row].any()}
    missing = sorted(used.keys() - there)
    if missing and (strict or len(missing) == len(used)):
        raise AdapterIncompatible(
            f"{len(missing)} of {len(used)} modules of task {task!r} are no linears of this base,"
            f" as {missing[0]}; it has {', '.join(sorted(there)[:3])} and others",
            code="module_unmatched",
        )
    matched = {path: delta for path, delta in used.items() if path in there}
    weights = {path: _weight(model, path, delta) for path, delta in matched.items()}
    for path, delta in tqdm(matched.items(), desc="merging", unit="module", disable=None):
        weight = weights[path]
        weight.copy_(weight.float() + _change(delta, row).to(weight.device))
    return len(matched)


def _load(folder: Path) -> PreTrainedModel:
    """Load a model in the dtype that it is stored in; code that comes with it is never run.

    Raises:
        ConfigError: It cannot be loaded.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{folder} is no language model that can be loaded: {reason}") from error
    return model


def _weight(model: nn.Module, path: str, delta: ModuleDelta) -> Tensor:
    """Return a module's weight as `[N, K]`, a view where it is stored the other way round.

    Raises:
        AdapterIncompatible: it has another shape, or is not stored as plain numbers.
    """
    module = model.get_submodule(path)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise AdapterIncompatible(
            f"{path} of this base is {type(module).__name__}, whose weight is quantised or packed;"
            " merge into the base in full precision, and quantise what comes out"
        )
    oriented = weight.T if isinstance(module, Conv1D) else weight
    expected = (delta.b.shape[0], delta.a.shape[1])
    if tuple(oriented.shape) != expected:
        raise AdapterIncompatible(
            f"{path} is {expected[1]} -> {expected[0]} in the adapter, and the weight of this base"
            f" is {list(oriented.shape)}; take the base that it was trained on"
        )
    return oriented


def _change(delta: ModuleDelta, row: int) -> Tensor:
    """Return what a task adds to a weight, fp32 [N, K]."""
    per_row = delta.weights[row].repeat_interleave(torch.tensor(delta.ranks))
    return (delta.b.float() * per_row) @ delta.a.float()
