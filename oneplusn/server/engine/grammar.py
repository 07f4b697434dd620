"""Grammars at work: what the next token of a sequence may be. Loads its library when told to.

A grammar is compiled on a thread of its own, where the library does not hold the interpreter's
lock; a sequence waits for it without holding up the others. Equal grammars are compiled once.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from oneplusn.errors import InvalidRequest
from oneplusn.server.engine.json_guard import Bits, JsonGuard, TokenTable
from oneplusn.server.grammars import GrammarSpec
from oneplusn.server.toolcalls import MARKS

if TYPE_CHECKING:
    import xgrammar

MAX_GRAMMARS = 64
MAX_BYTES = 256 << 20
# Rules that several grammars share are compiled once; so much of them is kept.
CACHE_BYTES = 64 << 20
# Processor time that the masks of one sequence may take: a start, and more with every token.
# A sound grammar takes a tenth of it.
SECONDS = 0.5
SECONDS_PER_TOKEN = 0.003


class GrammarFailed(Exception):
    """A grammar cannot go on; its sequence ends with this message."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar ready for use.

    Attributes:
        grammar: The library's form.
        spec: What it was made from.
        table: The vocabulary, where the output holds JSON.
    """

    grammar: xgrammar.CompiledGrammar
    spec: GrammarSpec
    table: TokenTable | None

    def matcher(self) -> xgrammar.GrammarMatcher:
        """Start an output."""
        import xgrammar

        return xgrammar.GrammarMatcher(self.grammar)

    def is_possible(self, vocab_size: int) -> bool:
        """Say whether there is a token that an output can begin with."""
        allowed = np.empty((1, -(-vocab_size // 32)), np.int32)
        self.matcher().fill_next_token_bitmask(allowed)
        return bool(allowed.any())


class Compiler:
    """Compiles grammars for one model. The first call loads the library and the tokenizer."""

    def __init__(self, folder: Path, vocab_size: int, eos_ids: Collection[int]) -> None:
        """Take the tokenizer's folder, the number of logits V, and the tokens that end an output.

        Raises:
            InvalidRequest: There are none of these, so no output could ever be complete.
        """
        if not eos_ids:
            msg = "this model has no end token, so nothing can be constrained on it"
            raise InvalidRequest(msg, param="response_format")
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)

    @cached_property
    def vocab(self) -> list[bytes]:
        """The text of every token [V]; empty where it has none."""
        return read_vocab(self._folder, self._vocab_size)

    @cached_property
    def table(self) -> TokenTable:
        """What the tokens do to JSON."""
        return TokenTable(self.vocab)

    @cached_property
    def compiler(self) -> xgrammar.GrammarCompiler:
        """The library's compiler for this vocabulary, on one thread."""
        import xgrammar

        info = xgrammar.TokenizerInfo(
            self.vocab, vocab_size=self._vocab_size, stop_token_ids=self._eos_ids
        )
        return xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)

    def load(self) -> None:
        """Load the library and the tokenizer now."""
        assert self.compiler is not None
        assert self.table is not None

    def compile(self, spec: GrammarSpec) -> Compiled:
        """Compile a grammar.

        Raises:
            RuntimeError: It is malformed, or there is not enough memory.
        """
        table = None if spec.rules is None else self.table
        return Compiled(self._compile(spec), spec, table)

    def _compile(self, spec: GrammarSpec) -> xgrammar.CompiledGrammar:
        match spec.kind:
            case "json_schema":
                return self.compiler.compile_json_schema(spec.text)
            case "regex":
                return self.compiler.compile_regex(spec.text)
            case "ebnf":
                return self.compiler.compile_grammar(spec.text)
            case "structural_tag":
                return self.compiler.compile_structural_tag(spec.text)


def read_vocab(folder: Path, vocab_size: int) -> list[bytes]:
    """Read the bytes of every token; special ones and those that are not there have none.

    A grammar about text can therefore never ask for a special token, whatever it spells; but for
    the marks of tool calls, which some tokenizers call special.
    """
    import xgrammar
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    # Any stop token: what the library reads is the text of the others.
    info = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocab_size, stop_token_ids=[0]
    )
    vocab = list(info.decoded_vocab)
    for index, token in backend.get_added_tokens_decoder().items():
        if token.special and index < vocab_size and token.content not in MARKS:
            vocab[index] = b""
    return vocab


class Matcher:
    """What one sequence may say next: its grammar, and where in it the output is.

    It reads the output itself, so it needs no word of tokens that are appended, and none when the
    sequence loses its blocks: that changes nothing in what it has said.

    Attributes:
        failure: Why the sequence cannot go on; None while it can.
    """

    def __init__(self, source: Future[Compiled], max_tokens: int) -> None:
        self.failure: str | None = None
        self._source = source
        self._max_tokens = max_tokens
        self._matcher: xgrammar.GrammarMatcher | None = None
        self._guard: JsonGuard | None = None
        self._num_read = 0
        self._seconds = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether `fill` can be called; a grammar that could not be compiled is ready to fail."""
        return self._source.done()

    @property
    def was_cut(self) -> bool:
        """Whether the output was brought to its end because its tokens ran out."""
        return self._guard is not None and self._guard.was_cut

    def fill(self, output: Sequence[int], allowed: Bits, *, banned: Collection[int] = ()) -> None:
        """Write which tokens may come next.

        Args:
            output: All tokens so far.
            allowed: Bits of int32 [V / 32 rounded up], overwritten; all set after a failure, which
                `failure` then tells.
            banned: Tokens to leave out if others remain.
        """
        began = time.thread_time()
        try:
            self._fill(output, allowed, banned)
        except GrammarFailed as error:
            self.failure = str(error)
        except Exception as error:
            # The library raises what it likes; none of it concerns other sequences.
            self.failure = f"the grammar failed: {type(error).__name__}"
        self._seconds += time.thread_time() - began
        if self._seconds > SECONDS + SECONDS_PER_TOKEN * len(output):
            self.failure = "the grammar takes too much time at every token; make it simpler"
        if self.failure is not None:
            allowed.fill(-1)

    def _fill(self, output: Sequence[int], allowed: Bits, banned: Collection[int]) -> None:
        compiled = self._source.result()
        if self._matcher is None:
            self._begin(compiled)
        assert self._matcher is not None
        for token in output[self._num_read :]:
            if not self._matcher.accept_token(token):
                raise GrammarFailed("the output left its grammar; this is a fault of the server")
            if self._guard is not None:
                self._guard.feed(token)
        self._num_read = len(output)
        self._matcher.fill_next_token_bitmask(allowed[None])
        if not allowed.any():
            raise GrammarFailed("the grammar leads to where no text can follow")
        if self._guard is not None:
            self._guard.narrow(allowed, num_left=self._max_tokens - len(output))
        _leave_out(allowed, banned)

    def _begin(self, compiled: Compiled) -> None:
        self._matcher = compiled.matcher()
        if compiled.spec.rules is not None and compiled.table is not None:
            self._guard = JsonGuard(compiled.spec.rules, compiled.table, self._max_tokens)


class GrammarStore:
    """The grammars of one engine: compiled on a thread, the latest kept. Lives on its thread."""

    def __init__(self, folder: Path, vocab_size: int, eos_ids: Collection[int]) -> None:
        """Take what a `Compiler` takes; nothing is loaded before `warm` or the first grammar."""
        self._compiler_args = (folder, vocab_size, eos_ids)
        self._known: OrderedDict[str, Future[Compiled]] = OrderedDict()

    @cached_property
    def _compiler(self) -> Compiler:
        return Compiler(*self._compiler_args)

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="grammar")

    def warm(self) -> None:
        """Begin to load what the first grammar needs; for a model that can take any."""
        _, _, eos_ids = self._compiler_args
        if eos_ids:
            # What fails here fails again for the first grammar, which says so.
            self._thread.submit(self._compiler.load)

    def open(self, source: str, max_tokens: int) -> Matcher:
        """Start a grammar for an output of at most `max_tokens`; equal sources are compiled once.

        Raises:
            InvalidRequest: The model has no end token.
        """
        compiled = self._known.get(source)
        if compiled is None:
            spec = GrammarSpec.decode(source)
            compiled = self._known[source] = self._thread.submit(self._compiler.compile, spec)
        self._known.move_to_end(source)
        self._trim()
        return Matcher(compiled, max_tokens)

    def wait(self, seconds: float) -> None:
        """Block while grammars are being compiled, until one is ready or for so long."""
        pending = [compiled for compiled in self._known.values() if not compiled.done()]
        if pending:
            wait(pending, seconds, FIRST_COMPLETED)

    def close(self) -> None:
        """End the thread; what has begun is finished first."""
        if "_thread" in self.__dict__:
            self._thread.shutdown(cancel_futures=True)

    def _trim(self) -> None:
        """Forget the oldest grammars beyond the limits; sequences keep those that they use."""
        sizes = [_num_bytes(compiled) for compiled in self._known.values()]
        while len(sizes) > MAX_GRAMMARS or (len(sizes) > 1 and sum(sizes) > MAX_BYTES):
            self._known.popitem(last=False)
            del sizes[0]


def _num_bytes(compiled: Future[Compiled]) -> int:
    if not compiled.done() or compiled.cancelled() or compiled.exception() is not None:
        return 0
    return compiled.result().grammar.memory_size_bytes


def _leave_out(allowed: Bits, banned: Collection[int]) -> None:
    """Clear the bits of banned tokens, unless nothing would remain."""
    if not banned:
        return
    rest = allowed.copy()
    view = rest.view(np.uint32)
    for token in banned:
        view[token // 32] &= ~np.uint32(1 << token % 32)
    if rest.any():
        allowed[:] = rest
