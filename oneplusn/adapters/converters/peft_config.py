"""Judge an `adapter_config.json` of PEFT: whether it describes a plain LoRA, of which modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from oneplusn.adapters.checks import shown
from oneplusn.adapters.converters.patterns import Matcher
from oneplusn.adapters.validation import MAX_RANK
from oneplusn.errors import AdapterInvalid

N = TypeVar("N", int, float)


class Refusal(NamedTuple):
    """Why something in a PEFT adapter cannot be served, and the way out."""

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
NO_CONVERTER = Refusal(
    "converter_missing",
    "the converter is not there yet; only plain LoRA is converted, so flatten it to that",
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
    "target_parameters": PARAMETERS,
    "layer_replication": REPLICATED,
    "megatron_config": MEGATRON,
    "alora_invocation_tokens": ALORA,
}
"""Options that change the forward pass when they are set."""

NEUTRAL_VALUES = {"bias": "none"}

IGNORED_OPTIONS = frozenset(
    {
        *("auto_mapping", "revision", "task_type", "peft_type", "peft_version", "inference_mode"),
        *("base_model_name_or_path", "lora_dropout", "init_lora_weights", "loftq_config"),
        *("eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config"),
        *("megatron_core", "qalora_group_size", "ensure_weight_tying", "fan_in_fan_out"),
    }
)
"""Options of training, of libraries that are off, or judged elsewhere. `fan_in_fan_out` says how
the base stores its weight; A [r, K] and B [N, r] are the same either way."""

PLAIN_INITS = ("True", "False", "None", "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base's weights as they are."""

_Rank = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]


class _Fields(msgspec.Struct, frozen=True):
    """The options that say which modules are adapted, and how strongly."""

    r: _Rank
    lora_alpha: float
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    base_model_name_or_path: str | None = None


class PeftConfig:
    """A configuration that is known to describe a plain LoRA of an unchanged base."""

    def __init__(self, config: Mapping[str, Any], *, assume_converted: bool) -> None:
        """Refuse what is more than that.

        Raises:
            AdapterInvalid: with a code that names the reason.
        """
        _check_options(config)
        if not assume_converted:
            _check_base_unchanged(config)
        try:
            self._fields = msgspec.convert(dict(config), _Fields)
        except msgspec.ValidationError as error:
            raise AdapterInvalid(
                f"adapter_config.json: {error}; correct that field", code="json_invalid"
            ) from None
        self._matcher = Matcher()

    @property
    def base_model(self) -> str | None:
        """What the trainer called the base model; never opened."""
        return self._fields.base_model_name_or_path

    def rank_and_scale(self, path: str) -> tuple[int, float]:
        """Return a module's rank r and the factor of its delta.

        Semantics:
            scale = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)
        """
        fields = self._fields
        rank = self._first_match(fields.rank_pattern, path, fields.r)
        alpha = self._first_match(fields.alpha_pattern, path, fields.lora_alpha)
        return rank, alpha / math.sqrt(rank) if fields.use_rslora else alpha / rank

    def targets(self, path: str) -> bool:
        """Say whether a module is adapted, by PEFT's rules."""
        fields = self._fields
        if fields.exclude_modules and self._is_named(fields.exclude_modules, path):
            return False
        names = fields.target_modules
        if names is None or (isinstance(names, str) and names.lower() == "all-linear"):
            return True
        if not self._is_named(names, path):
            return False
        layers = fields.layers_to_transform
        if isinstance(names, str) or path in names or layers in (None, []):
            return True
        return self._layer(path) in ([layers] if isinstance(layers, int) else layers or [])

    def _first_match(self, patterns: Mapping[str, N] | None, path: str, default: N) -> N:
        """Return the value of the first pattern that matches, as PEFT does."""
        for pattern, value in (patterns or {}).items():
            if self._matcher.match_tail(pattern, path):
                return value
        return default

    def _is_named(self, names: list[str] | str, path: str) -> bool:
        if isinstance(names, str):
            return self._matcher.fullmatch(names, path)
        return any(path == name or path.endswith(f".{name}") for name in names)

    def _layer(self, path: str) -> int | None:
        """Return the first index in the path, or the first below a list that is configured."""
        patterns = self._fields.layers_pattern or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for parent, index in _indices(path):
            named = any(self._matcher.match_tail(pattern, parent) for pattern in patterns)
            if named or (not patterns and "." in parent):
                return index
        return None


def _check_options(config: Mapping[str, Any]) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        is_token_gated = isinstance(peft_type, str) and peft_type.upper() in TOKEN_GATED_TYPES
        raise _refused("peft_type", peft_type, TOKEN_GATE if is_token_gated else NO_CONVERTER)
    for option, refusal in REFUSED_OPTIONS.items():
        value = config.get(option)
        if value and value != NEUTRAL_VALUES.get(option):
            raise _refused(option, value, refusal)
    known = {*_Fields.__struct_fields__, *REFUSED_OPTIONS, *IGNORED_OPTIONS}
    for option in sorted(config.keys() - known):
        if config[option]:
            raise AdapterInvalid(
                f"adapter_config.json: option {shown(option)} = {shown(config[option])} is unknown"
                " here, so nobody can say what it does to the output; remove it if it concerns"
                " training only",
                code="option_not_supported",
            )


def _check_base_unchanged(config: Mapping[str, Any]) -> None:
    for option, plain in (("loftq_config", ("None", "{}")), ("init_lora_weights", PLAIN_INITS)):
        value = config.get(option)
        if str(value) not in plain:
            raise AdapterInvalid(
                f"adapter_config.json: {option} = {shown(value)} changed the base's weights in"
                " training, so the adapter fits that changed base only; convert it with PEFT's"
                " path_initial_model_for_weight_conversion, and set assume_converted once it is",
                code="base_weights_changed",
            )


def _indices(path: str) -> Iterator[tuple[str, int]]:
    """Yield every index in a path that has something after it, with the path before it."""
    parts = path.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit():
            yield ".".join(parts[:place]), int(part)


def _refused(option: str, value: object, refusal: Refusal) -> AdapterInvalid:
    return AdapterInvalid(
        f"adapter_config.json: {option} = {shown(value)}: {refusal.reason}", code=refusal.code
    )
