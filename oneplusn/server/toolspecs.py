"""What the tools of a request mean: for its prompt, for the answer, for who reads the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oneplusn.errors import InvalidRequest
from oneplusn.server import grammars
from oneplusn.server.grammars import GrammarSpec, JsonRules
from oneplusn.server.json_schemas import check_schema, without_lengths
from oneplusn.server.schemas_tools import NamedTool, Tool, ToolChoice
from oneplusn.server.toolcalls import FORMS, CallForm, ToolReader

MAX_TOOLS_BYTES = 256 << 10
# Text that is no call in the bare form: whatever does not begin with a brace.
_NO_BRACE = r"\s*([^{\s][\s\S]*)?"
_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How one request uses tools.

    Attributes:
        form: How calls are written.
        tools: Those that may be called.
        shown: As the chat template reads them.
        is_free: Whether the answer may be text.
        is_parallel: Whether there may be several calls.
    """

    form: CallForm
    tools: tuple[Tool, ...]
    shown: list[dict[str, Any]]
    is_free: bool
    is_parallel: bool

    def reader(self) -> ToolReader:
        """Start reading an answer."""
        return self.form.reader({tool.function.name for tool in self.tools})

    def grammar(self, answer: GrammarSpec | None) -> GrammarSpec:
        """Say what the answer must match: text or calls, or calls alone.

        Args:
            answer: What an answer must match that is no call; None = anything.

        Raises:
            InvalidRequest: A schema is refused, or there is too much of it.
        """
        schemas = {tool.function.name: _checked(tool) for tool in self.tools}
        bare = {name: without_lengths(schema) for name, schema in schemas.items()}
        tags = [self._tag(name, schema) for name, (schema, _) in bare.items()]
        calls = {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": self.form.separator,
            "at_least_one": True,
            "stop_after_first": not self.is_parallel,
        }
        rules = JsonRules(
            schema=answer.rules.schema if self.is_free and answer and answer.rules else None,
            tools={name: dict(schemas[name]) if has else {} for name, (_, has) in bare.items()},
            trigger=self.form.mark,
        )
        return grammars.structural(self._whole(calls, tags, answer), rules, "tools")

    def _whole(
        self, calls: dict[str, Any], tags: list[dict[str, Any]], answer: GrammarSpec | None
    ) -> dict[str, Any]:
        """Combine calls with what may stand in their place."""
        if not self.is_free:
            return calls
        if answer is not None:
            return {"type": "or", "elements": [_as_element(answer), calls]}
        if self.form.mark:
            return {
                "type": "triggered_tags",
                "triggers": [self.form.mark],
                "tags": tags,
                "stop_after_first": not self.is_parallel,
            }
        text = {"type": "regex", "pattern": _NO_BRACE}
        return {"type": "or", "elements": [calls, text]}

    def _tag(self, name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        content = {"type": "json_schema", "json_schema": dict(schema)}
        begin = self.form.opening(name)
        return {"type": "tag", "begin": begin, "content": content, "end": self.form.end}


def plan_tools(
    tools: Sequence[Tool],
    choice: ToolChoice | None,
    *,
    parallel: bool = True,
    form: str | None,
) -> ToolPlan | None:
    """Say how a request uses its tools; None = not at all.

    Args:
        tools: Its tools.
        choice: Its `tool_choice`; None = `auto` where there are tools.
        parallel: Its `parallel_tool_calls`.
        form: Name of the form in which the model writes calls; None = it writes none.

    Raises:
        InvalidRequest: The choice asks for what is not there, or the model cannot call tools.
    """
    if not tools:
        if choice in (None, "none", "auto"):
            return None
        msg = f"tool_choice is {_named(choice)!r} and there are no tools; send some"
        raise InvalidRequest(msg, param="tool_choice")
    if choice == "none":
        return None
    if form is None:
        msg = "this model's chat template knows no tools; --tool-parser says how it calls them"
        raise InvalidRequest(msg, param="tools")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        msg = f"tools holds two functions {twice!r}; give each its own name"
        raise InvalidRequest(msg, param="tools")
    shown = [tool.model_dump(exclude_none=True, exclude_unset=True) for tool in tools]
    if len(json.dumps(shown)) > MAX_TOOLS_BYTES:
        msg = f"tools has {len(json.dumps(shown))} bytes; at most {MAX_TOOLS_BYTES} are possible"
        raise InvalidRequest(msg, param="tools")
    chosen = tuple(tools)
    if isinstance(choice, NamedTool):
        chosen = tuple(tool for tool in tools if tool.function.name == choice.function.name)
        if not chosen:
            msg = f"tool_choice names {choice.function.name!r}; tools has {', '.join(names)[:500]}"
            raise InvalidRequest(msg, param="tool_choice")
    is_named = isinstance(choice, NamedTool)
    return ToolPlan(
        FORMS[form],
        chosen,
        shown,
        is_free=choice in (None, "auto"),
        is_parallel=parallel and not is_named,
    )


def _named(choice: ToolChoice | None) -> str | None:
    return choice.function.name if isinstance(choice, NamedTool) else choice


def _checked(tool: Tool) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments, which are an object.

    Raises:
        InvalidRequest: It is refused.
    """
    schema = tool.function.parameters
    if not schema:
        return _NO_PARAMETERS
    param = "tools.function.parameters"
    if schema.get("type", "object") != "object":
        msg = f"{param} of {tool.function.name!r} has the type {schema['type']!r}; it is an object"
        raise InvalidRequest(msg, param=param)
    checked = check_schema(schema, strict=tool.function.strict, param=param)
    says = checked.keys() & {"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
    return checked if says else {"type": "object", **checked}


def _as_element(spec: GrammarSpec) -> dict[str, Any]:
    """Write a grammar as a part of a structural tag."""
    match spec.kind:
        case "json_schema":
            return {"type": "json_schema", "json_schema": json.loads(spec.text)}
        case "regex":
            return {"type": "regex", "pattern": spec.text}
        case "ebnf":
            return {"type": "grammar", "grammar": spec.text}
        case "structural_tag":
            element: dict[str, Any] = json.loads(spec.text)["format"]
            return element
