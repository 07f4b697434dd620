"""Convert plain LoRA adapters of PEFT into bundles, and one task of a bundle back.

In a bundle such an adapter is one task with one own expert, gate 1 and scale alpha / r (alpha /
sqrt r for rsLoRA). Shapes come from the tensors; the configuration gives the scales, and has to
agree with the tensors. What is more than a low-rank sum, or may be, is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.checks import check_name
from oneplusn.adapters.converters.export import Export
from oneplusn.adapters.converters.peft_config import PeftConfig
from oneplusn.adapters.converters.source import PREFIX, Source, by_module
from oneplusn.adapters.converters.targets import mismatch
from oneplusn.adapters.distil import distil
from oneplusn.adapters.folders import new_folder
from oneplusn.adapters.weights import write_tensors
from oneplusn.errors import AdapterInvalid

USUAL_MAX_RANK = 64
"""Largest rank that other servers take without being told to; some stop at 16."""

_FACTOR = re.compile(rf"{PREFIX}(?P<path>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")


def read(source: Source) -> Bundle:
    """Convert what PEFT saved into a bundle of one task; see `to_bundle`."""
    return to_bundle(
        source.config,
        source.tensors,
        task=source.name,
        assume_converted=source.assume_converted,
    )


def write(export: Export) -> list[str]:
    """Write one task as a folder that PEFT and other servers load; see `to_peft`.

    Returns:
        Lines that say what was written, and how far it is from the task.

    Raises:
        AdapterExists: the folder exists and is not empty.
        AdapterNotFound: the bundle has no such task.
        InvalidRequest: the rank is below 1, or something was given that only another format takes.
    """
    export.refuse("model", "lax", "shard_size", format_name="peft")
    bundle, errors = export.bundle, dict[str, float]()
    if export.svd is not None:
        cut = distil(bundle, {export.task: 1.0}, task=export.task, rank=export.svd)
        bundle, errors = cut.bundle, dict(cut.errors)
    config, tensors = to_peft(bundle, export.task)
    with new_folder(export.out) as folder:
        text = json.dumps(config, indent=2) + "\n"
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")
        write_tensors(tensors, folder / "adapter_model.safetensors")
    lines = [f"rank     {config['r']}"]
    if errors:
        worst = max(errors, key=lambda path: errors[path])
        mean = sum(errors.values()) / len(errors)
        lines.append(f"error    {mean:.2%} of what it adds, mean; {errors[worst]:.2%} at {worst}")
    if config["r"] > USUAL_MAX_RANK:
        lines.append(
            f"warning  rank {config['r']}, and other servers take up to 16 or {USUAL_MAX_RANK}"
            " unless they are told otherwise (vLLM: --max-lora-rank); --svd cuts it"
        )
    return lines


def to_bundle(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    task: str,
    modules: Sequence[str] | None = None,
    assume_converted: bool = False,
) -> Bundle:
    """Convert what PEFT saved into a bundle of one task.

    Semantics:
        delta[T, N] = scale * (x[T, K] A^T) B^T, scale = alpha / r, or alpha / sqrt r for rsLoRA

    Args:
        config: `adapter_config.json`.
        tensors: `adapter_model.safetensors`: A [r, K] and B [N, r] by name.
        task: name for the task.
        modules: paths of the linears that the base can have adapted, if known; then each that
            the configuration targets must have tensors.
        assume_converted: take PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA as converted to a plain
            LoRA of the unchanged base.

    Raises:
        AdapterInvalid: with a code that names the reason.
    """
    check_name(task, "task name")
    settings = PeftConfig(config, assume_converted=assume_converted)
    factors = _factors(tensors)
    settings.targets.check(factors)
    for path in modules or ():
        if path not in factors and path in settings.targets:
            raise mismatch(f"the configuration targets {path}, for which there are no tensors")
    deltas = {path: _delta(path, *pair, settings) for path, pair in factors.items()}
    rank = max(delta.ranks[0] for delta in deltas.values())
    return Bundle(
        method="lora",
        tasks=(task,),
        experts=(Expert(name=task, kind="own", owner=task, rank=rank),),
        modules=deltas,
        metadata={"base_model": settings.base_model} if settings.base_model else {},
    )


def to_peft(bundle: Bundle, task: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Flatten one task into a plain LoRA: `adapter_config.json`, and its tensors in fp32.

    The experts that the task gates become one, side by side. Exact but for fp32 rounding; the
    price is the sum of their ranks, and that tasks share nothing any more.

    Semantics:
        A' = [gate_e * scale_e * A_e, ...], B' = [B_e, ...], alpha = r, so delta = B' (A' x)

    Raises:
        AdapterNotFound: the bundle has no such task.
    """
    row = bundle.row(task)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, delta in bundle.modules.items():
        weights = delta.weights[row].tolist()
        terms = [term for term in zip(weights, delta.spans, strict=True) if term[0]]
        if terms:
            a = torch.cat([delta.a[span].float() * weight for weight, span in terms])
            b = torch.cat([delta.b[:, span].float() for _, span in terms], dim=1)
            tensors[f"base_model.model.{path}.lora_A.weight"] = a
            tensors[f"base_model.model.{path}.lora_B.weight"] = b
            ranks[path] = len(a)
    largest = max(ranks.values())
    patterns = {
        f"^{path}$".replace(".", r"\."): rank for path, rank in ranks.items() if rank != largest
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": bundle.metadata.get("base_model"),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    return config, tensors


def _factors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair A and B of every module."""
    modules = by_module(tensors, _FACTOR, "one lora_A.weight and one lora_B.weight")
    return {
        path: _pair(path, {side: tensors[name] for side, name in names.items()})
        for path, names in modules.items()
    }


def _pair(path: str, pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    for side in "AB":
        if side not in pair:
            raise AdapterInvalid(
                f"{path} has no lora_{side}.weight; the file is incomplete, save it again",
                code="tensor_missing",
            )
        if pair[side].ndim != 2:
            raise AdapterInvalid(
                f"{path}.lora_{side}.weight has shape {list(pair[side].shape)}; only linears are"
                " adapted, whose factors have 2 dimensions",
                code="shape_mismatch",
            )
    return pair["A"], pair["B"]


def _delta(path: str, a: Tensor, b: Tensor, settings: PeftConfig) -> ModuleDelta:
    rank, scale = settings.rank_and_scale(path)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterInvalid(
            f"{path}: A {list(a.shape)} and B {list(b.shape)}, and the configuration says rank"
            f" {rank}; its r and rank_pattern decide the scale, so give those trained with",
            code="rank_mismatch",
        )
    return ModuleDelta(
        a=a,
        b=b,
        ranks=(rank,),
        gate=torch.ones(1, 1),
        scale=torch.tensor([scale], dtype=torch.float32),
    )
