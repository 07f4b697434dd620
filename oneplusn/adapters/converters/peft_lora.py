"""Convert plain LoRA adapters of PEFT into bundles, and one task of a bundle back.

In a bundle such an adapter is one task with one own expert, gate 1 and scale alpha / r (alpha /
sqrt r for rsLoRA). Shapes come from the tensors; the configuration gives the scales, and has to
agree with the tensors. What is more than a low-rank sum, or may be, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from oneplusn.adapters.bundle import Bundle, Expert, ModuleDelta
from oneplusn.adapters.checks import check_name, shown
from oneplusn.adapters.converters import peft_config as peft
from oneplusn.adapters.validation import check_path
from oneplusn.errors import AdapterInvalid

REFUSED_TENSORS = (
    (re.compile(r"lora_magnitude_vector"), peft.DORA),
    (re.compile(r"\.modules_to_save\."), peft.MODULES_TO_SAVE),
    (re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\."), peft.LM_HEAD),
    (
        re.compile(
            r"lora_embedding_|trainable_tokens"
            r"|(^|\.)(embed_tokens|wte|wpe|word_embeddings|embed_in|embed_positions)\."
        ),
        peft.EMBEDDING,
    ),
    (
        re.compile(r"lora_route|internal_xlora|(^|\.)mixlora\.|\.lora_[AB]\d+\.|\.moe_gate\."),
        peft.TOKEN_GATE,
    ),
    (re.compile(r"poly_lora_|poly_router"), peft.NO_CONVERTER),
    (re.compile(r"\.base_layer\."), peft.PARAMETERS),
    (re.compile(r"\.bias$"), peft.BIAS),
)
"""Names that only these methods give their tensors; the first that is found decides."""

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    rf"({re.escape(_PREFIX)})?(?P<path>.+)\.lora_(?P<side>[AB])(\.default)?\.weight"
)


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
    settings = peft.PeftConfig(config, assume_converted=assume_converted)
    factors = _factors(tensors)
    for path in factors:
        if not settings.targets(path):
            raise _mismatch(f"there are tensors for {path}, which the configuration leaves out")
    for path in modules or ():
        if path not in factors and settings.targets(path):
            raise _mismatch(f"the configuration targets {path}, for which there are no tensors")
    deltas = {path: _delta(path, *pair, settings) for path, pair in sorted(factors.items())}
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
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = a
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = b
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
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        _check_served(name)
        match = _FACTOR.fullmatch(name)
        if match is None or match["side"] in sides.get(match["path"], {}):
            raise AdapterInvalid(
                f"tensor {shown(name)}: expected one lora_A.weight and one lora_B.weight per"
                " module and nothing else; save the adapter again with PEFT",
                code="tensor_unexpected",
            )
        check_path(match["path"])
        sides.setdefault(match["path"], {})[match["side"]] = tensor
    if not sides:
        raise AdapterInvalid("the adapter has no tensors; save it again", code="tensor_missing")
    return {path: _pair(path, pair) for path, pair in sides.items()}


def _check_served(name: str) -> None:
    """Refuse a tensor that belongs to more than a plain LoRA."""
    for pattern, refusal in REFUSED_TENSORS:
        if pattern.search(name):
            raise AdapterInvalid(f"tensor {shown(name)}: {refusal.reason}", code=refusal.code)


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


def _delta(path: str, a: Tensor, b: Tensor, settings: peft.PeftConfig) -> ModuleDelta:
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


def _mismatch(fault: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{fault}; adapter_config.json and the tensors must come from the same training",
        code="config_mismatch",
    )
