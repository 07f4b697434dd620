"""What in a foreign adapter cannot be served, by the name of its option or tensor, and why."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from oneplusn.adapters.checks import shown
from oneplusn.errors import AdapterInvalid


class Refusal(NamedTuple):
    """Why something in a foreign adapter cannot be served, and the way out."""

    code: str
    reason: str


DORA = Refusal(
    "dora_not_supported",
    "DoRA rescales the merged weight, which is no sum of experts; train with use_dora=False",
)
BIAS = Refusal("bias_not_supported", "a trained bias is no low-rank delta; train with bias='none'")
MODULES_TO_SAVE = Refusal(
    "modules_to_save_not_supported",
    "whole modules were trained, and only low-rank deltas are served; train without them",
)
EMBEDDING = Refusal(
    "embedding_not_supported",
    "the embedding is the base's for all tasks; train linears of the layers only",
)
LM_HEAD = Refusal(
    "lm_head_not_supported",
    "the output head is the base's for all tasks; train linears of the layers only",
)
TOKEN_GATE = Refusal(
    "token_dependent_gate",
    "its mixture depends on the token, and only mixtures that depend on the task alone are"
    " served; distil it into one LoRA per task",
)
PARAMETERS = Refusal(
    "target_parameters_not_supported",
    "it adapts bare parameters, and only linears are adapted; train with target_modules",
)
REPLICATED = Refusal(
    "layer_replication_not_supported", "it needs a base with repeated layers; train without"
)
MEGATRON = Refusal("megatron_not_supported", "it needs Megatron's layers; convert it first")
ALORA = Refusal(
    "alora_not_supported", "it is active for a part of the tokens only; train a plain LoRA"
)

TOKEN_GATED_TYPES = ("XLORA", "MIXLORA")

REFUSED_OPTIONS = {
    "use_dora": DORA,
    "lora_bias": BIAS,
    "bias": BIAS,
    "modules_to_save": MODULES_TO_SAVE,
    "trainable_token_indices": EMBEDDING,
    "arrow_config": TOKEN_GATE,
    "lora_nums": TOKEN_GATE,  # LoRAMoE and HydraLoRA
    "use_gating": TOKEN_GATE,  # AdapterHub: a gate that reads the input
    "target_parameters": PARAMETERS,
    "layer_replication": REPLICATED,
    "megatron_config": MEGATRON,
    "alora_invocation_tokens": ALORA,
}
"""Options that change the forward pass when they are set."""

NEUTRAL_VALUES = {"bias": "none"}

REFUSED_TENSORS = (
    (re.compile(r"lora_magnitude_vector"), DORA),
    (re.compile(r"\.modules_to_save\."), MODULES_TO_SAVE),
    (re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\."), LM_HEAD),
    (
        re.compile(
            r"lora_embedding_|trainable_tokens"
            r"|(^|\.)(embed_tokens|wte|wpe|word_embeddings|embed_in|embed_positions)\."
        ),
        EMBEDDING,
    ),
    (
        re.compile(r"lora_route|internal_xlora|(^|\.)mixlora\.|\.lora_[AB]\d+\.|\.moe_gate\."),
        TOKEN_GATE,
    ),
    (re.compile(r"\.base_layer\."), PARAMETERS),
    (re.compile(r"\.bias$"), BIAS),
)
"""Names that only these methods give their tensors; the first that is found decides."""


def check_options(config: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse options that change the forward pass, and those that nobody here knows.

    Args:
        config: `adapter_config.json`.
        known: options that the reader interprets, or that concern training only.

    Raises:
        AdapterInvalid: with a code that names the reason.
    """
    for option, refusal in REFUSED_OPTIONS.items():
        value = config.get(option)
        if value and value != NEUTRAL_VALUES.get(option):
            raise refused(option, value, refusal)
    for option in sorted(config.keys() - {*known, *REFUSED_OPTIONS}):
        if config[option]:
            raise AdapterInvalid(
                f"adapter_config.json: option {shown(option)} = {shown(config[option])} is unknown"
                " here, so nobody can say what it does to the output; remove it if it concerns"
                " training only",
                code="option_not_supported",
            )


def check_tensor_name(name: str) -> None:
    """Refuse a tensor that belongs to more than low-rank deltas of linears.

    Raises:
        AdapterInvalid: with a code that names the reason.
    """
    for pattern, refusal in REFUSED_TENSORS:
        if pattern.search(name):
            raise AdapterInvalid(f"tensor {shown(name)}: {refusal.reason}", code=refusal.code)


def refused(option: str, value: object, refusal: Refusal) -> AdapterInvalid:
    """Return the error that refuses an option."""
    return AdapterInvalid(
        f"adapter_config.json: {option} = {shown(value)}: {refusal.reason}", code=refusal.code
    )
