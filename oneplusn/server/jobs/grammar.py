"""The job that proves a grammar: that it compiles, within limits, and allows any output at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from oneplusn.errors import InvalidRequest, WorkerFailed
from oneplusn.server.grammars import MAX_MEMORY_BYTES, MAX_SECONDS, Grammars, GrammarSpec

if TYPE_CHECKING:
    from oneplusn.server.engine.grammar import Compiler
    from oneplusn.server.messages import Ready
    from oneplusn.server.workers import Workers

NEEDS = ("oneplusn.server.engine.grammar", "xgrammar", "transformers")
SECONDS = MAX_SECONDS
MEMORY_BYTES = MAX_MEMORY_BYTES

# What the library says of a mistake, without the place in its own source that found it.
_COMPLAINT = re.compile(r"\[[\d:]+\] \S+:\d+: (?:Check failed: .*? is false: )?(.+)", re.DOTALL)
_MAX_COMPLAINT = 200


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A grammar and whom it is for.

    Attributes:
        spec: The grammar.
        folder: Of the tokenizer.
        vocab_size: Number of the model's logits.
        eos_ids: Tokens that end an output.
    """

    spec: GrammarSpec
    folder: str
    vocab_size: int
    eos_ids: tuple[int, ...]


class Proof(msgspec.Struct, frozen=True):
    """The grammar is sound; compiled, it takes so many bytes."""

    num_bytes: int


def grammars_for(workers: Workers, model: Ready, warm: Callable[[], None]) -> Grammars:
    """Prove the grammars of a model in workers; meanwhile `warm` has the engine get ready."""

    async def compile_once(spec: GrammarSpec) -> Proof:
        warm()
        request = Request(
            spec=spec, folder=model.folder, vocab_size=model.vocab_size, eos_ids=model.eos_ids
        )
        return await workers.run("grammar", request, Proof)

    return Grammars(compile_once)


def warm(request: Request) -> None:
    """Load the tokenizer, which takes longer than a grammar may."""
    _compiler(request.folder, request.vocab_size, request.eos_ids)


def run(request: Request) -> Proof:
    """Compile.

    Raises:
        InvalidRequest: It is malformed, or allows no output.
        WorkerFailed: It takes too much memory; the process is not to be used again.
    """
    compiler = _compiler(request.folder, request.vocab_size, request.eos_ids)
    spec = request.spec
    try:
        compiled = compiler.compile(spec)
        is_possible = compiled.is_possible(request.vocab_size)
    except RuntimeError as error:
        if "bad_alloc" in str(error):
            msg = f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"
            raise WorkerFailed(msg, code="worker_memory") from error
        raise InvalidRequest(_complaint(spec, str(error)), param=spec.param) from error
    if not is_possible:
        msg = f"{spec.param} allows no output at all"
        raise InvalidRequest(msg, param=spec.param)
    return Proof(compiled.grammar.memory_size_bytes)


@lru_cache(maxsize=1)
def _compiler(folder: str, vocab_size: int, eos_ids: tuple[int, ...]) -> Compiler:
    from oneplusn.server.engine.grammar import Compiler

    compiler = Compiler(Path(folder), vocab_size, eos_ids)
    compiler.load()
    return compiler


def _complaint(spec: GrammarSpec, text: str) -> str:
    """Say what is wrong with a grammar, without a word of the library's insides."""
    match = _COMPLAINT.match(text)
    reason = match[1].strip()[:_MAX_COMPLAINT] if match else "it cannot be read"
    return f"{spec.param} is malformed: {reason}"
