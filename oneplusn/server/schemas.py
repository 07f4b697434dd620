"""Bodies of the requests: what all of them share.

Fields of other servers' interfaces keep those servers' names. Unknown fields are ignored; known
ones must have the right type, so `"5"` is no number and `1` no boolean. What is known, not served
and would change the answer is refused by name: silence would be a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    model_validator,
)

from oneplusn.errors import InvalidRequest
from oneplusn.server.messages import Sampling

MAX_DEFAULT_TOKENS = 4096
MAX_INPUTS = 128
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_BIASES = 300
MAX_BLEND = 8
MAX_TIMEOUT_SECONDS = 86_400
MAX_TOKENS = 1 << 20

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_INT64 = 1 << 63


def _listed(value: object) -> object:
    """Read a lone string as a list of one."""
    return [value] if isinstance(value, str) else value


def at_most(limit: int) -> BeforeValidator:
    """Refuse an object of more items before each of them is looked at."""

    def check(value: object) -> object:
        if isinstance(value, Mapping) and len(value) > limit:
            msg = f"it has {len(value)} items; at most {limit} are possible"
            raise ValueError(msg)
        return value

    return BeforeValidator(check)


def _not_zero(weight: float) -> float:
    if not weight:
        msg = "a task of weight 0 adds nothing; leave it out"
        raise ValueError(msg)
    return weight


# A list says only what is wrong first, and its length is known before its items are looked at:
# a message about each of a million items would cost minutes and gigabytes.
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]
Limit = Annotated[int, Field(ge=1, le=1 << 24)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Weight = Annotated[float, Field(ge=-1e3, le=1e3), AfterValidator(_not_zero)]
Blend = Annotated[dict[str, Weight], Field(min_length=1, max_length=MAX_BLEND), at_most(MAX_BLEND)]
TaskField = str | Blend | None


class Body(BaseModel):
    """A request body. No NaN, no Infinity, no guessing of types.

    Attributes:
        refused: Fields that other servers take and this one does not, each with the way out. They
            may hold what asks for nothing: null, false, or an empty text, list or object.
        fixed: Fields of other servers that may only say what happens anyway.
        prefix: Where the body stands within the request, for the names of its fields.
    """

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    refused: ClassVar[Mapping[str, str]] = {}
    fixed: ClassVar[Mapping[str, JsonValue]] = {}
    prefix: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _read_nulls_and_refuse(cls, value: object) -> object:
        """Read null as the default wherever there is one, as OpenAI's clients send it."""
        if not isinstance(value, Mapping):
            return value
        for name in cls.refused.keys() & value.keys():
            if value[name]:
                raise cls._unsupported(name, cls.refused[name])
        for name in cls.fixed.keys() & value.keys():
            if value[name] not in (None, cls.fixed[name]):
                raise cls._unsupported(name, f"it may only be {cls.fixed[name]!r}")
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        return {
            name: value[name]
            for name, field in fields.items()
            if name in value and (value[name] is not None or field.is_required())
        }

    @classmethod
    def _unsupported(cls, name: str, way_out: str) -> InvalidRequest:
        msg = f"{cls.prefix}{name} is not supported: {way_out}"
        return InvalidRequest(msg, code="unsupported_field", param=cls.prefix + name)


class SamplingFields(Body):
    """How tokens are picked, under the names that all interfaces share."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int = Field(0, ge=-1, le=1 << 20, description="Keep the k likeliest; 0 or -1 = all.")
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: Seed | None = None
    stop: Stop = []
    stop_token_ids: list[TokenId] = Field([], max_length=128)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES), at_most(MAX_BIASES)] = {}
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
    include_stop_str_in_output: bool = Field(
        False, description="Let the answer end with the stop string or token that ended it."
    )
    timeout: float | None = Field(
        None, ge=1e-3, le=MAX_TIMEOUT_SECONDS, description="Seconds until it is given up."
    )

    @property
    def default_temperature(self) -> float:
        """The temperature of a request that names none."""
        return 1.0

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """Fill in what the request does not say, from what its task brings."""
        names = type(self).model_fields.keys() - self.model_fields_set
        unsaid = {name: value for name, value in defaults.items() if name in names}
        return self.model_copy(update=unsaid) if unsaid else self

    def sampling(self, *, max_tokens: int, seed: int, logprobs: int | None) -> Sampling:
        """Build the engine's form.

        Raises:
            InvalidRequest: `min_tokens` is above `max_tokens`, or a key of `logit_bias` no token.
        """
        given = self.temperature
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.default_temperature if given is None else given,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            logit_bias={_token_id(key): bias for key, bias in self.logit_bias.items()},
        )


def _token_id(key: str) -> int:
    """Read a key of `logit_bias`, which JSON makes a string.

    Raises:
        InvalidRequest: It is not a token id.
    """
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        msg = f"logit_bias has the key {key[:20]!r}; its keys are token ids"
        raise InvalidRequest(msg, param="logit_bias")
    return int(key)


class TaskDefaults(SamplingFields):
    """Sampling that an adapter brings for one of its tasks, used where a request says nothing."""

    max_tokens: Limit | None = None
