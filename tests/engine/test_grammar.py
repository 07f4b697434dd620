"""Answers of an engine that must match a grammar, in mixed batches."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

import oneplusn.server.engine.grammar as module
from grammar_models import EOS, SPECIAL, VOCAB, grammar_engine, write_tokenizer
from oneplusn.errors import InvalidRequest
from oneplusn.server import grammars
from oneplusn.server.engine.engine import Engine
from oneplusn.server.engine.grammar import (
    Compiled,
    Compiler,
    GrammarStore,
    Matcher,
    read_vocab,
)
from oneplusn.server.grammars import GrammarSpec
from oneplusn.server.messages import Sampling, Submit, TokenOutput
from oneplusn.server.text import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 6},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
PAT = {
    "type": "object",
    "properties": {"p": {"type": "string", "pattern": "^[ab]+$", "minLength": 2, "maxLength": 4}},
    "required": ["p"],
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["kids"],
        }
    },
    "$ref": "#/$defs/node",
}


def is_person(text: str) -> None:
    person = json.loads(text)
    assert person.keys() == {"name", "age", "tags", "kind"}
    assert 2 <= len(person["name"]) <= 6
    assert isinstance(person["age"], int)
    assert len(person["tags"]) <= 2
    assert all(len(tag) <= 3 for tag in person["tags"])
    assert person["kind"] in ("cat", "dog")


def is_tree(text: str) -> None:
    def check(node: object) -> None:
        assert isinstance(node, dict)
        assert node.keys() == {"kids"}
        for kid in node["kids"]:
            check(kid)

    check(json.loads(text))


def is_object(text: str) -> None:
    assert isinstance(json.loads(text), dict)


def matches(pattern: str):
    def check(text: str) -> None:
        assert re.fullmatch(pattern, text), text

    return check


KINDS = {
    "schema": (grammars.json_schema(PERSON, param="p"), is_person),
    "pattern": (grammars.json_schema(PAT, param="p"), matches(r'\{ *"p" *: *"[ab]{2,4}" *\}')),
    "recursive": (grammars.json_schema(TREE, param="p"), is_tree),
    "object": (grammars.json_object(), is_object),
    "regex": (grammars.regex("[a-c]{2}-[0-9]+x", "p"), matches("[a-c]{2}-[0-9]+x")),
    "choice": (grammars.choice(["yes", 'no "way"'], "p"), matches('yes|no "way"')),
    "ebnf": (grammars.ebnf('root ::= "a" root "b" | "-"', "p"), matches("a*-b*")),
}


@dataclass
class Answer:
    outputs: list[TokenOutput]

    @property
    def tokens(self) -> list[int]:
        return [output.token for output in self.outputs if output.token is not None]

    @property
    def finish(self) -> str | None:
        return self.outputs[-1].finish

    def text(self, tokenizer: Tokenizer) -> str:
        return tokenizer.decode(self.tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("grammar"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[Engine]:
    engine = grammar_engine(folder)
    yield engine
    engine.close()


def request(index: int, spec: GrammarSpec | None = None, **sampling) -> Submit:
    options = {"max_tokens": 120, "temperature": 0.8 * (index % 2), "seed": index} | sampling
    text = None if spec is None else spec.encode()
    return Submit(str(index), [5 + index, 9, 7], (), Sampling(**options), grammar=text)


def run(engine: Engine, requests: Sequence[Submit]) -> list[Answer]:
    answers = {request.id: Answer([]) for request in requests}
    for message in requests:
        engine.submit(message)
    while engine.has_work:
        for output in engine.step().outputs:
            answers[output.id].outputs.append(output)
    engine.scheduler.check_integrity()
    return [answers[message.id] for message in requests]


class TestAnswers:
    def test_each_matches_its_grammar_in_one_batch_with_free_ones(self, engine, tokenizer) -> None:
        constrained = [
            request(index, spec)
            for index, (spec, _) in enumerate(KINDS.values(), start=1)
            for index in (index, index + 20)
        ]
        free = [request(index, repetition_penalty=1.1) for index in (50, 51, 52)]

        answers = run(engine, [*constrained, *free])

        checks = [check for _, check in KINDS.values() for _ in range(2)]
        for check, answer in zip(checks, answers, strict=False):
            check(answer.text(tokenizer))
            assert answer.tokens[-1] == EOS or answer.finish == "length"
        alone = [run(engine, [message])[0] for message in free]
        assert [answer.tokens for answer in answers[-3:]] == [answer.tokens for answer in alone]

    @pytest.mark.parametrize(
        "options",
        [
            {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5},
            {"temperature": 1.5, "top_k": 3},
            {"temperature": 1.5, "top_p": 0.5, "min_p": 0.1},
            {"logit_bias": {EOS: 100.0, 30: 50.0}},
            {"min_tokens": 100},
            {"ignore_eos": True},
            {"stop_token_ids": (60,)},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_each_parameter_works_beside_a_grammar(self, engine, tokenizer, options) -> None:
        spec, _ = KINDS["regex"]
        (answer,) = run(engine, [request(1, spec, **options)])
        assert answer.finish == "stop"
        assert re.fullmatch("[a-c]{2}-[0-9]+x", answer.text(tokenizer))

    def test_min_tokens_keeps_off_the_end_while_something_else_may_come(
        self, engine, tokenizer
    ) -> None:
        spec = grammars.regex("a+", "p")
        (answer,) = run(engine, [request(1, spec, min_tokens=30, logit_bias={EOS: 100.0})])
        assert len(answer.text(tokenizer)) == 30

    def test_a_stop_token_ends_an_answer_when_the_grammar_allows_it(
        self, engine, tokenizer
    ) -> None:
        spec = grammars.regex("abc", "p")
        stop = tokenizer.backend.token_to_id("b")
        (answer,) = run(engine, [request(1, spec, stop_token_ids=(stop,))])
        assert answer.text(tokenizer) == "ab"
        assert answer.finish == "stop"

    def test_log_probabilities_are_those_of_the_raw_logits(self, engine) -> None:
        free = request(1, logprobs=5, temperature=0.0)
        bound = request(1, grammars.regex("[a-z]{3}", "p"), logprobs=5, temperature=0.0)
        (first,) = run(engine, [free])
        (second,) = run(engine, [bound])
        assert first.outputs[0].top == second.outputs[0].top

    def test_special_tokens_never_come(self, engine, tokenizer) -> None:
        bias = {index: 100.0 for index, text in enumerate(SPECIAL) if text != "<end>"}
        spec = grammars.regex("[a-z<>]{20}", "p")
        (answer,) = run(engine, [request(1, spec, logit_bias=bias)])
        assert not set(answer.tokens) & bias.keys()

    def test_an_answer_that_runs_out_of_tokens_is_closed_and_says_so(
        self, engine, tokenizer
    ) -> None:
        schema = {
            "type": "object",
            "properties": {"a": {"type": "array", "items": {"type": "string"}}},
            "required": ["a"],
        }
        # Nothing but letters, if the model had its way.
        bias = {tokenizer.backend.token_to_id(char): 50.0 for char in "abcdef"}
        spec = grammars.json_schema(schema, param="p")
        (answer,) = run(engine, [request(2, spec, max_tokens=60, logit_bias=bias)])
        assert json.loads(answer.text(tokenizer))["a"]
        assert answer.finish == "length"
        assert answer.outputs[-1].token is None
        assert len(answer.tokens) < 60

    def test_preemption_changes_nothing(self, engine, folder) -> None:
        spec, _ = KINDS["schema"]
        requests = [request(index, spec if index % 2 else None) for index in range(1, 9)]
        calm = run(engine, requests)
        # Blocks for about four of the eight.
        small = grammar_engine(folder, kv_memory=96 * 1024)
        lost = []
        preempt = small.scheduler._preempt_youngest
        small.scheduler._preempt_youngest = lambda: lost.append(preempt()) or lost[-1]
        tight = run(small, requests)
        small.close()
        assert any(seq.grammar is not None and seq.output for seq in lost)
        assert [answer.tokens for answer in tight] == [answer.tokens for answer in calm]

    def test_prefixes_are_shared_with_free_requests(self, engine) -> None:
        spec, _ = KINDS["choice"]
        prompt = [7] * 64
        run(engine, [replace_prompt(request(1), prompt)])
        (answer,) = run(engine, [replace_prompt(request(1, spec), prompt)])
        assert answer.outputs[0].cached_tokens >= 48


def replace_prompt(message: Submit, prompt: list[int]) -> Submit:
    return Submit(message.id, prompt, (), message.sampling, grammar=message.grammar)


class TestFailures:
    def test_a_slow_grammar_ends_its_own_sequence_only(self, engine, monkeypatch) -> None:
        monkeypatch.setattr(module, "SECONDS", -1.0)
        bound, free = run(engine, [request(1, KINDS["object"][0]), request(2)])
        assert bound.finish == "error"
        assert "too much time" in (bound.outputs[-1].error or "")
        assert free.finish in ("stop", "length")

    def test_what_does_not_compile_ends_its_own_sequence_only(self, engine) -> None:
        broken = GrammarSpec("regex", "(a")
        bound, free = run(engine, [request(1, broken), request(2)])
        assert bound.finish == "error"
        assert bound.tokens == []
        assert free.finish in ("stop", "length")

    def test_a_dead_end_is_an_error(self, engine) -> None:
        spec = GrammarSpec("ebnf", 'root ::= "a" b\nb ::= "c" b')
        (answer,) = run(engine, [request(1, spec, max_tokens=20)])
        assert answer.finish in ("length", "error")
        endless = GrammarSpec("json_schema", json.dumps({"$ref": "#"}))
        (answer,) = run(engine, [request(1, endless)])
        assert answer.outputs[-1].error == "the grammar leads to where no text can follow"

    def test_a_model_without_an_end_token_takes_no_grammar(self, folder) -> None:
        store = GrammarStore(folder, VOCAB, ())
        with pytest.raises(InvalidRequest, match="no end token"):
            store.open(KINDS["object"][0].encode(), 10)


class TestStore:
    def test_a_sequence_waits_for_its_grammar_and_blocks_nobody(self, engine, monkeypatch) -> None:
        spec = grammars.regex("wait", "p")
        begun, go_on = threading.Event(), threading.Event()
        compile_now = Compiler.compile

        def compile_later(self: Compiler, spec: GrammarSpec) -> Compiled:
            begun.set()
            assert go_on.wait(10)
            return compile_now(self, spec)

        monkeypatch.setattr(Compiler, "compile", compile_later)
        engine.submit(request(1, spec))
        engine.submit(request(2, max_tokens=5))
        assert begun.wait(10)
        seen = []
        while not any(output.finish for output in seen):
            seen += engine.step().outputs
        assert {output.id for output in seen} == {"2"}
        assert engine.has_work
        assert engine.step().outputs == []

        go_on.set()
        while engine.has_work:
            seen += engine.step().outputs
        assert [output.finish for output in seen if output.id == "1"][-1] == "stop"

    def test_equal_grammars_are_compiled_once_and_the_latest_kept(
        self, folder, monkeypatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_GRAMMARS", 2)
        store = GrammarStore(folder, VOCAB, {EOS})
        compiled = []
        monkeypatch.setattr(Compiler, "compile", lambda self, spec: compiled.append(spec.text))
        monkeypatch.setattr(module, "_num_bytes", lambda future: 1)

        for text in ("a", "b", "a", "c", "a", "b"):
            store.open(grammars.regex(text, "p").encode(), 10)
            store.wait(10)
        store.close()

        assert compiled == ["a", "b", "c", "b"]

    def test_what_is_warm_need_not_be_loaded_for_the_first_grammar(
        self, folder, monkeypatch
    ) -> None:
        store = GrammarStore(folder, VOCAB, {EOS})
        loaded = []
        read_now = module.read_vocab

        def read(folder: Path, vocab_size: int) -> list[bytes]:
            loaded.append(threading.current_thread())
            return read_now(folder, vocab_size)

        monkeypatch.setattr(module, "read_vocab", read)
        store.warm()
        store.warm()
        matcher = store.open(grammars.regex("ab", "p").encode(), 10)
        store.wait(10)
        store.close()
        assert matcher.is_ready
        assert len(loaded) == 1
        assert loaded[0] is not threading.current_thread()

    def test_for_a_model_without_an_end_token_there_is_nothing_to_warm(self, folder) -> None:
        store = GrammarStore(folder, VOCAB, ())
        store.warm()
        store.close()

    def test_large_grammars_make_room(self, folder, monkeypatch) -> None:
        monkeypatch.setattr(module, "MAX_BYTES", 10)
        monkeypatch.setattr(module, "_num_bytes", lambda future: 6)
        store = GrammarStore(folder, VOCAB, {EOS})
        compiled = []
        monkeypatch.setattr(Compiler, "compile", lambda self, spec: compiled.append(spec.text))
        for text in ("a", "b", "a"):
            store.open(grammars.regex(text, "p").encode(), 10)
            store.wait(10)
        store.close()
        assert compiled == ["a", "b", "a"]


@pytest.fixture(scope="module")
def compiler(folder) -> Compiler:
    return Compiler(folder, VOCAB, {EOS})


class TestMatcher:
    def matcher(self, compiler: Compiler, spec: GrammarSpec) -> Matcher:
        source: Future[Compiled] = Future()
        source.set_result(compiler.compile(spec))
        return Matcher(source, 100)

    def test_it_catches_up_with_whatever_was_said(self, compiler, tokenizer) -> None:
        """One that reads an output at once allows the same as one that read it token by token."""
        spec, _ = KINDS["schema"]
        text = '{"name": "abc", "age": 12, "tags": ["ab"], "kind": "dog"}'
        tokens = tokenizer.encode(text, add_special=False)
        step_by_step, at_once = self.matcher(compiler, spec), self.matcher(compiler, spec)
        one, other = (np.zeros(-(-VOCAB // 32), np.int32) for _ in range(2))
        for end in range(len(tokens) + 1):
            step_by_step.fill(tokens[:end], one)
        at_once.fill(tokens, other)
        assert step_by_step.failure is None
        assert np.array_equal(one, other)
        assert one[EOS // 32] == 1 << EOS

    def test_banned_tokens_are_left_out_unless_nothing_else_remains(self, compiler) -> None:
        allowed = np.zeros(-(-VOCAB // 32), np.int32)
        matcher = self.matcher(compiler, grammars.regex("a?", "p"))
        matcher.fill([], allowed, banned=[EOS])
        assert not allowed[0] & (1 << EOS)
        assert allowed.any()
        matcher = self.matcher(compiler, grammars.regex("a?", "p"))
        everything = range(VOCAB)
        matcher.fill([], allowed, banned=everything)
        assert allowed[0] & (1 << EOS)


class TestVocab:
    def test_special_tokens_have_no_text(self, compiler) -> None:
        vocab = compiler.vocab
        assert vocab[: len(SPECIAL)] == [b""] * len(SPECIAL)
        assert vocab[len(SPECIAL) :][:4] == [b" ", b"!", b'"', b"#"]
        assert len(vocab) == VOCAB

    @pytest.mark.parametrize("vocab_size", [4, 7, 9])
    def test_byte_tokens_and_spaces_are_bytes(self, tmp_path, vocab_size) -> None:
        pieces = {"<unk>": 0, "<0x0A>": 1, "<0xE2>": 2, "▁": 3, "▁the": 4, "é": 5}
        bpe = models.BPE(pieces, [], byte_fallback=True, unk_token="<unk>")
        backend = tokenizers.Tokenizer(bpe)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        backend.add_special_tokens(["<unk>", "<tool_call>"])
        backend.save(str(tmp_path / "tokenizer.json"))

        vocab = read_vocab(tmp_path, vocab_size)

        # The mark of a call stays text, though it is special here.
        whole = [b"", b"\n", b"\xe2", b" ", b" the", "é".encode(), b"<tool_call>", b"", b""]
        assert vocab == whole[:vocab_size]
