"""Hostile grammars meet a worker process: each is a 400, and the next one is served."""

from __future__ import annotations

import asyncio
import json

import pytest

from oneplusn.demo.tokenizer import END_ID, build_tokenizer
from oneplusn.errors import InvalidRequest
from oneplusn.server import grammars
from oneplusn.server.grammars import Grammars, GrammarSpec
from oneplusn.server.jobs.grammar import Proof, Request
from oneplusn.server.workers import Workers

TEXTS = [{"type": "string"}] * 3000


def schema(value: object) -> GrammarSpec:
    """A schema as a job sees it that the checks of the API have missed."""
    return GrammarSpec("json_schema", json.dumps(value), None, "p")


HOSTILE = [
    pytest.param(grammars.regex("(a", "p"), "invalid_value", id="parenthesis"),
    pytest.param(grammars.regex("(" * 8000 + "a", "p"), "invalid_value", id="parentheses"),
    pytest.param(grammars.regex("(a)\\1", "p"), "invalid_value", id="back reference"),
    pytest.param(grammars.ebnf("root ::= " + "(" * 5000, "p"), "invalid_value", id="nested ebnf"),
    pytest.param(grammars.ebnf("x ::= 1", "p"), "invalid_value", id="no root"),
    pytest.param(schema({"type": "strng"}), "invalid_value", id="type"),
    pytest.param(schema({"type": "string", "pattern": "(a"}), "invalid_value", id="pattern"),
    pytest.param(schema({"type": "string", "pattern": 5}), "invalid_value", id="no pattern"),
    pytest.param(schema({"type": "object", "required": [5]}), "invalid_value", id="required"),
    pytest.param(schema({"$ref": "#"}), "invalid_value", id="refers to itself"),
    pytest.param(schema(False), "invalid_value", id="false"),
    pytest.param(
        schema({"type": "object", "properties": dict(enumerate(TEXTS))}),
        "grammar_too_complex",
        id="optional properties",
    ),
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> dict[str, InvalidRequest | None]:
    """Judge all, each followed by a sound one, with one worker at a time."""
    folder = tmp_path_factory.mktemp("bytes")
    build_tokenizer(folder)

    async def judge() -> dict[str, InvalidRequest | None]:
        workers = Workers()

        async def compile_once(spec: GrammarSpec) -> Proof:
            request = Request(spec=spec, folder=str(folder), vocab_size=259, eos_ids=(END_ID,))
            return await workers.run("grammar", request, Proof)

        proofs = Grammars(compile_once)
        found: dict[str, InvalidRequest | None] = {}
        for index, parameter in enumerate(HOSTILE):
            (spec, _) = parameter.values
            try:
                await proofs.prove(spec)
                found[spec.encode()] = None
            except InvalidRequest as error:
                found[spec.encode()] = error
            assert await proofs.prove(grammars.regex(f"(a|a)*{index}", "p"))
        await workers.close()
        return found

    return asyncio.run(judge())


@pytest.mark.parametrize(("spec", "code"), HOSTILE)
def test_a_hostile_grammar_is_refused_and_the_next_is_served(verdicts, spec, code) -> None:
    error = verdicts[spec.encode()]
    assert error is not None
    assert (error.code, error.param) == (code, "p")
    assert ".cc" not in error.message
