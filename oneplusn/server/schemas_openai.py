"""Bodies of OpenAI's requests, with the fields that vLLM adds to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from oneplusn.errors import InvalidRequest
from oneplusn.server.grammars import GrammarSpec
from oneplusn.server.schemas import (
    MAX_INPUTS,
    Blend,
    Body,
    Limit,
    SamplingFields,
    TokenIds,
    at_most,
)
from oneplusn.server.schemas_tools import (
    MAX_CALLS,
    MAX_TOOLS,
    ResponseFormat,
    StructuredOutputs,
    Tool,
    ToolCall,
    ToolChoice,
)

MAX_CHOICES = 8
MAX_MESSAGES = 1000
MAX_PARTS = 1000
MAX_SWITCHES = 8
Texts = Annotated[list[str], Field(max_length=MAX_INPUTS)]
REQUEST_ID_PATTERN = r"^[\w-]{1,128}$"
# What a request may pass to the model's own chat template: switches, never text.
TEMPLATE_SWITCHES = frozenset({"enable_thinking", "thinking"})

_REFUSED = {
    "use_beam_search": "sample with n instead",
    "prompt_logprobs": "prompts have no log-probabilities here",
    "logprob_token_ids": "use logprobs and top_logprobs",
    "allowed_token_ids": "use logit_bias",
    "bad_words": "use logit_bias",
    "truncate_prompt_tokens": "a prompt is never cut; shorten it",
    "return_tokens_as_token_ids": "leave it out",
    "return_token_ids": "leave it out",
    "kv_transfer_params": "leave it out",
    "vllm_xargs": "leave it out",
    "custom_logit_processor": "code of clients is never run",
    "logits_processors": "code of clients is never run",
    "stop_regex": "use stop",
    "lora_path": "name the task in model",
    "adapter_id": "name the task in model",
    "guided_json": "use structured_outputs.json",
    "guided_regex": "use structured_outputs.regex",
    "guided_choice": "use structured_outputs.choice",
    "guided_grammar": "use structured_outputs.grammar",
    "guided_whitespace_pattern": "use structured_outputs, without it",
    "guided_decoding_backend": "use structured_outputs, without it",
}


class StreamOptions(Body):
    """What a stream tells besides tokens."""

    include_usage: bool = Field(False, description="The token counts, as the last event.")
    continuous_usage_stats: bool = Field(False, description="The counts so far, in every event.")


class Extension(Body):
    """What `model` cannot say."""

    prefix: ClassVar[str] = "oneplusn."

    blend: Blend | None = Field(None, description="Tasks and weights; `model` is the base then.")
    return_gates: bool = Field(False, description="Tell the weight of every expert, per module.")
    return_version: bool = Field(False, description="Tell the digests of the versions used.")


class OpenAIRequest(SamplingFields):
    """What chat and plain completions have in common."""

    refused: ClassVar[Mapping[str, str]] = _REFUSED
    fixed: ClassVar[Mapping[str, JsonValue]] = {
        "length_penalty": 1,
        "spaces_between_special_tokens": True,
    }

    model: str = Field(description="The base model, a task, or an adapter of one task.")
    task: str | None = Field(None, description="May repeat `model`; anything else is an error.")
    oneplusn: Extension = Field(default_factory=lambda: Extension.model_validate({}))
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    request_id: Annotated[str, Field(pattern=REQUEST_ID_PATTERN)] | None = Field(
        None, description="Used where there is no `x-request-id`."
    )
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(max_length=256)] = Field(
        "", description="Only requests with the same one share cached prefixes."
    )

    @model_validator(mode="after")
    def _check_shared(self) -> Self:
        if self.task is not None and self.task != self.model:
            msg = f"task {self.task!r} contradicts model {self.model!r}; give one, or both alike"
            raise InvalidRequest(msg, param="task")
        if self.stream_options is not None and not self.stream:
            msg = "stream_options is given without stream: true; drop one or add the other"
            raise InvalidRequest(msg, param="stream_options")
        return self

    @property
    def grammar(self) -> GrammarSpec | None:
        """What the answer must match; None = anything.

        Raises:
            InvalidRequest: It is malformed, or said twice.
        """
        said = None if self.response_format is None else self.response_format.grammar
        if self.structured_outputs is None:
            return said
        if said is not None:
            msg = "response_format and structured_outputs both say what to answer; give one of them"
            raise InvalidRequest(msg, param="structured_outputs")
        return self.structured_outputs.grammar

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """Whether every event of a stream has the counts so far."""
        return self.include_usage and (
            self.stream_options is not None and self.stream_options.continuous_usage_stats
        )


class TextPart(Body):
    """A piece of a message; text is the only kind that a text model reads."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = (
        None
    )
    tool_calls: list[ToolCall] = Field([], max_length=MAX_CALLS)
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def for_template(self) -> dict[str, Any]:
        """Write it as chat templates read it."""
        role = "system" if self.role == "developer" else self.role
        written: dict[str, Any] = {"role": role, "content": self.text}
        if self.tool_calls:
            written["tool_calls"] = [call.for_template() for call in self.tool_calls]
        named = {"tool_call_id": self.tool_call_id, "name": self.name}
        return written | {key: value for key, value in named.items() if value is not None}


class ChatRequest(OpenAIRequest):
    """Body of `/v1/chat/completions`."""

    refused: ClassVar[Mapping[str, str]] = {
        **_REFUSED,
        "chat_template": "the model's own template is used",
        "documents": "put their text into a message",
        "add_special_tokens": "the template writes them",
        "continue_final_message": "use /v1/completions",
        "echo": "use /v1/completions",
        "media_io_kwargs": "only text is read",
        "mm_processor_kwargs": "only text is read",
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "only text is written",
        "web_search_options": "this server fetches nothing",
        "thinking_token_budget": "use max_completion_tokens",
    }
    fixed: ClassVar[Mapping[str, JsonValue]] = {
        **OpenAIRequest.fixed,
        "add_generation_prompt": True,
        "modalities": ["text"],
    }

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = Field(
        None, description="Default: what the context leaves."
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = Field(None, description="`auto` where there are tools.")
    parallel_tool_calls: bool = True
    chat_template_kwargs: Annotated[
        dict[str, JsonValue], Field(max_length=MAX_SWITCHES), at_most(MAX_SWITCHES)
    ] = Field({}, description="Switches of the model's chat template.")

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            old, new = self.max_tokens, self.max_completion_tokens
            msg = f"max_tokens {old} contradicts max_completion_tokens {new}; give one of them"
            raise InvalidRequest(msg, param="max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            msg = "top_logprobs is given without logprobs: true; drop one or add the other"
            raise InvalidRequest(msg, param="top_logprobs")
        for name, value in self.chat_template_kwargs.items():
            if name not in TEMPLATE_SWITCHES or not isinstance(value, bool):
                known = " and ".join(sorted(TEMPLATE_SWITCHES))
                msg = f"chat_template_kwargs has {name[:50]!r}; it takes {known}, true or false"
                raise InvalidRequest(msg, param="chat_template_kwargs")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, if the request says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to list for each token; None = no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(OpenAIRequest):
    """Body of `/v1/completions`."""

    refused: ClassVar[Mapping[str, str]] = {
        **_REFUSED,
        "suffix": "put the text into the prompt",
        "prompt_embeds": "send text or token ids",
    }

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(max_length=MAX_INPUTS)]
    max_tokens: Limit | None = Field(None, description="Default: what the context leaves.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    add_special_tokens: bool = Field(True, description="Those that the model begins a text with.")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="May only equal `n`.")

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
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
