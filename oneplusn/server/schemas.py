"""Bodies of the requests: fields, ranges, defaults, and what they mean for the engine.

Fields of other servers' interfaces keep those servers' names. Unknown fields are ignored; known
ones must have the right type, so `"5"` is no number and `1` no boolean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from oneplusn.errors import InvalidRequest
from oneplusn.server.messages import Sampling

MAX_DEFAULT_TOKENS = 4096
MAX_INPUTS = 256
MAX_CHOICES = 8
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_BIASES = 300
MAX_MESSAGES = 1000
MAX_BLEND = 8

_INT64 = 1 << 63


def _listed(value: object) -> object:
    """Read a lone string as a list of one."""
    return [value] if isinstance(value, str) else value


def _not_zero(weight: float) -> float:
    if not weight:
        msg = "a task of weight 0 adds nothing; leave it out"
        raise ValueError(msg)
    return weight


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
    Field(max_length=MAX_STOPS),
]
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Weight = Annotated[float, Field(ge=-1e3, le=1e3), AfterValidator(_not_zero)]
Blend = Annotated[dict[str, Weight], Field(min_length=1, max_length=MAX_BLEND)]
TaskField = str | Blend | None


class Body(BaseModel):
    """A request body. No NaN, no Infinity, no guessing of types."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        """Read null as the default wherever there is one, as OpenAI's clients send it."""
        if not isinstance(value, Mapping):
            return value
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {key: item for key, item in value.items() if item is not None or key not in optional}


class SamplingFields(Body):
    """How tokens are picked, under the names that all interfaces share."""

    top_k: int = Field(0, ge=-1, le=1 << 20, description="Keep the k likeliest; 0 or -1 = all.")
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    seed: Seed | None = None
    stop: Stop = []
    stop_token_ids: list[TokenId] = Field([], max_length=128)
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    logit_bias: dict[str, Bias] = Field({}, max_length=MAX_BIASES)

    def sampling(
        self, *, max_tokens: int, temperature: float, seed: int, logprobs: int | None
    ) -> Sampling:
        """Build the engine's form.

        Raises:
            InvalidRequest: `min_tokens` is above `max_tokens`, or a key of `logit_bias` no token.
        """
        return Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
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


class GenerateParameters(SamplingFields):
    """`parameters` of `/generate`. Greedy unless a temperature is given."""

    max_new_tokens: int | None = Field(None, ge=1, description="Default: what the context leaves.")
    temperature: float = Field(0.0, ge=0, le=2)
    details: bool = Field(False, description="List every token with its log-probability.")
    top_n_tokens: int = Field(0, ge=0, le=20, description="Likeliest tokens listed in `details`.")
    return_full_text: bool = Field(False, description="Put the prompt before the answer.")


class GenerateRequest(Body):
    """Body of `/generate`: a task for every input, all served in the same batch."""

    task: TaskField | Annotated[list[TaskField], Field(max_length=MAX_INPUTS)] = Field(
        description="Name, weights of a blend, null for the base, or a list with one per input."
    )
    inputs: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    parameters: GenerateParameters = Field(
        default_factory=lambda: GenerateParameters.model_validate({})
    )

    @model_validator(mode="after")
    def _one_task_per_input(self) -> GenerateRequest:
        if isinstance(self.task, list):
            inputs = len(self.inputs) if isinstance(self.inputs, list) else None
            if inputs != len(self.task):
                got = "a single text" if inputs is None else f"{inputs} inputs"
                msg = f"task lists {len(self.task)} tasks for {got}; give one task per input"
                raise InvalidRequest(msg, param="task")
        return self

    @property
    def pairs(self) -> list[tuple[str, str | dict[str, float] | None]]:
        """Every input with its task."""
        inputs = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        tasks = self.task if isinstance(self.task, list) else [self.task] * len(inputs)
        return list(zip(inputs, tasks, strict=True))


class StreamOptions(Body):
    """What a stream tells besides tokens."""

    include_usage: bool = False


class OpenAIRequest(SamplingFields):
    """What chat and plain completions have in common."""

    model: str = Field(description="The base model or a task.")
    task: str | None = Field(None, description="May repeat `model`; anything else is an error.")
    temperature: float = Field(1.0, ge=0, le=2)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_shared(self) -> OpenAIRequest:
        if self.task is not None and self.task != self.model:
            msg = f"task {self.task!r} contradicts model {self.model!r}; give one, or both alike"
            raise InvalidRequest(msg, param="task")
        if self.stream_options is not None and not self.stream:
            msg = "stream_options is given without stream: true; drop one or add the other"
            raise InvalidRequest(msg, param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Body):
    """A piece of a message; text is the only kind that a text model reads."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ResponseFormat(Body):
    """Form of the answer."""

    type: Literal["text"] = Field(description="Only free text.")


class ChatRequest(OpenAIRequest):
    """Body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Default: what the context leaves."
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Any] = Field([], max_length=0, description="Not supported; must be empty.")

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            old, new = self.max_tokens, self.max_completion_tokens
            msg = f"max_tokens {old} contradicts max_completion_tokens {new}; give one of them"
            raise InvalidRequest(msg, param="max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            msg = "top_logprobs is given without logprobs: true; drop one or add the other"
            raise InvalidRequest(msg, param="top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to list for each token; None = no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(OpenAIRequest):
    """Body of `/v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    max_tokens: int | None = Field(None, ge=1, description="Default: what the context leaves.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    suffix: None = Field(None, description="Not supported; must be null.")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            msg = f"best_of {self.best_of} is not supported; it may only equal n, {self.n}"
            raise InvalidRequest(msg, param="best_of")
        if self.echo and self.logprobs is not None:
            msg = "echo with logprobs is not supported: prompts have no log-probabilities here"
            raise InvalidRequest(msg, param="echo")
        if not 1 <= len(self.prompts) * self.n <= MAX_INPUTS:
            count = f"{len(self.prompts)} prompts with {self.n} choices each"
            msg = f"{count}; a request makes 1 to {MAX_INPUTS} answers"
            raise InvalidRequest(msg, param="prompt")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt if isinstance(token, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]
