"""Answers that may call tools, in the shapes that OpenAI's clients read."""

from __future__ import annotations

from functools import partial
from typing import Any

from oneplusn.errors import InvalidRequest
from oneplusn.server.grammars import TOO_COMPLEX
from oneplusn.server.offload import offload
from oneplusn.server.schemas_openai import ChatRequest
from oneplusn.server.state import Server
from oneplusn.server.toolcalls import Arguments, Begun, Event, Text, ToolAnswer, guess_form
from oneplusn.server.toolspecs import ToolPlan, plan_tools


async def tool_plan(server: Server, body: ChatRequest) -> ToolPlan | None:
    """Say how a request uses tools; None = not at all.

    Raises:
        InvalidRequest: It asks for what is not there, or the model cannot call tools.
    """
    template = server.inference.tokenizer.chat_template
    form = server.settings.tool_parser or guess_form(template)
    work = partial(
        plan_tools,
        body.tools,
        body.tool_choice,
        parallel=body.parallel_tool_calls,
        form=form,
    )
    return await offload(work, body.tools)


async def prove_grammar(server: Server, body: ChatRequest, plan: ToolPlan | None) -> str | None:
    """Return what the answer must match, as the engine takes it; None = anything.

    Where a call is only possible and the tools make too large a grammar, calls are read as the
    model writes them.

    Raises:
        InvalidRequest: The grammar is malformed or takes too much.
        QueueFull, WorkerFailed: It cannot be proven now.
    """
    answer = await offload(lambda: body.grammar, body.response_format, body.structured_outputs)
    if plan is None:
        spec = answer
    else:
        spec = await offload(partial(plan.grammar, answer), plan.shown)
    if spec is None:
        return None
    try:
        return await server.grammars.prove(spec)
    except InvalidRequest as error:
        is_optional = plan is not None and plan.is_free and answer is None
        if error.code == TOO_COMPLEX and is_optional:
            return None
        raise


def with_marks(server: Server, body: ChatRequest, plan: ToolPlan | None) -> ChatRequest:
    """Keep special tokens in the text where they are what marks calls."""
    tokenizer = server.inference.tokenizer
    token = None if plan is None else tokenizer.backend.token_to_id(plan.form.mark)
    if token is None or not tokenizer.is_special(token):
        return body
    return body.model_copy(update={"skip_special_tokens": False})


def message(plan: ToolPlan | None, text: str) -> dict[str, Any]:
    """Write a whole answer."""
    if plan is None:
        return {"role": "assistant", "content": text, "refusal": None}
    answer = ToolAnswer()
    reader = plan.reader()
    answer.take(reader.push(text))
    answer.take(reader.finish())
    content = answer.text or (None if answer.calls else "")
    calls = {"tool_calls": answer.calls} if answer.calls else {}
    return {"role": "assistant", "content": content, "refusal": None, **calls}


def finish_reason(reason: str | None, *, has_calls: bool) -> str | None:
    """Name the end of an answer as OpenAI does: one that calls tools waits for their results."""
    return "tool_calls" if reason == "stop" and has_calls else reason


class AnswerStream:
    """One answer as the deltas of a stream.

    Attributes:
        has_calls: Whether a tool has been called.
    """

    def __init__(self, plan: ToolPlan | None) -> None:
        self.has_calls = False
        self._reader = None if plan is None else plan.reader()

    def push(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """Take a piece of text; return what is to be sent of it."""
        if self._reader is None:
            return [{"content": text}] if text else []
        events = self._reader.push(text) + (self._reader.finish() if is_last else [])
        return [self._delta(event) for event in events]

    def _delta(self, event: Event) -> dict[str, Any]:
        match event:
            case Text(text):
                return {"content": text}
            case Begun(index, call_id, name):
                self.has_calls = True
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
            case Arguments(index, text):
                call = {"index": index, "function": {"arguments": text}}
        return {"tool_calls": [call]}
