"""Bodies of `/generate`: those of text-generation-inference and LoRAX, with tasks and blends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from pydantic import Field, model_validator

from oneplusn.errors import InvalidRequest
from oneplusn.server import grammars
from oneplusn.server.grammars import GrammarSpec
from oneplusn.server.messages import Sampling
from oneplusn.server.schemas import MAX_INPUTS, Body, Limit, SamplingFields, TaskField


class Grammar(Body):
    """Form of the answer, as text-generation-inference has it."""

    type: Literal["json", "regex"]
    value: dict[str, Any] | str = Field(description="A JSON schema, or a regular expression.")

    @property
    def spec(self) -> GrammarSpec:
        """What the answer must match.

        Raises:
            InvalidRequest: It is malformed or too large.
        """
        param = "parameters.grammar.value"
        if self.type == "json":
            return grammars.json_schema(self._schema(param), param=param)
        if isinstance(self.value, str):
            return grammars.regex(self.value, param)
        msg = f"{param} is an object; a regular expression is a text"
        raise InvalidRequest(msg, param=param)

    def _schema(self, param: str) -> object:
        """Read a schema, which may be written as text."""
        if not isinstance(self.value, str):
            return self.value
        try:
            return msgspec.json.decode(self.value)
        except (msgspec.DecodeError, RecursionError):
            msg = f"{param} is no JSON; send the schema as an object"
            raise InvalidRequest(msg, param=param) from None


class GenerateFormat(Body):
    """Form of the answer, as LoRAX has it."""

    type: Literal["json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @property
    def spec(self) -> GrammarSpec:
        """What the answer must match.

        Raises:
            InvalidRequest: The schema is malformed or too large.
        """
        param = "parameters.response_format.schema"
        if self.schema_ is None:
            return grammars.json_object(param)
        return grammars.json_schema(self.schema_, param=param)


class GenerateParameters(SamplingFields):
    """`parameters` of `/generate`, as text-generation-inference and LoRAX know them."""

    refused: ClassVar[Mapping[str, str]] = {
        "task": "it stands beside parameters",
        "adapter_source": "adapters come from this server's registry alone; leave it out",
        "api_token": "adapters come from this server's registry alone; leave it out",
        "merged_adapters": 'give a blend of tasks: "task": {"a": 0.7, "b": 0.3}',
        "typical_p": "use top_p or min_p",
        "watermark": "leave it out",
        "decoder_input_details": "prompts have no log-probabilities here; leave it out",
    }
    prefix: ClassVar[str] = "parameters."

    adapter_id: str | None = Field(None, description="Another name for `task`, as in LoRAX.")
    max_new_tokens: Limit | None = Field(None, description="Default: what the context leaves.")
    do_sample: bool = Field(False, description="Temperature 1 where none is given.")
    best_of: int | None = Field(None, ge=1, le=1, description="Only 1.")
    truncate: int | None = Field(
        None, ge=1, description="Keep so many of the prompt's last tokens."
    )
    ignore_eos_token: bool = Field(False, description="Another name for `ignore_eos`.")
    details: bool = Field(False, description="List every token with its log-probability.")
    top_n_tokens: int = Field(0, ge=0, le=20, description="Likeliest tokens listed in `details`.")
    return_k_alternatives: int = Field(0, ge=0, le=20, description="The same, within each token.")
    return_full_text: bool = Field(False, description="Put the prompt before the answer.")
    grammar: Grammar | None = None
    response_format: GenerateFormat | None = None

    @property
    def default_temperature(self) -> float:
        """Greedy, unless something was asked for that only sampling can do."""
        asked = self.do_sample or bool({"top_k", "top_p", "min_p"} & self.model_fields_set)
        return 1.0 if asked else 0.0

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to list for each token; None = no log-probabilities at all."""
        return max(self.top_n_tokens, self.return_k_alternatives) if self.details else None

    @property
    def form(self) -> GrammarSpec | None:
        """What the answer must match; None = anything.

        Raises:
            InvalidRequest: It is malformed, or said twice.
        """
        if self.grammar is not None and self.response_format is not None:
            msg = "grammar and response_format both say what to answer; give one of them"
            raise InvalidRequest(msg, param="parameters.grammar")
        said = self.grammar or self.response_format
        return None if said is None else said.spec

    def sampling(self, *, max_tokens: int, seed: int, logprobs: int | None) -> Sampling:
        """Build the engine's form, with LoRAX's name for `ignore_eos` read as well."""
        ignore = self.model_copy(update={"ignore_eos": self.ignore_eos or self.ignore_eos_token})
        return SamplingFields.sampling(ignore, max_tokens=max_tokens, seed=seed, logprobs=logprobs)


class GenerateRequest(Body):
    """Body of `/generate`: a task for every input, all served in the same batch."""

    refused: ClassVar[Mapping[str, str]] = {
        "model": "name a task in task",
        "lora_path": "name a task in task",
        "adapter_id": "name a task in task, or give parameters.adapter_id",
    }

    task: TaskField | Annotated[list[TaskField], Field(max_length=MAX_INPUTS)] = Field(
        None,
        description=(
            "Name, weights of a blend, null for the base, or a list with one per input. "
            "Without it, and without `parameters.adapter_id`, the base answers."
        ),
    )
    inputs: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    parameters: GenerateParameters = Field(
        default_factory=lambda: GenerateParameters.model_validate({})
    )

    @model_validator(mode="after")
    def _one_task_per_input(self) -> Self:
        if isinstance(self.task, list):
            inputs = len(self.inputs) if isinstance(self.inputs, list) else None
            if inputs != len(self.task):
                got = "a single text" if inputs is None else f"{inputs} inputs"
                msg = f"task lists {len(self.task)} tasks for {got}; give one task per input"
                raise InvalidRequest(msg, param="task")
        adapter = self.parameters.adapter_id
        if adapter and "task" in self.model_fields_set and self.task != adapter:
            msg = f"parameters.adapter_id {adapter!r} contradicts task; give one of them"
            raise InvalidRequest(msg, param="parameters.adapter_id")
        return self

    @property
    def pairs(self) -> list[tuple[str, str | dict[str, float] | None]]:
        """Every input with its task."""
        inputs = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        task = (self.parameters.adapter_id or None) if self.task is None else self.task
        tasks = task if isinstance(task, list) else [task] * len(inputs)
        return list(zip(inputs, tasks, strict=True))


class StreamableGenerateRequest(GenerateRequest):
    """Body of `POST /`: the same, and whether the answer is a stream."""

    stream: bool = False
