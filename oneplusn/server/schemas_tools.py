"""Fields of requests for tools and for the form of an answer: OpenAI's, and vLLM's additions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from oneplusn.errors import InvalidRequest
from oneplusn.server import grammars
from oneplusn.server.grammars import GrammarSpec
from oneplusn.server.schemas import Body

MAX_TOOLS = 128
MAX_CALLS = 128

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class JsonSchemaFormat(Body):
    """A schema under the name that OpenAI gives it."""

    prefix: ClassVar[str] = "response_format.json_schema."

    name: FunctionName
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool = Field(False, description="Refuse keywords that cannot be held.")


class ResponseFormat(Body):
    """Form of the answer."""

    prefix: ClassVar[str] = "response_format."

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @property
    def grammar(self) -> GrammarSpec | None:
        """What the answer must match; None = anything.

        Raises:
            InvalidRequest: The schema is missing or refused.
        """
        if self.type == "text":
            return None
        if self.type == "json_object":
            return grammars.json_object()
        param = "response_format.json_schema.schema"
        if self.json_schema is None or self.json_schema.schema_ is None:
            msg = f"{param} is missing; give one, or the type json_object"
            raise InvalidRequest(msg, param=param)
        schema = self.json_schema
        return grammars.json_schema(schema.schema_, strict=schema.strict, param=param)


class StructuredOutputs(Body):
    """Form of the answer, as vLLM has it; one of its fields is set."""

    prefix: ClassVar[str] = "structured_outputs."
    refused: ClassVar[Mapping[str, str]] = {
        "structural_tag": "use tools",
        "whitespace_pattern": "leave it out",
        "disable_any_whitespace": "leave it out",
        "disable_additional_properties": "say additionalProperties: false in the schema",
    }

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar_: str | None = Field(None, alias="grammar", description="GBNF, from the rule `root`.")
    json_object: bool = Field(False, description="Any JSON object.")

    @property
    def grammar(self) -> GrammarSpec:
        """What the answer must match.

        Raises:
            InvalidRequest: None of the fields is set or several are, or it is malformed.
        """
        given = {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar_,
            "json_object": self.json_object or None,
        }
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            msg = f"structured_outputs sets {', '.join(names) or 'nothing'}; set one field of it"
            raise InvalidRequest(msg, param="structured_outputs")
        param = f"structured_outputs.{names[0]}"
        if self.regex is not None:
            return grammars.regex(self.regex, param)
        if self.choice is not None:
            return grammars.choice(self.choice, param)
        if self.grammar_ is not None:
            return grammars.ebnf(self.grammar_, param)
        if self.json_object:
            return grammars.json_object(param)
        return grammars.json_schema(_parsed(self.json_, param), param=param)


def _parsed(schema: object, param: str) -> object:
    """Read a schema that is written as text.

    Raises:
        InvalidRequest: It is no JSON.
    """
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError):
        msg = f"{param} is no JSON; send the schema as an object"
        raise InvalidRequest(msg, param=param) from None


class FunctionDefinition(Body):
    """A function that the model may call."""

    prefix: ClassVar[str] = "tools.function."

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object.")
    strict: bool = Field(False, description="Refuse keywords that cannot be held.")


class Tool(Body):
    """A tool; functions are the only kind."""

    prefix: ClassVar[str] = "tools."

    type: Literal["function"]
    function: FunctionDefinition


class FunctionRef(Body):
    """The name of a function."""

    name: FunctionName


class NamedTool(Body):
    """The tool that must be called."""

    prefix: ClassVar[str] = "tool_choice."

    type: Literal["function"]
    function: FunctionRef


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Body):
    """What the model called, in the conversation so far."""

    name: str
    arguments: str = ""


class ToolCall(Body):
    """A call in the conversation so far."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Write it as chat templates read it: with the arguments as an object."""
        arguments: object = self.function.arguments
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            # The model wrote it; it is shown as it is.
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}
