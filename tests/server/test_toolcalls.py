"""Calls are read from text as models write it, the same however the text is cut."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oneplusn.server.toolcalls import (
    FORMS,
    Arguments,
    Begun,
    Text,
    ToolAnswer,
    guess_form,
    read_answer,
)

NAMES = ("get_weather", "f")
Read = tuple[str, list[tuple[str, str]]]


def plain(answer: ToolAnswer) -> Read:
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in answer.calls]
    return answer.text, calls


def read(form: str, text: str) -> Read:
    return plain(read_answer(FORMS[form].reader(NAMES), text))


def read_in_pieces(form: str, pieces: list[str]) -> Read:
    reader = FORMS[form].reader(NAMES)
    answer = ToolAnswer()
    for piece in pieces:
        answer.take(reader.push(piece))
    answer.take(reader.finish())
    return plain(answer)


def hermes(body: str) -> str:
    return f"<tool_call>\n{body}\n</tool_call>"


CALL = '{"name": "f", "arguments": {"a": [1, {"b": "}\\" <tool_call>"}], "c": "é"}}'
ARGUMENTS = '{"a": [1, {"b": "}\\" <tool_call>"}], "c": "é"}'

HERMES = [
    ("", "", []),
    ("hi", "hi", []),
    (" hi \n", " hi \n", []),
    ("1 < 2 <tool", "1 < 2 <tool", []),
    (hermes(CALL), "", [("f", ARGUMENTS)]),
    (f"Sure. \n{hermes(CALL)}", "Sure.", [("f", ARGUMENTS)]),
    (f"{hermes(CALL)}\n{hermes(CALL)}\n", "", [("f", ARGUMENTS)] * 2),
    (f"{hermes(CALL)}\nThat is all.", "\nThat is all.", [("f", ARGUMENTS)]),
    ('<tool_call>{"name":"f","arguments":{}}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"arguments": {"x": 1} , "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
    ('<tool_call>{"name":"f"}</tool_call>', "", [("f", "{}")]),
    (
        '<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    ('<tool_call>{"id": 7, "name": "f", "arguments": null}</tool_call>', "", [("f", "null")]),
    ("<tool_call>garbage</tool_call> x", "<tool_call>garbage</tool_call> x", []),
    ('<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    ('<tool_call>{"name": "", "arguments": {}}', '<tool_call>{"name": "", "arguments": {}}', []),
    # Cut short: what is known of the call stays.
    ('<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    ('<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
    ('<tool_call>{"na', '<tool_call>{"na', []),
]

LLAMA3 = [
    ("", "", []),
    ("  ", "  ", []),
    ('hi {"name": "f"}', 'hi {"name": "f"}', []),
    ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (' {"name": "f", "arguments": {"a": 1}} ', "", [("f", '{"a": 1}')]),
    ('<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    (
        '{"name": "f", "parameters": {"a": ";"}}; {"name": "get_weather", "parameters": {}}',
        "",
        [("f", '{"a": ";"}'), ("get_weather", "{}")],
    ),
    ('{"name": "f", "parameters": {}} so.', "", [("f", "{}")]),
    ('{"name": "f", "parameters": {}}; {"name": "other", "parameters": {}}', "", [("f", "{}")]),
    ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    ('\n{"answer": 42} ', '\n{"answer": 42} ', []),
    ("{no json", "{no json", []),
    ('{"name": "f", "parameters": {"a', "", [("f", '{"a')]),
    ('{"name": "f', '{"name": "f', []),
    ("<|python", "<|python", []),
    ("<|python_tag|>print(1)", "print(1)", []),
]

CASES = [("hermes", *case) for case in HERMES] + [("llama3", *case) for case in LLAMA3]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_an_answer_is_read(form, text, content, calls) -> None:
    assert read(form, text) == (content, calls)
    assert read_in_pieces(form, list(text)) == (content, calls)


PIECES = [
    *('{"name": "f", ', '"arguments": ', '"parameters": ', "{}", '{"a": [1]}', "}", "{", '"', "\\"),
    *(
        "<tool_call>",
        "</tool_call>",
        "<|python_tag|>",
        "<",
        " ",
        "\n",
        ";",
        ",",
        ":",
        "f",
        "é",
        "1",
    ),
]


@given(
    st.sampled_from(sorted(FORMS)),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.integers(0, 80), max_size=12),
)
@example("hermes", f"a{hermes(CALL)}b", [3, 14, 20])
def test_however_a_text_is_cut_it_reads_the_same(form, text, cuts) -> None:
    bounds = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]

    assert read_in_pieces(form, pieces) == read(form, text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(
    st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), min_size=1, max_size=3),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_arguments_come_back_as_they_were_written(arguments, indent, ascii_only) -> None:
    written = [json.dumps(a, indent=indent, ensure_ascii=ascii_only) for a in arguments]
    marked = "\n".join(hermes(f'{{"name": "f", "arguments": {text}}}') for text in written)
    bare = "; ".join(f'{{"name": "f", "parameters": {text}}}' for text in written)

    assert read("hermes", marked) == ("", [("f", text) for text in written])
    assert read("llama3", bare) == ("", [("f", text) for text in written])


class TestStream:
    def test_the_name_comes_first_and_then_pieces_of_the_arguments(self) -> None:
        reader = FORMS["hermes"].reader(NAMES)
        events = [event for char in f"Hi.{hermes(CALL)}" for event in reader.push(char)]

        assert [event.text for event in events[:3]] == ["H", "i", "."]
        begun = events[3]
        assert isinstance(begun, Begun)
        assert (begun.index, begun.name) == (0, "f")
        assert re.fullmatch(r"call_[0-9a-f]{24}", begun.id)
        rest = events[4:]
        assert all(isinstance(event, Arguments) and event.index == 0 for event in rest)
        assert len(rest) > 10
        assert "".join(event.text for event in rest if isinstance(event, Arguments)) == ARGUMENTS

    def test_text_is_held_back_only_while_it_may_be_a_mark(self) -> None:
        reader = FORMS["hermes"].reader(NAMES)
        assert reader.push("a <tool_") == [Text("a")]
        assert reader.push("box>") == [Text(" <tool_box>")]

    def test_arguments_wait_for_the_name(self) -> None:
        reader = FORMS["hermes"].reader(NAMES)
        assert reader.push('<tool_call>{"arguments": {"a": 1}, ') == []
        begun, arguments = reader.push('"name": "f"}')
        assert isinstance(begun, Begun)
        assert arguments == Arguments(0, '{"a": 1}')

    def test_every_call_has_an_id_of_its_own(self) -> None:
        answer = read_answer(FORMS["hermes"].reader(NAMES), hermes(CALL) * 3)
        assert len({call["id"] for call in answer.calls}) == 3


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, None),
        ("{{ messages[0].content }}", None),
        ("... within <tool_call></tool_call> XML tags ...", "hermes"),
        ("{{- '<|python_tag|>' + tool_call.name }}", "llama3"),
        ("""{"name": function name, "parameters": dictionary}""", "llama3"),
    ],
)
def test_the_form_is_guessed_from_the_chat_template(template, form) -> None:
    assert guess_form(template) == form
