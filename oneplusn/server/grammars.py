"""What an answer must look like: from the fields of a request to a grammar, proven before use.

A `GrammarSpec` is the source of a grammar. It is compiled twice: by a worker, which proves that it
can be, within the limits of a job, and then by the engine, from the same source and with the same
library. The compiled form does not travel: written out, its size grows with the square of the
source's, to hundreds of megabytes for a hundred tools. Knows neither torch nor pydantic.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from oneplusn.errors import InvalidRequest, OneplusnError, WorkerFailed
from oneplusn.server.json_schemas import MAX_ENUM_VALUES, check_schema, without_lengths

MAX_SPEC_BYTES = 512 << 10
MAX_PATTERN_BYTES = 16 << 10
MAX_REMEMBERED = 1024
# What compiling one may take of a worker.
MAX_SECONDS = 1.0
MAX_MEMORY_BYTES = 256 << 20
TOO_COMPLEX = "grammar_too_complex"


Kind = Literal["json_schema", "regex", "ebnf", "structural_tag"]


class JsonRules(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the engine holds of JSON in an output beside the grammar: that it ends, and lengths.

    Attributes:
        schema: What all of it matches, with lengths of strings; None = there are none to count.
        tools: The same for the arguments of each tool by its name, where calls are made.
        trigger: Text after which JSON begins; empty = it is JSON from its beginning.
    """

    schema: dict[str, Any] | None = None
    tools: dict[str, dict[str, Any]] = {}
    trigger: str = ""


class GrammarSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """The source of a grammar.

    Attributes:
        kind: Language of the text.
        text: The source, as the library takes it.
        rules: How JSON in the output is held, if there is any.
        param: Field of the request that it came from.
    """

    kind: Kind
    text: str
    rules: JsonRules | None = None
    param: str = "response_format"

    def encode(self) -> str:
        """Write it as text; equal texts are equal grammars."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> GrammarSpec:
        """Read what `encode` wrote."""
        return msgspec.json.decode(text, type=cls)


def json_object(param: str = "response_format") -> GrammarSpec:
    """Any JSON object."""
    free = {"type": "object", "additionalProperties": True}
    return GrammarSpec("json_schema", json.dumps(free), JsonRules(), param)


def json_schema(schema: object, *, strict: bool = False, param: str) -> GrammarSpec:
    """JSON that matches a schema.

    Raises:
        InvalidRequest: The schema is malformed, too large, or reaches outside.
    """
    checked = check_schema(schema, strict=strict, param=param)
    bare, has_lengths = without_lengths(checked)
    rules = JsonRules(dict(checked)) if has_lengths else JsonRules()
    return GrammarSpec("json_schema", json.dumps(bare), rules, param)


def regex(pattern: str, param: str) -> GrammarSpec:
    """Text that matches a regular expression from end to end.

    Raises:
        InvalidRequest: It is too long.
    """
    return GrammarSpec("regex", _checked_text(pattern, param), None, param)


def ebnf(text: str, param: str) -> GrammarSpec:
    """Text of a grammar in GBNF, whose first rule is `root`.

    Raises:
        InvalidRequest: It is too long.
    """
    return GrammarSpec("ebnf", _checked_text(text, param), None, param)


def choice(texts: Sequence[str], param: str) -> GrammarSpec:
    """One of some texts.

    Raises:
        InvalidRequest: There are none or too many of them, or one is empty.
    """
    if not 1 <= len(texts) <= MAX_ENUM_VALUES:
        msg = f"{param} has {len(texts)} texts; it takes 1 to {MAX_ENUM_VALUES}"
        raise InvalidRequest(msg, param=param)
    if "" in texts:
        msg = f"{param} holds an empty text; leave it out"
        raise InvalidRequest(msg, param=param)
    elements = [{"type": "const_string", "value": text} for text in dict.fromkeys(texts)]
    return structural({"type": "or", "elements": elements}, None, param)


def structural(format_: Mapping[str, Any], rules: JsonRules | None, param: str) -> GrammarSpec:
    """Combine grammars as a structural tag does.

    Raises:
        InvalidRequest: It is too long.
    """
    text = json.dumps({"type": "structural_tag", "format": format_})
    spec = GrammarSpec("structural_tag", text, rules, param)
    if len(spec.encode()) > MAX_SPEC_BYTES:
        msg = f"{param} makes a grammar of {len(spec.encode())} bytes; {MAX_SPEC_BYTES} is the most"
        raise InvalidRequest(msg, code=TOO_COMPLEX, param=param)
    return spec


def _checked_text(text: str, param: str) -> str:
    size = len(text.encode(errors="replace"))
    if not 1 <= size <= MAX_PATTERN_BYTES:
        msg = f"{param} has {size} bytes; it takes 1 to {MAX_PATTERN_BYTES}"
        raise InvalidRequest(msg, code=TOO_COMPLEX if size else None, param=param)
    return text


class Grammars:
    """Proves grammars, each once. Lives on the event loop.

    It remembers verdicts, of the last `MAX_REMEMBERED` grammars: that one is sound, or why not. A
    stream of new ones costs the worker's time and nothing else, and the worker refuses when too
    many wait.
    """

    def __init__(self, compile_once: Callable[[GrammarSpec], Awaitable[object]]) -> None:
        """Take what compiles a grammar, and raises if it cannot be done within the limits."""
        self._compile_once = compile_once
        self._verdicts: OrderedDict[bytes, asyncio.Future[OneplusnError | None]] = OrderedDict()

    async def prove(self, spec: GrammarSpec) -> str:
        """Return a grammar as the engine takes it, once it is known to compile.

        Raises:
            InvalidRequest: It is malformed, takes too much, or breaks the worker.
            QueueFull: Too many grammars wait for the worker.
            WorkerFailed: There is no worker, and none could be started.
        """
        text = spec.encode()
        key = hashlib.sha256(text.encode()).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            verdict = self._verdicts[key] = asyncio.ensure_future(self._judge(spec))
            verdict.add_done_callback(lambda done: self._forget_unless_final(key, done))
            while len(self._verdicts) > MAX_REMEMBERED:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        # A caller that goes away leaves the verdict to those that wait with it.
        error = await asyncio.shield(verdict)
        if error is not None:
            raise type(error)(error.message, code=error.code, param=error.param)
        return text

    async def _judge(self, spec: GrammarSpec) -> OneplusnError | None:
        """Compile; a verdict is about the grammar, any other error about the moment."""
        try:
            await self._compile_once(spec)
        except InvalidRequest as error:
            return error
        except WorkerFailed as error:
            limits = f"{MAX_SECONDS:g} s or {MAX_MEMORY_BYTES >> 20} MiB"
            match error.code:
                case "worker_timeout" | "worker_memory":
                    msg = f"{spec.param} takes more than {limits} to compile; make it simpler"
                    return InvalidRequest(msg, code=TOO_COMPLEX, param=spec.param)
                case "worker_failed" | "worker_crashed":
                    # No verdict for ever: the system may have ended the process by itself.
                    msg = f"{spec.param} broke the process that compiles it; make it simpler"
                    raise InvalidRequest(msg, code=TOO_COMPLEX, param=spec.param) from None
                case _:
                    raise
        return None

    def _forget_unless_final(self, key: bytes, done: asyncio.Future[OneplusnError | None]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._verdicts.get(key) is done:
            del self._verdicts[key]
