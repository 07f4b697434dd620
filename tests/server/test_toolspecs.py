"""What tools mean for an answer: the texts that its grammar takes, by form and by choice."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from oneplusn.demo.tokenizer import END_ID, build_tokenizer
from oneplusn.errors import InvalidRequest
from oneplusn.server import grammars
from oneplusn.server.engine.grammar import Compiler
from oneplusn.server.grammars import GrammarSpec, JsonRules
from oneplusn.server.routes.tool_answers import with_marks
from oneplusn.server.schemas_openai import ChatRequest, Message
from oneplusn.server.schemas_tools import NamedTool, Tool, ToolCall
from oneplusn.server.text import Tokenizer
from oneplusn.server.toolcalls import FORMS, read_answer
from oneplusn.server.toolspecs import ToolPlan, plan_tools

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}


def tool(name: str = "weather", parameters: object = WEATHER, **more) -> Tool:
    function = {"name": name, "parameters": parameters, **more}
    return Tool.model_validate({"type": "function", "function": function})


def named(name: str) -> NamedTool:
    return NamedTool.model_validate({"type": "function", "function": {"name": name}})


TOOLS = [tool(), tool("stop", None)]


def plan(choice="auto", form="hermes", *, tools=TOOLS, parallel=True) -> ToolPlan:
    made = plan_tools(tools, choice, parallel=parallel, form=form)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> Compiler:
    folder = tmp_path_factory.mktemp("bytes")
    build_tokenizer(folder)
    return Compiler(folder, 259, {END_ID})


def takes(compiler: Compiler, spec: GrammarSpec, text: str) -> bool:
    """Tell whether a text may be a whole answer."""
    matcher = compiler.compile(spec).matcher()
    return matcher.accept_string(text) and matcher.accept_token(END_ID)


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def llama3(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "parameters": {arguments}}}'


CALL = {"hermes": hermes, "llama3": llama3}
BERLIN = '{"city": "Berlin", "days": 3}'


@pytest.mark.parametrize("form", sorted(FORMS))
class TestGrammar:
    def check(self, compiler, made: ToolPlan, expected: dict[str, bool]) -> None:
        spec = made.grammar(None)
        assert {text: takes(compiler, spec, text) for text in expected} == expected

    def test_auto_takes_text_or_calls(self, compiler, form) -> None:
        call = CALL[form]
        both = FORMS[form].separator.join([call("weather", BERLIN), call("stop", "{}")])
        self.check(
            compiler,
            plan("auto", form),
            {
                "": True,
                "Berlin is sunny. 1 < 2": True,
                call("weather", BERLIN): True,
                call("weather", '{"city": "Berlin"}'): True,
                both: True,
                call("weather", '{"days": 3}'): False,
                call("weather", '{"city": 3}'): False,
                call("other", "{}"): False,
                call("stop", '{"now": true}'): False,
                call("weather", BERLIN)[:-1]: False,
            },
        )

    def test_required_takes_calls_alone(self, compiler, form) -> None:
        call = CALL[form]
        both = FORMS[form].separator.join([call("weather", BERLIN), call("stop", "{}")])
        self.check(
            compiler,
            plan("required", form),
            {
                "": False,
                "sunny": False,
                call("weather", BERLIN): True,
                call("stop", "{}"): True,
                both: True,
            },
        )

    def test_a_named_tool_is_called_once(self, compiler, form) -> None:
        call = CALL[form]
        twice = FORMS[form].separator.join([call("weather", BERLIN)] * 2)
        self.check(
            compiler,
            plan(named("weather"), form),
            {call("weather", BERLIN): True, call("stop", "{}"): False, twice: False, "": False},
        )

    @pytest.mark.parametrize("choice", ["auto", "required"])
    def test_without_parallel_calls_there_is_one(self, compiler, form, choice) -> None:
        call = CALL[form]
        twice = FORMS[form].separator.join([call("weather", BERLIN)] * 2)
        made = plan(choice, form, parallel=False)
        self.check(compiler, made, {call("weather", BERLIN): True, twice: False})

    def test_in_place_of_text_may_stand_what_the_answer_must_match(self, compiler, form) -> None:
        spec = plan("auto", form).grammar(grammars.regex("yes|no", "p"))
        assert takes(compiler, spec, "yes")
        assert takes(compiler, spec, CALL[form]("stop", "{}"))
        assert not takes(compiler, spec, "perhaps")

    @pytest.mark.parametrize(
        "answer",
        [
            grammars.json_schema(WEATHER, param="p"),
            grammars.ebnf('root ::= "a"', "p"),
            grammars.choice(["a"], "p"),
        ],
        ids=["schema", "ebnf", "choice"],
    )
    def test_any_kind_of_answer_can_stand_beside_calls(self, compiler, form, answer) -> None:
        spec = plan("auto", form).grammar(answer)
        text = '{"city": "a"}' if answer.kind == "json_schema" else "a"
        assert takes(compiler, spec, text)
        assert takes(compiler, spec, CALL[form]("stop", "{}"))

    def test_what_the_grammar_takes_is_read_as_calls(self, form) -> None:
        made = plan("required", form)
        text = FORMS[form].separator.join([CALL[form]("weather", BERLIN), CALL[form]("stop", "{}")])
        answer = read_answer(made.reader(), text)
        functions = [call["function"] for call in answer.calls]
        assert answer.text == ""
        assert functions == [
            {"name": "weather", "arguments": BERLIN},
            {"name": "stop", "arguments": "{}"},
        ]


class TestPlan:
    def test_no_tools_need_no_plan(self) -> None:
        for choice in (None, "none", "auto"):
            assert plan_tools([], choice, form=None) is None
        assert plan_tools(TOOLS, "none", form=None) is None

    def test_the_template_sees_what_the_request_said(self) -> None:
        assert plan().shown == [
            {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
            {"type": "function", "function": {"name": "stop"}},
        ]
        assert plan(named("stop")).shown == plan().shown

    def test_lengths_of_arguments_go_to_the_engine(self) -> None:
        short = {"type": "object", "properties": {"x": {"type": "string", "maxLength": 2}}}
        made = plan("auto", tools=[tool("a", short), tool("b")])
        rules = made.grammar(grammars.json_schema(short, param="p")).rules
        assert rules == JsonRules(short, {"a": short, "b": {}}, "<tool_call>")
        forced = plan("required", "llama3", tools=[tool("a", short)])
        assert forced.grammar(grammars.json_object()).rules == JsonRules(None, {"a": short}, "")

    @pytest.mark.parametrize(
        ("tools", "choice", "form", "param", "message"),
        [
            ([], "required", "hermes", "tool_choice", "'required' and there are no tools"),
            ([], named("x"), "hermes", "tool_choice", "'x' and there are no tools"),
            (TOOLS, "auto", None, "tools", "--tool-parser"),
            (TOOLS, named("x"), "hermes", "tool_choice", "names 'x'; tools has weather, stop"),
            ([tool(), tool()], "auto", "hermes", "tools", "two functions 'weather'"),
            (
                [tool(f"t{i}", WEATHER, description="x" * 10_000) for i in range(30)],
                "auto",
                "hermes",
                "tools",
                "at most 262144",
            ),
        ],
    )
    def test_what_cannot_be_served_is_refused(self, tools, choice, form, param, message) -> None:
        with pytest.raises(InvalidRequest, match=message) as caught:
            plan_tools(tools, choice, form=form)
        assert caught.value.param == param

    @pytest.mark.parametrize(
        ("parameters", "more", "message"),
        [
            ({"type": "string"}, {}, "it is an object"),
            ({"type": "object", "properties": {"a": {"$ref": "http://x"}}}, {}, "is fetched"),
            ({"type": "object", "uniqueItems": True}, {"strict": True}, "cannot be held"),
        ],
    )
    def test_a_schema_of_arguments_is_checked(self, parameters, more, message) -> None:
        made = plan("auto", tools=[tool("a", parameters, **more)])
        with pytest.raises(InvalidRequest, match=message) as caught:
            made.grammar(None)
        assert caught.value.param == "tools.function.parameters"

    def test_many_tools_make_no_larger_grammar_than_allowed(self, monkeypatch) -> None:
        monkeypatch.setattr(grammars, "MAX_SPEC_BYTES", 1000)
        with pytest.raises(InvalidRequest) as caught:
            plan("auto", tools=[tool(f"t{i}") for i in range(20)]).grammar(None)
        assert caught.value.code == "grammar_too_complex"


TEMPLATE = (
    "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}({{ m.tool_call_id }}):{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}={{ c.function.arguments.city }}"
    "{% endfor %};{% endfor %}"
)


def test_templates_see_tools_calls_and_results(tmp_path) -> None:
    build_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    tokenizer = Tokenizer(tmp_path)
    call = {"id": "c1", "function": {"name": "weather", "arguments": BERLIN}}
    conversation = [
        {"role": "user", "content": "Berlin?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "sun"}], "tool_call_id": "c1"},
    ]
    messages = [Message.model_validate(message).for_template() for message in conversation]

    tokens = tokenizer.encode_chat(messages, tools=plan().shown)

    assert tokenizer.decode(tokens) == (
        "[weather][stop]user():Berlin?;assistant():weather=Berlin;tool(c1):sun;"
    )


@pytest.mark.parametrize(("mark", "is_kept"), [("<tool_call>", True), ("<other>", False)])
def test_marks_that_are_special_tokens_stay_in_the_text(tmp_path, mark, is_kept) -> None:
    build_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    tokenizer.backend.add_special_tokens([mark])
    special = tokenizer.backend.token_to_id(mark)
    tokenizer.is_special = lambda token: token == special
    server = SimpleNamespace(inference=SimpleNamespace(tokenizer=tokenizer))
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    )

    kept = with_marks(server, body, plan())
    assert kept.skip_special_tokens is not is_kept
    assert with_marks(server, body, None) is body
    assert with_marks(server, body, plan(form="llama3")) is body


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [(BERLIN, json.loads(BERLIN)), ("", {}), ("{broken", "{broken")],
)
def test_templates_see_the_arguments_of_past_calls_as_objects(arguments, shown) -> None:
    call = {"id": "call_1", "function": {"name": "weather", "arguments": arguments}}
    assert ToolCall.model_validate(call).for_template() == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": shown},
    }
