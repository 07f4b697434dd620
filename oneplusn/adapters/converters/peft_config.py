"""Judge an `adapter_config.json` of PEFT: whether it describes a plain LoRA, of which modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from oneplusn.adapters.checks import shown
from oneplusn.adapters.converters.patterns import Matcher
from oneplusn.adapters.converters.refusals import check_options
from oneplusn.adapters.converters.targets import TargetFields, Targets
from oneplusn.adapters.validation import MAX_RANK
from oneplusn.errors import AdapterInvalid

N = TypeVar("N", int, float)
Form = TypeVar("Form", bound=msgspec.Struct)

Rank = Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]

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


class _Fields(TargetFields, frozen=True, kw_only=True):
    """The options that say which modules are adapted, and how strongly."""

    r: Rank
    lora_alpha: float
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None


class PeftConfig:
    """A configuration that is known to describe a plain LoRA of an unchanged base."""

    def __init__(self, config: Mapping[str, Any], *, assume_converted: bool) -> None:
        """Refuse what is more than that.

        Raises:
            AdapterInvalid: with a code that names the reason.
        """
        check_options(config, {*_Fields.__struct_fields__, *IGNORED_OPTIONS})
        if not assume_converted:
            _check_base_unchanged(config)
        self._fields = fields_of(config, _Fields)
        self._matcher = Matcher()
        self.targets = Targets(self._fields, self._matcher)

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

    def _first_match(self, patterns: Mapping[str, N] | None, path: str, default: N) -> N:
        """Return the value of the first pattern that matches, as PEFT does."""
        for pattern, value in (patterns or {}).items():
            if self._matcher.match_tail(pattern, path):
                return value
        return default


def fields_of(config: Mapping[str, Any], form: type[Form]) -> Form:
    """Take the options of a form out of a configuration.

    Raises:
        AdapterInvalid: `json_invalid`; one is missing, or of another type or range.
    """
    try:
        return msgspec.convert(dict(config), form)
    except msgspec.ValidationError as error:
        raise AdapterInvalid(
            f"adapter_config.json: {error}; correct that field", code="json_invalid"
        ) from None


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
