"""Outputs are read along with, and brought to an end, without a library for grammars."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oneplusn.server.engine.json_guard import MAX_RUN, JsonGuard, TokenTable, pack
from oneplusn.server.grammars import JsonRules

# Every ASCII character as a token of its own, then some that reach across parts of a document.
SINGLES = [bytes([code]) for code in range(128)]
PIECES = [b'{"', b'"}', b'": "', b'", "', b"ab", b"abc", b'ab"', b'a", "b', b"\\n", b"\\u00", b"]}"]
VOCAB = [*SINGLES, *PIECES, b"\xc3\xa9", b""]
TABLE = TokenTable(VOCAB)
NAME = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 3}}}


def tokens_of(bits: np.ndarray) -> list[bytes]:
    flags = np.unpackbits(bits.view(np.uint8), bitorder="little")[: len(VOCAB)]
    return [token for token, flag in zip(VOCAB, flags, strict=True) if flag]


def guard_after(text: str, rules: JsonRules | None = None, max_tokens: int = 1000) -> JsonGuard:
    guard = JsonGuard(rules or JsonRules(), TABLE, max_tokens)
    for byte in text.encode():
        if byte < 128:
            guard.feed(byte)
    return guard


def list_of(tokens: bytes) -> list[bytes]:
    return [bytes([token]) for token in tokens]


def left_of(
    text: str, allowed: Sequence[bytes], rules: JsonRules | None = None, *, num_left: int = 500
) -> set[bytes]:
    """Narrow a set of tokens after a text."""
    guard = guard_after(text, rules)
    bits = pack(np.array([token in allowed for token in VOCAB]))
    guard.narrow(bits, num_left=num_left)
    return set(tokens_of(bits))


class TestLengths:
    RULES = JsonRules(
        {
            "type": "object",
            "properties": {
                "short": {"type": "string", "minLength": 2, "maxLength": 3},
                "list": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
                "maybe": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tag"}]},
                "free": {"type": "string"},
            },
            "$defs": {"tag": {"type": "string", "maxLength": 1}},
            "additionalProperties": {"type": "string", "maxLength": 2},
        }
    )

    @pytest.mark.parametrize(
        ("text", "allowed", "left"),
        [
            ('{"short":"', [b"ab", b"abc", b"a", b'"'], {b"ab", b"abc", b"a"}),
            ('{"short":"a', [b"ab", b"abc", b'"'], {b"ab"}),
            ('{"short":"ab', [b"a", b"ab", b'"', b'"}'], {b"a", b'"', b'"}'}),
            ('{"short":"abc', [b"a", b'"', b'ab"'], {b'"'}),
            ('{"short":"ab\\n', [b"a", b'"'], {b'"'}),
            ('{"short":"\\u0041', [b'"', b"abc", b"ab"], {b"ab"}),
            ('{"list":["', [b"a", b"ab"], {b"a"}),
            ('{"list":["a", "b', [b"a", b'"'], {b'"'}),
            ('{"maybe":"a', [b"a", b'"'], {b'"'}),
            ('{"other":"ab', [b"a", b'"'], {b'"'}),
            ('{"free":"abcdefgh', [b"a", b"ab", b'"'], {b"a", b"ab", b'"'}),
        ],
    )
    def test_a_string_is_neither_too_long_nor_too_short(self, text, allowed, left) -> None:
        assert left_of(text, allowed, self.RULES) == left

    def test_names_of_properties_have_no_length(self) -> None:
        assert left_of('{"abcdefgh', [b"a", b"ab"], self.RULES) == {b"a", b"ab"}

    def test_a_token_does_not_begin_a_string_that_may_be_too_long(self) -> None:
        assert left_of('{"free":"a', [b'", "', b'a", "b'], self.RULES) == {b'", "', b'a", "b'}
        assert left_of('{"free":"a', [b'"', b'", "'], JsonRules(NAME)) == {b'"', b'", "'}

    def test_what_the_grammar_insists_on_is_never_taken_away(self) -> None:
        assert left_of('{"short":"abc', [b"a"], self.RULES) == {b"a"}
        assert left_of('{"short":"', [b'"'], self.RULES) == {b'"'}

    def test_inside_an_escape_only_single_bytes_can_come(self) -> None:
        assert left_of('{"short":"\\', [b"n", b'"', b'"}'], self.RULES) == {b"n", b'"'}
        assert left_of('{"short":"\\u00', [b"4", b"ab"], self.RULES) == {b"4"}

    def test_bytes_of_one_character_count_once(self) -> None:
        guard = JsonGuard(self.RULES, TABLE, 1000)
        for token in (b'{"', b"list".replace(b"list", b"l"), b"i", b"s", b"t", b'"', b":", b"["):
            guard.feed(VOCAB.index(token))
        guard.feed(VOCAB.index(b'"'))
        guard.feed(VOCAB.index(b"\xc3\xa9"))
        bits = pack(np.ones(len(VOCAB), np.bool_))
        guard.narrow(bits, num_left=500)
        assert b"a" not in tokens_of(bits)
        assert b'"' in tokens_of(bits)


class TestTools:
    RULES = JsonRules(
        tools={"f": {"properties": {"x": {"maxLength": 1}}}, "g": {"properties": {"x": {}}}},
        trigger="<c>",
    )

    @pytest.mark.parametrize(
        ("text", "left"),
        [
            ('<c>{"name":"f","arguments":{"x":"a', {b'"'}),
            ('<c>{"name":"g","arguments":{"x":"a', {b'"', b"a"}),
            ('hi <c>\n{"name": "f", "arguments": {"x": "a', {b'"'}),
            ('<c>{"name":"g"} and <c>{"name":"f","arguments":{"x":"a', {b'"'}),
            ('{"name":"f","arguments":{"x":"a', {b'"', b"a"}),
            ('<c>{"name":"f"} and {"arguments":{"x":"a', {b'"', b"a"}),
        ],
    )
    def test_lengths_are_those_of_the_tool_that_is_called(self, text, left) -> None:
        assert left_of(text, [b'"', b"a"], self.RULES) == left

    def test_without_a_mark_the_answer_is_a_call_if_it_begins_as_one(self) -> None:
        rules = JsonRules(tools=self.RULES.tools)
        call = '{"name":"f","parameters":{"x":"a'
        assert left_of(call, [b'"', b"a"], rules) == {b'"'}
        assert left_of(f"so: {call}", [b'"', b"a"], rules) == {b'"', b"a"}

    def test_the_answer_may_be_json_in_place_of_a_call(self) -> None:
        rules = JsonRules(NAME, tools=self.RULES.tools, trigger="<c>")
        assert left_of('{"name":"abc', [b'"', b"a"], rules) == {b'"'}
        assert left_of('<c>{"name":"f","arguments":{"x":"a', [b'"', b"a"], rules) == {b'"'}


class TestEnd:
    @pytest.mark.parametrize(
        ("text", "allowed", "left"),
        [
            ('{"a":"xyz', [b"a", b'"', b'ab"'], {b'"'}),
            ('{"a":[1,2', [b"3", b",", b"]"], {b"]"}),
            ('{"a":"b"', [b",", b"}", b" "], {b"}"}),
            ('{"a":', [b" ", b'"', b"\n"], {b'"'}),
            ('{"a":12', [b"3", b",", b" ", b"."], {b",", b"."}),
            ('{"a":12', [b"3"], {b"3"}),
        ],
    )
    def test_the_last_tokens_close_what_is_open(self, text, allowed, left) -> None:
        assert left_of(text, allowed, num_left=20) == left
        assert left_of(text, allowed, num_left=500) == set(allowed)

    def test_more_that_is_open_needs_more_tokens(self) -> None:
        deep = '{"a":' * 100 + '"'
        assert left_of(deep, [b"a", b'"'], num_left=132) == {b'"'}
        assert left_of(deep, [b"a", b'"'], num_left=134) == {b'"', b"a"}

    @pytest.mark.parametrize(
        ("text", "allowed", "cut"),
        [
            ('{"a":"b', b'"a', True),
            ('{"a":"b', b'"', False),
            ('{"a":[1', b",]", True),
            ('{"a":[1', b" ]", False),
            ('{"a":', b'"', False),
        ],
    )
    def test_it_tells_whether_more_could_have_been_said(self, text, allowed, cut) -> None:
        guard = guard_after(text)
        guard.narrow(pack(np.array([token in list_of(allowed) for token in VOCAB])), num_left=1)
        assert guard.was_cut is cut

    def test_space_and_digits_do_not_go_on_for_ever(self) -> None:
        for char in (" ", "7"):
            text = '{"a":' + char * (MAX_RUN - 1)
            assert left_of(text, [b" ", b"7", b","]) == {b" ", b"7", b","}
            assert left_of(text + char, [b" ", b"7", b","]) == {b","}
        assert left_of('{"a":"' + " " * 100, [b" ", b'"']) == {b" ", b'"'}

    def test_text_that_is_no_json_is_left_alone(self) -> None:
        rules = JsonRules(trigger="<c>", tools={"f": {}})
        assert left_of('a "b', [b"a", b'"'], rules, num_left=1) == {b"a", b'"'}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), JSON), st.booleans(), st.integers(0, 2**32))
@example({"a": '"\\{'}, True, 0)
def test_any_document_is_read_to_its_end(document, ascii_only, seed) -> None:
    """However it is cut into tokens, the guard is inside it until its last byte, and then not."""
    text = json.dumps(document, ensure_ascii=ascii_only).encode()
    cuts = random.Random(seed).sample(range(1, len(text)), min(len(text) // 3, len(text) - 1))
    bounds = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    table = TokenTable(pieces)
    guard = JsonGuard(JsonRules(), table, 1000)
    everything = np.full(-(-len(pieces) // 32), -1, np.int32)

    for index in range(len(pieces)):
        guard.feed(index)
    guard.narrow(everything, num_left=1)

    # Nothing is open any more, so nothing is narrowed.
    assert np.all(everything == -1)


STRINGS = st.text(st.sampled_from('ab"\\é\n/'), max_size=12)


@given(st.lists(STRINGS, min_size=1, max_size=4))
def test_characters_are_counted_as_json_does(strings) -> None:
    """A token that ends a string exactly at its limit is kept, one limit lower it is not."""
    first = strings[0]
    inside = json.dumps(first, ensure_ascii=False)[1:].encode()
    table = TokenTable([inside, b"x" * 40])
    size = len(first)

    assert bool(table.within(size)[0] & 1)
    assert not size or not bool(table.within(size - 1)[0] & 1)
    assert bool(table.beyond(size)[0] & 1)
    assert not bool(table.beyond(size + 1)[0] & 1)
