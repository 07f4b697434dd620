from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from oneplusn.errors import InvalidRequest, QueueFull, WorkerFailed
from oneplusn.server import grammars
from oneplusn.server.grammars import MAX_PATTERN_BYTES, Grammars, GrammarSpec, JsonRules
from oneplusn.server.jobs import grammar as job
from oneplusn.server.schemas_openai import ChatRequest
from scripted_engine import ready_message

SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}}
BARE = {"type": "object", "properties": {"a": {"type": "string"}}}


def request(**fields) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return ChatRequest.model_validate(body)


def said(**fields) -> GrammarSpec | None:
    return request(**fields).grammar


def schema_format(schema: object = SCHEMA, **more) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


class TestFields:
    def test_free_text_needs_no_grammar(self) -> None:
        assert said() is None
        assert said(response_format=None, structured_outputs=None) is None
        assert said(response_format={"type": "text"}) is None

    @pytest.mark.parametrize(
        ("fields", "kind", "text", "param"),
        [
            (
                {"response_format": {"type": "json_object"}},
                "json_schema",
                {"type": "object", "additionalProperties": True},
                "response_format",
            ),
            (
                {"response_format": schema_format()},
                "json_schema",
                BARE,
                "response_format.json_schema.schema",
            ),
            (
                {"structured_outputs": {"json": SCHEMA}},
                "json_schema",
                BARE,
                "structured_outputs.json",
            ),
            (
                {"structured_outputs": {"json": json.dumps(SCHEMA)}},
                "json_schema",
                BARE,
                "structured_outputs.json",
            ),
            (
                {"structured_outputs": {"choice": ["a", "b", "a"]}},
                "structural_tag",
                {
                    "type": "structural_tag",
                    "format": {
                        "type": "or",
                        "elements": [
                            {"type": "const_string", "value": "a"},
                            {"type": "const_string", "value": "b"},
                        ],
                    },
                },
                "structured_outputs.choice",
            ),
            (
                {"structured_outputs": {"json_object": True, "regex": None}},
                "json_schema",
                {"type": "object", "additionalProperties": True},
                "structured_outputs.json_object",
            ),
        ],
    )
    def test_fields_become_grammars(self, fields, kind, text, param) -> None:
        spec = said(**fields)
        assert spec is not None
        assert (spec.kind, json.loads(spec.text), spec.param) == (kind, text, param)

    def test_patterns_and_grammars_go_as_they_are(self) -> None:
        pattern = said(structured_outputs={"regex": "a|b"})
        assert pattern == GrammarSpec("regex", "a|b", None, "structured_outputs.regex")
        text = said(structured_outputs={"grammar": 'root ::= "a"'})
        assert text == GrammarSpec("ebnf", 'root ::= "a"', None, "structured_outputs.grammar")

    def test_lengths_of_strings_go_to_the_engine_beside_the_grammar(self) -> None:
        spec = said(response_format=schema_format())
        assert spec is not None
        assert spec.rules == JsonRules(SCHEMA)
        bare = said(response_format=schema_format(BARE))
        assert bare is not None
        assert bare.rules == JsonRules()

    def test_what_is_written_is_read_the_same(self) -> None:
        for fields in (
            {"response_format": schema_format()},
            {"structured_outputs": {"regex": "é"}},
        ):
            spec = said(**fields)
            assert spec is not None
            assert GrammarSpec.decode(spec.encode()) == spec

    @pytest.mark.parametrize(
        ("fields", "param", "message"),
        [
            (
                {"response_format": {"type": "json_schema"}},
                "response_format.json_schema.schema",
                "is missing",
            ),
            (
                {"response_format": schema_format({"$ref": "http://x"})},
                "response_format.json_schema.schema",
                "nothing is fetched",
            ),
            (
                {"response_format": schema_format({"not": {}}, strict=True)},
                "response_format.json_schema.schema",
                "cannot be held",
            ),
            ({"structured_outputs": {}}, "structured_outputs", "sets nothing"),
            (
                {"structured_outputs": {"regex": "a", "choice": ["a"]}},
                "structured_outputs",
                "sets regex, choice; set one",
            ),
            ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "has 0 texts"),
            (
                {"structured_outputs": {"choice": ["x"] * 1001}},
                "structured_outputs.choice",
                "has 1001 texts",
            ),
            ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice", "empty text"),
            ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "has 0 bytes"),
            (
                {"structured_outputs": {"regex": "a" * (MAX_PATTERN_BYTES + 1)}},
                "structured_outputs.regex",
                "has 16385 bytes",
            ),
            ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "is no JSON"),
            (
                {"structured_outputs": {"json": "[" * 100_000}},
                "structured_outputs.json",
                "is no JSON",
            ),
            (
                {
                    "response_format": {"type": "json_object"},
                    "structured_outputs": {"regex": "a"},
                },
                "structured_outputs",
                "both say",
            ),
        ],
    )
    def test_what_cannot_be_held_is_refused(self, fields, param, message) -> None:
        with pytest.raises(InvalidRequest, match=message) as caught:
            assert request(**fields).grammar
        assert caught.value.param == param

    @pytest.mark.parametrize("name", ["json", "regex", "choice", "grammar"])
    def test_old_names_are_refused_with_the_new_one(self, name) -> None:
        with pytest.raises(InvalidRequest, match=f"use structured_outputs.{name}"):
            request(**{f"guided_{name}": "x"})


class Worker:
    """Compiles in memory; a script says how it goes."""

    def __init__(self, *endings: Exception | None) -> None:
        self.endings = list(endings)
        self.calls = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self, spec: GrammarSpec) -> None:
        self.calls += 1
        await self.go_on.wait()
        ending = self.endings.pop(0) if self.endings else None
        if ending is not None:
            raise ending


SPEC = grammars.regex("a", "p")


class TestProof:
    def test_a_grammar_is_compiled_once(self) -> None:
        async def work() -> None:
            worker = Worker()
            proofs = Grammars(worker)
            worker.go_on.clear()
            asked = [asyncio.create_task(proofs.prove(SPEC)) for _ in range(3)]
            await asyncio.sleep(0)
            asked[0].cancel()
            worker.go_on.set()
            assert await asyncio.gather(*asked[1:]) == [SPEC.encode()] * 2
            assert await proofs.prove(SPEC) == SPEC.encode()
            assert worker.calls == 1

        asyncio.run(work())

    @pytest.mark.parametrize(
        ("ending", "code"),
        [
            (InvalidRequest("p is malformed", param="p"), "invalid_value"),
            (WorkerFailed("more than 1 s", code="worker_timeout"), "grammar_too_complex"),
            (WorkerFailed("more than 256 MiB", code="worker_memory"), "grammar_too_complex"),
        ],
    )
    def test_a_verdict_is_remembered(self, ending, code) -> None:
        async def work() -> None:
            worker = Worker(ending)
            proofs = Grammars(worker)
            for _ in range(3):
                with pytest.raises(InvalidRequest) as caught:
                    await proofs.prove(SPEC)
                assert (caught.value.code, caught.value.param) == (code, "p")
            assert worker.calls == 1

        asyncio.run(work())

    @pytest.mark.parametrize(
        "ending",
        [
            QueueFull("later"),
            WorkerFailed("no worker", code="worker_unavailable"),
            WorkerFailed("the server stops", code="draining"),
        ],
    )
    def test_what_says_nothing_of_the_grammar_is_forgotten(self, ending) -> None:
        async def work() -> None:
            worker = Worker(ending)
            proofs = Grammars(worker)
            with pytest.raises(type(ending)):
                await proofs.prove(SPEC)
            assert await proofs.prove(SPEC) == SPEC.encode()

        asyncio.run(work())

    def test_what_broke_its_process_is_refused_and_may_be_tried_again(self) -> None:
        """The system may have ended the process for reasons of its own."""

        async def work() -> None:
            worker = Worker(WorkerFailed("it broke down"))
            proofs = Grammars(worker)
            with pytest.raises(InvalidRequest, match="p broke the process") as caught:
                await proofs.prove(SPEC)
            assert (caught.value.code, caught.value.param) == ("grammar_too_complex", "p")
            assert await proofs.prove(SPEC) == SPEC.encode()

        asyncio.run(work())

    def test_the_engine_gets_ready_while_the_worker_proves(self) -> None:
        told = []

        class Workers:
            async def run(self, kind, request, result):
                assert told == ["warm"]
                return result(1)

        async def work() -> None:
            proofs = job.grammars_for(Workers(), ready_message(Path()), lambda: told.append("warm"))
            for _ in range(2):
                await proofs.prove(grammars.json_object())

        asyncio.run(work())
        assert told == ["warm"]

    def test_only_the_latest_are_remembered(self, monkeypatch) -> None:
        monkeypatch.setattr(grammars, "MAX_REMEMBERED", 2)

        async def work() -> list[int]:
            worker = Worker()
            proofs = Grammars(worker)
            calls = []
            for text in "abacab":
                await proofs.prove(grammars.regex(text, "p"))
                calls.append(worker.calls)
            return calls

        assert asyncio.run(work()) == [1, 2, 2, 3, 3, 4]


class TestJob:
    """What the worker says of a grammar, without the worker."""

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "[09:45:34] /x/cpp/regex_converter.cc:83: Regex parsing error: not closed.\n",
                "p is malformed: Regex parsing error: not closed.",
            ),
            (
                "[09:45:36] /x/c.cc:4939: Check failed: (error.empty()) is false: Failed to parse",
                "p is malformed: Failed to parse",
            ),
            ('"type mismatch! call is<type>()" && is<std::string>()', "p is malformed: it cannot"),
            ("0x7f3a: heap", "p is malformed: it cannot be read"),
        ],
    )
    def test_complaints_tell_nothing_of_the_library(self, monkeypatch, text, message) -> None:
        monkeypatch.setattr(job, "_compiler", lambda *_: Complaining(text))
        with pytest.raises(InvalidRequest) as caught:
            job.run(job.Request(spec=SPEC, folder="", vocab_size=1, eos_ids=(0,)))
        assert caught.value.message.startswith(message)
        assert "/x/" not in caught.value.message

    def test_too_much_memory_ends_the_worker(self, monkeypatch) -> None:
        monkeypatch.setattr(job, "_compiler", lambda *_: Complaining("std::bad_alloc"))
        with pytest.raises(WorkerFailed) as caught:
            job.run(job.Request(spec=SPEC, folder="", vocab_size=1, eos_ids=(0,)))
        assert caught.value.code == "worker_memory"


class Complaining:
    def __init__(self, text: str) -> None:
        self.text = text

    def compile(self, spec: GrammarSpec) -> None:
        raise RuntimeError(self.text)
