"""POST /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from fastapi import APIRouter
from pydantic import Field, JsonValue, model_validator

from oneplusn.errors import InvalidRequest
from oneplusn.server.inference import Inference
from oneplusn.server.routes.common import READS_BODY, ServerDep, fails
from oneplusn.server.schemas import Body, TokenIds
from oneplusn.server.schemas_openai import MAX_MESSAGES, Message
from oneplusn.server.web import JsonRoute

router = APIRouter(route_class=JsonRoute, tags=["tokens"])

_RESPONSES = {**READS_BODY, **fails(404)}


class TokenizeRequest(Body):
    """Body of `/tokenize`: a text, or a conversation for the model's chat template."""

    refused: ClassVar[Mapping[str, str]] = {
        "chat_template": "the model's own template is used",
        "continue_final_message": "send the text as prompt",
    }
    fixed: ClassVar[Mapping[str, JsonValue]] = {"add_generation_prompt": True}

    model: str | None = Field(None, description="The base model or a task; all have one tokenizer.")
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = Field(True, description="Of a prompt; a template writes its own.")
    return_token_strs: bool = Field(False, description="Also spell the tokens.")

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            msg = "give either prompt or messages"
            raise InvalidRequest(msg, code="missing_field", param="prompt")
        return self


class DetokenizeRequest(Body):
    """Body of `/detokenize`."""

    model: str | None = Field(None, description="The base model or a task; all have one tokenizer.")
    tokens: TokenIds


@router.post("/tokenize", responses=_RESPONSES)
async def tokenize(body: TokenizeRequest, server: ServerDep) -> dict[str, Any]:
    """Turn a text or a conversation into tokens, as a prompt would be."""
    inference = server.inference
    _check_model(inference, body.model)
    if body.prompt is not None:
        (tokens,) = await inference.encode(
            [body.prompt], param="prompt", add_special=body.add_special_tokens
        )
    else:
        messages = [message.for_template() for message in body.messages or []]
        tokens = await inference.encode_chat(messages)
    return {
        "count": len(tokens),
        "max_model_len": inference.model.max_model_len,
        "tokens": tokens,
        "token_strs": inference.tokenizer.pieces(tokens) if body.return_token_strs else None,
    }


@router.post("/detokenize", responses=_RESPONSES)
async def detokenize(body: DetokenizeRequest, server: ServerDep) -> dict[str, str]:
    """Turn tokens into text, special ones included."""
    inference = server.inference
    _check_model(inference, body.model)
    inference.check_tokens(body.tokens, "tokens")
    return {"prompt": await inference.decode(body.tokens)}


def _check_model(inference: Inference, model: str | None) -> None:
    if model is not None:
        inference.targets.resolve_alias(model)
